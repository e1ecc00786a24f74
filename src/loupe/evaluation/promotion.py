"""Whether a new model takes the champion's place, and why, in words."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from loupe.config import PromoteTask
from loupe.evaluation.anomaly import compute_resampled_metrics
from loupe.evaluation.bootstrap import Interval, Weights, compute_intervals

ENOUGH_IMAGES = 5  # of a class or kind, for a floor on it
LEAST_COMPARED = 20  # of images, where the champion has learnt from others: fewer that agree would leave no doubt
Choice = Literal["promoted", "kept", "undecided"]


@dataclass(frozen=True)
class HoldOut:
    """The labels of the images that both models are tested on; `normal_label` is None for classifiers."""

    labels: np.ndarray
    normal_label: str | None = None

    def select(self, chosen: Bool[np.ndarray, " num_images"]) -> "HoldOut":
        """Some of the images."""
        return replace(self, labels=self.labels[chosen])

    @property
    def metric(self) -> str:
        """The main figure, which is to be high."""
        return "accuracy" if self.normal_label is None else "image_auroc"

    @property
    def part(self) -> str:
        """The same figure of one class, or of one kind of defect."""
        return "recall" if self.normal_label is None else "AUROC"


@dataclass(frozen=True)
class Measured:
    """What was seen of a model: its answers to the hold-out, its milliseconds an image, and its size.

    `answers` of a classifier are 1 where it is right and 0 where it is not; of a detector, anomaly scores. `has_seen`
    says which of the images had a part in its training, as another division of them allows; None stands for no image.
    """

    answers: Float[np.ndarray, " num_images"]
    latency_ms: float
    num_bytes: int
    has_seen: Bool[np.ndarray, " num_images"] | None = None

    @property
    def unseen(self) -> Bool[np.ndarray, " num_images"]:
        """The images that it can be tested on."""
        return np.ones(len(self.answers), bool) if self.has_seen is None else ~self.has_seen


@dataclass(frozen=True)
class Decision:
    """`reason` is one sentence for a person; `figures` is what it rests on, by name."""

    choice: Choice
    reason: str
    figures: dict[str, Any] = field(default_factory=dict)


def decide_promotion(
    hold_out: HoldOut,
    challenger: Measured,
    champion: Measured | None,
    rules: PromoteTask,
    seed: int,
    flaw: str | None = None,
) -> Decision:
    """Promoted, kept or undecided, by what is surely so on the same images.

    A challenger that misses a floor, has a flaw, or is slower or larger than its rules allow is kept. Otherwise it is
    promoted where the whole interval of the difference lies above `rules.margin`, kept where none of it does, and
    undecided between; the champion stays in both. Without a champion, the floors alone decide. Images that the champion
    learnt from have no part in the comparison.

    Args:
        champion: None where there is no champion.
        seed: of the paired resamples: each has the same images for both.
        flaw: why the challenger is not promoted, whatever its figure; None where nothing is wrong with it.
    """
    figures = _list_figures(hold_out, challenger, champion)
    value, worst = figures.get("challenger", float("nan")), find_worst(hold_out, challenger.answers)
    objections = [
        *_check_worst(hold_out, worst, rules.worst_floor),
        *([flaw] if flaw is not None else []),
        *([] if champion is None else _check_growth(challenger, champion, rules)),
    ]
    said = f"{hold_out.metric} {value:.4f}"
    if not value >= rules.floor:  # NaN too is below every floor
        return Decision("kept", "; ".join([f"{said} is below the floor of {rules.floor:g}", *objections]), figures)
    if objections:
        return Decision("kept", f"{said} does not count, as {'; '.join(objections)}", figures)
    if champion is None:
        return Decision("promoted", f"{said} passes the floor of {rules.floor:g}, and there was no champion", figures)
    if not np.isfinite(champion.answers).all():
        return Decision("promoted", f"{said} passes the floor, and the champion's answers are no numbers", figures)
    if "champion" not in figures or figures["num_compared"] < min(LEAST_COMPARED, figures["num_images"]):
        reason = f"{said} passes the floor, and the champion learnt from too many of the test images to be compared"
        return Decision("undecided", reason, figures)
    interval = _compare(hold_out, challenger, champion, rules.confidence, seed)
    figures |= {"difference_low": interval.low, "difference_high": interval.high}
    choice = _choose(interval, rules.margin)
    return Decision(choice, f"{said}{_explain(choice, figures, rules)}", figures)


def _choose(interval: Interval, margin: float) -> Choice:
    if interval.low > margin:
        return "promoted"
    return "kept" if interval.high <= margin else "undecided"


def _explain(choice: Choice, figures: dict[str, Any], rules: PromoteTask) -> str:
    verdict = {"promoted": "is surely above", "kept": "is not above", "undecided": "may or may not be above"}[choice]
    by = f" by more than {rules.margin:g}" if rules.margin else ""
    if figures["num_compared"] == figures["num_images"]:
        compared = f" {verdict} the champion's {figures['champion']:.4f} on the same images"
    else:
        compared = (
            f"; on the {figures['num_compared']} of {figures['num_images']} test images that the champion did not "
            f"learn from, {figures['champion'] + figures['difference']:.4f} {verdict} its {figures['champion']:.4f}"
        )
    return (
        f"{compared}{by}: the difference is {figures['difference']:+.4f}, {100 * rules.confidence:g}% interval "
        f"{figures['difference_low']:+.4f} to {figures['difference_high']:+.4f}"
    )


def _compare(hold_out: HoldOut, challenger: Measured, champion: Measured, confidence: float, seed: int) -> Interval:
    """What the difference of the two figures might be on other images of the same kind."""
    compared = hold_out.select(champion.unseen)
    answers = [model.answers[champion.unseen] for model in (challenger, champion)]

    def subtract(weights: Weights) -> dict[str, Float[np.ndarray, " num_resamples"]]:
        ours, theirs = (compute_resampled_metric(compared, values, weights) for values in answers)
        return {"difference": ours - theirs}

    return compute_intervals(subtract, len(compared.labels), seed, level=confidence)["difference"]


def compute_metric(hold_out: HoldOut, answers: Float[np.ndarray, " num_images"]) -> float:
    """Accuracy or image AUROC, in [0, 1]; NaN where an answer is no number, or a kind of image is lacking."""
    if not len(answers):
        return float("nan")
    return float(compute_resampled_metric(hold_out, answers, np.ones((1, len(answers))))[0])


def compute_resampled_metric(
    hold_out: HoldOut, answers: Float[np.ndarray, " num_images"], weights: Weights
) -> Float[np.ndarray, " num_resamples"]:
    """The same of each resample; a weight of 0 leaves an image out."""
    if not np.isfinite(answers).all():
        return np.full(len(weights), np.nan)
    if hold_out.normal_label is None:
        share: np.ndarray = weights @ answers / weights.sum(axis=1)
        return share
    return compute_resampled_metrics(hold_out.labels != hold_out.normal_label, answers, weights)["image_auroc"]


def find_worst(hold_out: HoldOut, answers: Float[np.ndarray, " num_images"]) -> tuple[str, float] | None:
    """The label with the lowest recall, or the kind of defect with the lowest AUROC against all normal images.

    Labels with fewer than ENOUGH_IMAGES do not count; None where none does.
    """
    names, counts = np.unique(hold_out.labels, return_counts=True)
    enough = [str(name) for name in names[counts >= ENOUGH_IMAGES] if name != hold_out.normal_label]
    is_normal = hold_out.labels == hold_out.normal_label
    values = {
        name: float(compute_resampled_metric(hold_out, answers, ((hold_out.labels == name) | is_normal)[None] * 1.0)[0])
        for name in enough
    }
    return min(values.items(), key=lambda item: item[1]) if values else None


def _check_worst(hold_out: HoldOut, worst: tuple[str, float] | None, floor: float) -> list[str]:
    if worst is None or worst[1] >= floor:
        return []
    return [f"its {hold_out.part} of {worst[0]}, {worst[1]:.4f}, is below the floor of {floor:g} for the worst"]


def _check_growth(challenger: Measured, champion: Measured, rules: PromoteTask) -> list[str]:
    """What has grown by more than it may, in words."""
    found = []
    if challenger.latency_ms > champion.latency_ms * rules.max_latency_growth:
        found.append(
            f"it takes {challenger.latency_ms:.1f} ms an image, {challenger.latency_ms / champion.latency_ms:.1f} "
            f"times the champion's {champion.latency_ms:.1f} ms where {rules.max_latency_growth:g} times is allowed"
        )
    if challenger.num_bytes > champion.num_bytes * rules.max_size_growth:
        found.append(
            f"it has {challenger.num_bytes / 1e6:.2f} MB, {challenger.num_bytes / champion.num_bytes:.1f} times the "
            f"champion's {champion.num_bytes / 1e6:.2f} MB where {rules.max_size_growth:g} times is allowed"
        )
    return found


def _list_figures(hold_out: HoldOut, challenger: Measured, champion: Measured | None) -> dict[str, Any]:
    """`challenger` and `champion` are the main metric, the latter of images that it did not learn from.

    What is not defined is left out.
    """
    figures: dict[str, Any] = {
        "num_images": len(hold_out.labels),
        "challenger": compute_metric(hold_out, challenger.answers),
        "latency_ms": challenger.latency_ms,
        "num_bytes": challenger.num_bytes,
    }
    worst = find_worst(hold_out, challenger.answers)
    if worst is not None:
        figures |= {"worst_label": worst[0], "worst": worst[1]}
    if champion is not None:
        unseen = champion.unseen
        ours, theirs = (compute_metric(hold_out.select(unseen), one.answers[unseen]) for one in (challenger, champion))
        figures |= {"num_compared": int(unseen.sum()), "champion": theirs, "difference": ours - theirs}
        figures |= {"champion_latency_ms": champion.latency_ms, "champion_num_bytes": champion.num_bytes}
    return {name: value for name, value in figures.items() if value == value}  # NaN alone differs from itself

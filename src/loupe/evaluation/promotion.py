"""Whether a new model takes the champion's place, and why, in words."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """`reason` is one sentence for a person."""

    promoted: bool
    reason: str


def decide_promotion(
    metric: str, challenger: float, champion: float | None, floor: float, margin: float, flaw: str | None = None
) -> Decision:
    """Compare two figures of the same hold-out; higher is better.

    Args:
        metric: its name, for the reason.
        challenger: the new model's figure.
        champion: the present champion's figure, None where there is no champion.
        floor: a challenger below it is never promoted.
        margin: by how much a champion must be surpassed.
        flaw: why the challenger is not promoted, whatever its figure; None where nothing is wrong with it.
    """
    figure = f"{metric} {challenger:.4f}"
    if not challenger >= floor:  # NaN too is below every floor
        return Decision(False, f"{figure} is below the floor of {floor:g}")
    if flaw is not None:
        return Decision(False, f"{figure} does not count, as {flaw}")
    if champion is None:
        return Decision(True, f"{figure} passes the floor of {floor:g}, and there was no champion")
    needed = f"the champion's {champion:.4f} on the same images" + (f" plus the margin of {margin:g}" if margin else "")
    if challenger > champion + margin:
        return Decision(True, f"{figure} is above {needed}")
    return Decision(False, f"{figure} is not above {needed}")

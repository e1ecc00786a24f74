"""The typed form of params.yaml: frozen and strict, one section a stage.

A value may stand at `auto` where the data and the device decide; the stage that decides says so in its log.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML, YAMLError

from loupe.errors import ConfigError

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Side = Annotated[int, Field(ge=16, le=2048)]
CodedSide = Annotated[int, Field(ge=16, le=2048, multiple_of=8)]


class Section(BaseModel):
    """A part of params.yaml. Unknown keys fail, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Fetch(Section):
    """The built-in data set: which stratified part of its 70,000 images is taken; 1.0 takes all."""

    fraction: Annotated[float, Field(gt=0, le=1)]


class Ingest(Section):
    """Where the images are, and how their folder is to be read."""

    source: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    layout: Literal["auto", "class_folders", "split_folders", "mvtec", "table", "unlabelled"]


class Validate(Section):
    """What the data must satisfy before anything is trained on it. Sides are in pixels."""

    min_side: PositiveInt
    max_side: PositiveInt
    max_aspect: Annotated[float, Field(ge=1)]
    min_contrast: NotNegative
    min_images: PositiveInt
    max_bad_fraction: Fraction

    @model_validator(mode="after")
    def _sides_are_ordered(self) -> Self:
        if self.min_side > self.max_side:
            raise ValueError(f"min_side must be at most max_side, got {self.min_side} and {self.max_side}")
        return self


class Split(Section):
    """How images without a given split are divided, and which labels count as normal where they occur."""

    val_fraction: OpenFraction
    calibration_fraction: OpenFraction
    test_fraction: OpenFraction
    normal_labels: list[str]

    @model_validator(mode="after")
    def _something_is_left_to_train_on(self) -> Self:
        held_out = self.val_fraction + self.calibration_fraction + self.test_fraction
        if held_out >= 1:
            raise ValueError(f"val, calibration and test fractions must sum to less than 1, got {held_out:g}")
        return self


class PrepareTask(Section):
    """The size a model sees, in pixels (a side, or height and width), and how an image is brought to it."""

    input_size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] | Auto
    fit: Literal["crop", "squash", "pad"] | Auto


class PrepareDetector(PrepareTask):
    """The same for the detector; the autoencoders of pixels halve their input three times."""

    input_size: CodedSide | Annotated[list[CodedSide], Field(min_length=2, max_length=2)] | Auto


class Prepare(Section):
    """Decoding and resizing, once for each kind of model."""

    classifier: PrepareTask
    detector: PrepareDetector


Policy = str | list[dict[str, Any]]


class Augment(Section):
    """The augmentation policy of each kind of model: a name, or albumentations transforms written out."""

    classifier: Policy
    detector: Policy


class TrainClassifier(Section):
    """A recipe by name, and each of its knobs. `epochs`, rates and what follows are of training the whole network."""

    recipe: Literal["scratch", "scratch_augmented", "features", "features_augmented", "fine_tuned"]
    backbone: str
    weights: str
    drop_rate: Fraction | Auto
    drop_path: Fraction | Auto
    epochs: PositiveInt | Auto
    patience: PositiveInt
    batch_size: PositiveInt | Auto
    optimizer: str
    learning_rate: PositiveFloat | Auto
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    frozen: Fraction | Auto
    schedule: Literal["one_cycle", "cosine", "plateau"]
    weight_decay: NotNegative
    l1: NotNegative
    label_smoothing: Fraction
    mixup: NotNegative
    cutmix: NotNegative
    ema_decay: Fraction | Auto
    refit: bool | Auto
    class_weights: Literal["none", "balanced"]
    accumulate: PositiveInt
    gradient_clip: NotNegative
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] | Auto
    channels_last: bool
    compile: bool

    @model_validator(mode="after")
    def _scratch_starts_from_nothing(self) -> Self:
        if self.recipe.startswith("scratch") and self.weights not in ("auto", "none"):
            raise ValueError(f"weights must be auto or none with the recipe {self.recipe}, got {self.weights!r}")
        return self

    @model_validator(mode="after")
    def _plateau_needs_val(self) -> Self:
        if self.refit is True and self.schedule == "plateau":
            raise ValueError("refit must be auto or false with the schedule plateau, which watches val")
        return self


class AutoencoderKnobs(Section):
    """Of every detector that is trained; `width`, `latent_channels` and `loss` of those that rebuild pixels."""

    width: PositiveInt
    latent_channels: PositiveInt
    loss: Literal["mse", "ssim", "ms_ssim"]
    epochs: PositiveInt | Auto
    batch_size: PositiveInt | Auto
    learning_rate: PositiveFloat
    patience: PositiveInt


class DenoisingKnobs(Section):
    """How images are corrupted: standard deviation of the noise, and the chance of masked blocks and of defects."""

    noise: NotNegative
    masked: Probability
    defects: Probability


class VaeKnobs(Section):
    """The weight of the KL divergence, the part of the training in which it grows, and what an image is scored by."""

    beta: NotNegative
    warm_up: Probability
    score: Literal["reconstruction", "kl", "elbo"]


class Costs(Section):
    """What a false alarm and a miss cost, in any one unit, and how many of the images to come are anomalous."""

    false_alarm: PositiveFloat
    miss: PositiveFloat
    anomalous_fraction: OpenFraction


TASK_NAMES = ("classifier", "detector")
PIXEL_DETECTORS = ("autoencoder", "denoising_autoencoder", "vae")
CLOSED_FORM_DETECTORS = ("feature_autoencoder", "padim", "knn_patches")


class TrainDetector(Section):
    """A detector by name with the knobs of its kind, and its threshold at a stated rate of false alarms."""

    model: Literal[
        "feature_autoencoder", "deep_feature_autoencoder", "padim", "knn_patches",
        "autoencoder", "denoising_autoencoder", "vae",
    ]  # fmt: skip
    backbone: str
    weights: str
    tiles: PositiveInt
    tile_overlap: Fraction
    feature_gigabytes: PositiveFloat
    false_alarm_rate: OpenFraction | Literal["auto", "by_cost"]
    costs: Costs
    autoencoder: AutoencoderKnobs
    denoising: DenoisingKnobs
    vae: VaeKnobs

    @property
    def rebuilds_pixels(self) -> bool:
        """Whether it looks at pixels, and not at a backbone's features."""
        return self.model in PIXEL_DETECTORS

    @property
    def is_closed_form(self) -> bool:
        """Whether it is fitted without epochs."""
        return self.model in CLOSED_FORM_DETECTORS


class EvaluateClassifier(Section):
    """What the evaluation shows beside its figures."""

    num_pictures: PositiveInt


class EvaluateDetector(Section):
    """What the evaluation shows beside its figures."""

    num_pictures: PositiveInt


class PromoteTask(Section):
    """What a new version must reach, and how a later one is compared with the champion on the same images.

    `worst_floor` is for the class or kind of defect that does worst; the champion must be surpassed by `margin` with
    this `confidence`; latency and size may grow by these factors.
    """

    floor: float
    worst_floor: float
    margin: Annotated[float, Field(ge=0)]
    confidence: Annotated[float, Field(gt=0, lt=1)]
    max_latency_growth: PositiveFloat
    max_size_growth: PositiveFloat


class Promote(Section):
    """The rules of promotion: accuracy and recall for the classifier, image AUROC for the detector."""

    classifier: PromoteTask
    detector: PromoteTask


class Drift(Section):
    """How often a drift check may cry wolf, by both its tests together, and how many images a side it compares."""

    false_alarm_rate: OpenFraction
    num_permutations: PositiveInt
    min_images: Annotated[int, Field(ge=10)]
    max_images: PositiveInt
    num_pictures: PositiveInt

    @model_validator(mode="after")
    def _something_can_be_found(self) -> Self:
        if self.min_images > self.max_images:
            raise ValueError(f"min_images must be at most max_images, got {self.min_images} and {self.max_images}")
        least = 2 / (1 + self.num_permutations)
        if self.false_alarm_rate < least:
            raise ValueError(
                f"{self.num_permutations} permutations find nothing at a false_alarm_rate below {least:g}, got "
                f"{self.false_alarm_rate:g}: raise num_permutations"
            )
        return self


class Pipeline(Section):
    """How stages are run."""

    stage_timeout_seconds: PositiveInt


class Params(Section):
    """The whole of params.yaml."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    fetch: Fetch
    ingest: Ingest
    validate_: Annotated[Validate, Field(alias="validate")]
    split: Split
    prepare: Prepare
    augment: Augment
    train_classifier: TrainClassifier
    evaluate_classifier: EvaluateClassifier
    train_detector: TrainDetector
    evaluate_detector: EvaluateDetector
    promote: Promote
    drift: Drift
    pipeline: Pipeline


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check params.yaml.

    Raises:
        ConfigError: if the file is missing, is not YAML, or holds an unknown key or an impossible value.
    """
    try:
        values = YAML(typ="safe").load(path.read_text(encoding="utf-8"))  # of YAML 1.2, as DVC reads it
    except OSError as error:
        raise ConfigError(f"{path} can't be read ({error.strerror}): run this in the folder that holds it") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    return parse_params(values, str(path))


def parse_params(values: object, where: str = "params.yaml") -> Params:
    """Check values that were read from `where`.

    Raises:
        ConfigError: with one sentence for each key or value that is not allowed.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must hold sections of keys and values, got {type(values).__name__}")
    try:
        return Params.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{where}: {_describe_problems(error, values)}") from error


def _describe_problems(error: pydantic.ValidationError, values: dict[str, Any]) -> str:
    """One clause a key; the alternatives of a union are joined by `or`."""
    clauses: dict[str, str] = {}
    for problem in error.errors():
        key, value, known = _locate(problem["loc"], values)
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key.rpartition(".")[2], known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            clauses[key] = f"{key} is not a known key; {hint}"
        elif problem["type"] == "missing":
            clauses[key] = f"{key} is missing"
        elif problem["type"] == "value_error":
            clauses[key] = f"{key}: {problem['msg'].removeprefix('Value error, ')}"
        else:
            wanted = problem["msg"].removeprefix("Input should be ")
            start = clauses[key].rpartition(", got ")[0] + " or" if key in clauses else f"{key} must be"
            clauses[key] = f"{start} {wanted}, got {value!r}{_hint_choice(problem)}"
    return "; ".join(clauses.values())


def _hint_choice(problem: ErrorDetails) -> str:
    """Which of the allowed names was probably meant."""
    choices = re.findall("'([^']*)'", problem["ctx"]["expected"]) if problem["type"] == "literal_error" else []
    near = difflib.get_close_matches(str(problem["input"]), choices, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _locate(location: tuple[int | str, ...], values: dict[str, Any]) -> tuple[str, object, list[str]]:
    """The dotted key of a problem, the value there, and the keys its section knows."""
    keys: list[str] = []
    value: object = values
    model: type[BaseModel] | None = Params
    known: list[str] = []
    for part in location:
        if model is None:
            break
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        known = sorted(fields)
        keys.append(str(part))
        value = value.get(part) if isinstance(value, dict) else value
        annotation = fields[str(part)].annotation if str(part) in fields else None
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return ".".join(keys), value, known

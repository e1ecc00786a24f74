"""A drill of promotion and rollback, with real trainings in a folder of its own: `make drill`.

What it trains on are shapes that it draws. A striped square is told from a plain one only by who sees it at its full
size: in half of it the stripes are gone. So which model is better follows from what it sees, and not from luck.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from ruamel.yaml import YAML

from loupe.commands import run_command
from loupe.errors import PipelineError
from loupe.stages.entry import ending_in_a_sentence
from loupe.stages.files import PROMOTION

ROOT = Path(__file__).resolve().parents[1]
COPIED = (".dvc/config", ".dvcignore", ".gitignore", "dvc.yaml", "params.yaml", "pipelines", "src")
SHAPES = ("disc", "square", "striped_square")
NUM_IMAGES, NUM_NEW_IMAGES, SIDE = 100, 20, 32  # of each shape; pixels
TIMEOUT_SECONDS = 900
PROMOTABLE = ("evaluate_classifier", "export_classifier", "train_detector")  # stages that a promotion looks at
COARSE, FINE, UNTAUGHT = 16, 32, 1e-9  # sides that a model sees, and a learning rate that teaches nothing
BASIS = {
    "ingest.source": "shapes",
    "split.normal_labels": [],
    "augment.classifier": "none",
    "prepare.classifier": {"input_size": COARSE, "fit": "squash"},
    "train_classifier.recipe": "scratch",
    "train_classifier.backbone": "test_resnet",
    "train_classifier.epochs": 12,
    "train_classifier.batch_size": 30,
    "train_classifier.learning_rate": 0.003,
    "promote.classifier.floor": 0.2,
    "promote.classifier.worst_floor": 0.0,
    "promote.classifier.max_latency_growth": 10.0,  # smaller images are quicker, and other work disturbs the clock
}

console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    """Train, promote, keep a worse one out, promote a better one, roll back, score with both; and say so."""
    for variable in [name for name in os.environ if name.startswith(("MLFLOW_", "DVC_"))]:
        del os.environ[variable]  # nothing of the user's own store is touched
    os.environ |= {"DVC_NO_ANALYTICS": "1", "COLUMNS": str(shutil.get_terminal_size((120, 24)).columns)}
    with ending_in_a_sentence(), TemporaryDirectory(prefix="loupe-drill-") as folder, chdir(folder):
        build_project()
        drill()


def drill() -> None:
    """The drill itself, in the current folder.

    Raises:
        PipelineError: if a command fails, or somebody is champion who should not be.
    """
    _say(f"1. A first model, which sees images of {COARSE} pixels: too few for the stripes")
    _train({})
    _expect(_promote(), decision="promoted", champion_version="1")
    _say("2. A worse one, which is taught nothing: it must be kept out")
    _train({"train_classifier.learning_rate": UNTAUGHT, "train_classifier.epochs": 1})
    _expect(_promote(), decision="kept", champion_version="1")
    _say(f"3. A better one, which sees {FINE} pixels: it must be promoted")
    _train({"prepare.classifier": {"input_size": FINE, "fit": "squash"}})
    _expect(_promote(), decision="promoted", champion_version="3")
    _say("4. Rolled back, and asked again: the version that was rolled back must stay out")
    _call("loupe", "rollback", "classifier", "--reason", "a drill")
    _expect(_promote(), decision="kept", champion_version="1")
    _say(f"5. {len(SHAPES) * NUM_NEW_IMAGES} new images, scored with the champion and with the one that was taken back")
    for version, accuracy in score_new_images(("1", "3")).items():
        console.print(f"   version {version}: {accuracy:.0%} right")
    _say("6. What the audit says")
    _call("loupe", "history", "classifier")
    _say("All went as it should; the folder of the drill is removed.")


def build_project() -> None:
    """What a drill needs of this project, in the current folder, in a repository of its own, with shapes to learn."""
    for name in COPIED:
        source, target = ROOT / name, Path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    for command in (["init", "--quiet"], ["add", "--all"]):
        subprocess.run(["git", *command], check=True)
    draw_shapes(Path("shapes"), NUM_IMAGES, seed=0)
    draw_shapes(Path("new_shapes"), NUM_NEW_IMAGES, seed=1)


def draw_shapes(folder: Path, num_images: int, seed: int) -> None:
    """A folder a shape, with images whose shapes differ in place, size and shade."""
    generator = np.random.default_rng(seed)
    for shape in SHAPES:
        (folder / shape).mkdir(parents=True)
        for number in range(num_images):
            draw_shape(shape, generator).save(folder / shape / f"{number}.png")


def draw_shape(shape: str, generator: np.random.Generator) -> Image.Image:
    """A bright shape on a dark and noisy ground; stripes are a pixel wide, and on average as bright as a plain one."""
    image = Image.new("L", (SIDE, SIDE), int(generator.integers(20, 60)))
    middle, radius = generator.integers(13, 19, 2), int(generator.integers(7, 11))
    box = [*(middle - radius).tolist(), *(middle + radius).tolist()]
    pen, shade = ImageDraw.Draw(image), int(generator.integers(150, 200))
    (pen.ellipse if shape == "disc" else pen.rectangle)(box, fill=shade)
    values = np.asarray(image).astype(np.float64)
    if shape == "striped_square":
        values[values == shade] += np.where(np.arange(SIDE) % 2, 40, -40)[np.nonzero(values == shade)[1]]
    values += generator.normal(0, 8, (SIDE, SIDE))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def build_params(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The project's params with those of the drill, and with these changes of a step."""
    params: dict[str, Any] = YAML(typ="safe").load(ROOT / "params.yaml")
    for key, value in {**BASIS, **changes}.items():
        *parents, last = key.split(".")
        section = params
        for parent in parents:
            section = section[parent]
        section[last] = value
    return params


def score_new_images(versions: tuple[str, ...]) -> dict[str, float]:
    """The accuracy of versions of the classifier on images that neither training nor promotion has seen."""
    from loupe.tracking import logged_models  # torch and mlflow take seconds, and read the environment
    from loupe.tracking.runs import connect

    client, files = connect("shapes"), sorted(Path("new_shapes").rglob("*.png"))
    labels = [file.parent.name for file in files]
    known = {version: client.get_model_version("shapes-classifier", version) for version in versions}
    return {
        version: float((logged_models.predict_with(one, files)["predicted"] == labels).mean())
        for version, one in known.items()
    }


def _train(changes: Mapping[str, Any]) -> None:
    """Reproduce with DVC what a promotion of the classifier takes."""
    YAML(typ="safe").dump(build_params(changes), Path("params.yaml"))
    for line in run_command(["dvc", "repro", "--quiet", *PROMOTABLE], TIMEOUT_SECONDS):
        if "WARNING" in line:
            console.print(f"   {line}", markup=False)


def _promote() -> dict[str, Any]:
    _call("loupe", "promote")
    outcome: dict[str, Any] = json.loads(PROMOTION.read_text(encoding="utf-8"))["classifier"]
    return outcome


def _expect(outcome: Mapping[str, Any], **expected: str) -> None:
    for key, value in expected.items():
        if outcome[key] != value:
            raise PipelineError(f"the drill failed: {key} must be {value}, got {outcome[key]}: {outcome['reason']}")


def _call(*command: str) -> None:
    """Run a command, and show it with what it says."""
    console.print(f"   $ {' '.join(command)}", markup=False)
    for line in run_command(list(command), TIMEOUT_SECONDS):
        console.print(f"   {line}", markup=False)


def _say(sentence: str) -> None:
    console.print(f"\n{sentence}", markup=False)


if __name__ == "__main__":
    main()

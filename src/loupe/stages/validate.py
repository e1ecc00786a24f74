"""Check the manifest against the expectations; a critical failure stops the pipeline here."""

import logging
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from loupe.config import Params
from loupe.data.duplicates import find_near_duplicates
from loupe.data.expectations import Images, Limits, describe_images, list_worst, validate_images
from loupe.data.images import open_image
from loupe.data.manifest import load_table
from loupe.data.sheets import draw_captioned
from loupe.data.split import find_leaks, list_contents
from loupe.errors import ValidationError
from loupe.stages.entry import run_stage, save_json
from loupe.stages.files import DATA_DOCS, MANIFEST, MASKS, QUALITY, QUARANTINE, VALIDATION, WORST_IMAGES

NUM_WORST = 24

log = logging.getLogger(__name__)


def validate(params: Params) -> None:
    manifest, quality = load_table(MANIFEST), load_table(QUALITY)
    images = Images(manifest, quality, load_table(MASKS), load_table(QUARANTINE), _find_leaks(manifest, quality))
    limits = Limits(**params.validate_.model_dump())
    findings, result = validate_images(images, limits, DATA_DOCS)
    told = [asdict(finding) for finding in findings]
    save_json({"success": result["success"], "findings": told, "checkpoint": result}, VALIDATION)
    worst = list_worst(describe_images(images), limits, NUM_WORST)
    pictures = [open_image(Path(params.ingest.source) / path) for path in worst["path"]]
    draw_captioned(pictures, list(worst["caption"])).save(WORST_IMAGES)
    for finding in findings:
        mark = finding.severity if finding.num_failing else "ok"
        log.info("%-9s%s", mark, finding.describe() if finding.num_failing else finding.sentence)
    failed = [finding.describe() for finding in findings if finding.severity == "critical" and not finding.success]
    if failed:
        raise ValidationError(
            f"the images of {params.ingest.source} can't be trained on. {'. '.join(failed)}. "
            "Mend or remove these files, or change the limits under `validate` in params.yaml"
        )


def _find_leaks(manifest: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    """Paths of near-duplicates that the given splits part; there are none where none is given."""
    if manifest["given_split"].nunique() < 2:
        return pd.DataFrame({"first": [], "second": []}, dtype="str")
    firsts = manifest.drop_duplicates("image_id")
    pairs = find_near_duplicates(firsts[["image_id", "phash"]].merge(quality, on="image_id"))
    leaks = find_leaks(list_contents(manifest), pairs, "given_split")
    paths = firsts.set_index("image_id")["path"]
    return pd.DataFrame({"first": leaks["first"].map(paths), "second": leaks["second"].map(paths)})


if __name__ == "__main__":
    run_stage(validate)

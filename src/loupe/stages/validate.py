"""Check the manifest against the expectations; a critical failure stops the pipeline here."""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
from PIL import Image

from loupe.config import Params
from loupe.data.duplicates import find_near_duplicates
from loupe.data.expectations import Finding, Images, Limits, describe_images, list_worst, validate_images
from loupe.data.images import open_image
from loupe.data.manifest import load_table
from loupe.data.overview import Overview, describe_data
from loupe.data.sheets import draw_captioned
from loupe.data.sources import LAYOUTS
from loupe.data.split import find_leaks, list_contents
from loupe.errors import DataError, ValidationError
from loupe.reporting.page import embed_picture, render_page, save_page, shrink_picture
from loupe.stages.entry import save_json
from loupe.stages.files import (
    DATA_DOCS,
    DATA_REPORT,
    MANIFEST,
    MASKS,
    QUALITY,
    QUARANTINE,
    VALIDATION,
    WORST_IMAGES,
    load_data_set,
)

NUM_WORST = 24
PICTURE_SIDE = 256  # pixels; the page shows most of them smaller, for screens of higher density

log = logging.getLogger(__name__)


def validate(params: Params) -> None:
    manifest, quality = load_table(MANIFEST), load_table(QUALITY)
    images = Images(manifest, quality, load_table(MASKS), load_table(QUARANTINE), _find_leaks(manifest, quality))
    limits = Limits(**params.validate_.model_dump())
    rows = describe_images(images)
    findings, result = validate_images(rows, limits, DATA_DOCS)
    told = [finding.to_json() for finding in findings]
    save_json({"success": result["success"], "findings": told, "checkpoint": result}, VALIDATION)
    worst = list_worst(rows, limits, NUM_WORST)
    overview = describe_data(images, findings, worst)
    pictures = _open_pictures(Path(params.ingest.source), overview.pictured)
    shown = [(path, reason) for path, reason in zip(worst["path"], worst["reason"], strict=True) if path in pictures]
    captions = [f"{path[-24:]}\n{reason}" for path, reason in shown]
    draw_captioned([pictures[path] for path, _ in shown], captions).save(WORST_IMAGES)
    _save_report(overview, pictures)
    _tell(findings, params.ingest.source)


def _find_leaks(manifest: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    """Near-duplicates that the given splits part, by their paths; there are none where none is given."""
    if manifest["given_split"].nunique() < 2:
        return pd.DataFrame({"first": [], "second": [], "first_split": [], "second_split": []}, dtype="str")
    firsts = manifest.drop_duplicates("image_id")
    pairs = find_near_duplicates(firsts[["image_id", "label", "phash"]].merge(quality, on="image_id"))
    leaks = find_leaks(list_contents(manifest), pairs, "given_split")
    paths = firsts.set_index("image_id")["path"]
    return leaks.assign(first=leaks["first"].map(paths), second=leaks["second"].map(paths))


def _open_pictures(root: Path, paths: Sequence[str]) -> dict[str, Image.Image]:
    """Each picture, made small; those that can't be read any more are left out."""

    def open_small(path: str) -> tuple[str, Image.Image] | None:
        try:
            return path, shrink_picture(open_image(root / path), PICTURE_SIDE)
        except DataError as error:
            log.warning("not shown: %s", error)
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(found for found in pool.map(open_small, paths) if found)


def _save_report(overview: Overview, pictures: dict[str, Image.Image]) -> None:
    data_set = load_data_set()
    values = {
        "data_set": data_set,
        "layout": LAYOUTS[data_set.layout],
        "overview": overview,
        "pictures": {path: embed_picture(picture, PICTURE_SIDE) for path, picture in pictures.items()},
    }
    save_page(render_page("data.html.jinja", values), DATA_REPORT)


def _tell(findings: Sequence[Finding], source: str) -> None:
    """Log the findings.

    Raises:
        ValidationError: if a critical one fails.
    """
    for finding in findings:
        log.info("%-9s%s", finding.mark, finding.describe() if finding.num_failing else finding.sentence)
    failed = [finding.describe() for finding in findings if finding.mark == "critical"]
    if failed:
        raise ValidationError(
            f"the images of {source} can't be trained on. {'. '.join(failed)}. "
            "Mend or remove these files, or change the limits under `validate` in params.yaml"
        )

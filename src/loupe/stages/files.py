"""Where the stages read and write, relative to the project's folder: the paths of dvc.yaml."""

import json
from dataclasses import dataclass
from pathlib import Path

DOWNLOADS = Path("data/downloads")
BUILT_IN = Path("data/fashion_mnist/images")
LISTING = Path("data/ingest/listing.json")
MANIFEST = Path("data/ingest/manifest.parquet")
QUALITY = Path("data/ingest/quality.parquet")
MASKS = Path("data/ingest/masks.parquet")
QUARANTINE = Path("data/ingest/quarantine.parquet")
FACTS_MEMORY = Path("data/memory/facts.parquet")  # no out: what an earlier run decoded
TRAINING_MEMORY = Path("data/memory/training")  # no out: what a stopped training goes on from
VALIDATION = Path("reports/validation.json")
WORST_IMAGES = Path("reports/worst_images.png")
DATA_REPORT = Path("reports/data.html")
DATA_DOCS = Path("reports/data_docs")
SPLITS = Path("data/split/splits.parquet")
SPLIT_RULES = Path("data/split/rules.json")
TASKS = Path("data/split/tasks.json")
PREPARED = Path("data/prepared")
AUGMENT = Path("data/augment")
MODELS = Path("models")
REPORTS = Path("reports")
PROMOTION = REPORTS / "promotion.json"
SUMMARY = REPORTS / "summary.json"
SKIPPED, RUN, HISTORY = "skipped.json", "run.json", "history.csv"
CALIBRATION, REFERENCE = "calibration_scores.parquet", "reference.parquet"
SEEN = "seen.parquet"  # of a model: the images that had a part in its training
POLICY, CONTACT_SHEET = "policy.json", "contact_sheet.png"


@dataclass(frozen=True)
class DataSet:
    """What the ingest stage says of its source."""

    name: str
    source: str
    layout: str
    num_images: int
    num_quarantined: int


def load_data_set() -> DataSet:
    """Read what ingest wrote."""
    return DataSet(**json.loads(LISTING.read_text(encoding="utf-8")))

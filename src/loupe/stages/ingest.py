"""List and decode the images of the source folder into the manifest; set aside what can't be used."""

import logging
from pathlib import Path

import pandas as pd

from loupe.config import Params
from loupe.data.manifest import (
    MASKS_SCHEMA,
    QUALITY_SCHEMA,
    QUARANTINE_SCHEMA,
    SCHEMA,
    build_facts,
    build_manifest,
    check_masks,
    compute_facts_version,
    load_table,
    save_table,
)
from loupe.data.sources import LAYOUTS, list_images, name_source
from loupe.stages.entry import save_json
from loupe.stages.files import FACTS_MEMORY, LISTING, MANIFEST, MASKS, QUALITY, QUARANTINE

log = logging.getLogger(__name__)


def ingest(params: Params) -> None:
    root = Path(params.ingest.source)
    listing = list_images(root, params.ingest.layout)
    log.info("layout of %s: %s (%s)", root, listing.layout, LAYOUTS[listing.layout])
    if listing.left_out:
        named = ", ".join(listing.left_out[:3])
        log.warning("%d files have no place in this layout and are left out: %s", len(listing.left_out), named)
    version = f"{compute_facts_version()} {root.resolve()}"
    known = _recall(version)
    facts = build_facts(root, listing, known)
    save_table(facts.assign(version=version), FACTS_MEMORY)
    manifest, quality, quarantine = build_manifest(listing, facts)
    save_table(manifest, MANIFEST, SCHEMA)
    save_table(quality, QUALITY, QUALITY_SCHEMA)
    save_table(check_masks(root, manifest), MASKS, MASKS_SCHEMA)
    save_table(quarantine, QUARANTINE, QUARANTINE_SCHEMA)
    name = name_source(root) if params.ingest.name == "auto" else params.ingest.name
    counts = {"num_images": len(manifest), "num_quarantined": len(quarantine)}
    save_json({"name": name, "source": str(root), "layout": listing.layout, **counts}, LISTING)
    log.info("%d images in %d labels; %d files set aside", len(manifest), manifest["label"].nunique(), len(quarantine))
    for row in quarantine.head(5).itertuples():
        log.warning("set aside: %s %s", row.path, row.reason)


def _recall(version: str) -> pd.DataFrame | None:
    """Facts of an earlier run over the same folder by the same code."""
    if not FACTS_MEMORY.exists():
        return None
    facts = load_table(FACTS_MEMORY)
    return facts[facts["version"].eq(version)].drop(columns="version")

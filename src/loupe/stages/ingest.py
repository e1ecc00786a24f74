"""List and decode the images of the source folder into the manifest; set aside what can't be read."""

import logging
from pathlib import Path

from loupe.config import Params
from loupe.data.manifest import QUARANTINE_SCHEMA, SCHEMA, build_manifest, save_table
from loupe.data.sources import LAYOUTS, list_images, name_source
from loupe.stages.entry import run_stage, save_json
from loupe.stages.files import LISTING, MANIFEST, QUARANTINE

log = logging.getLogger(__name__)


def ingest(params: Params) -> None:
    root = Path(params.ingest.source)
    listing = list_images(root, params.ingest.layout)
    log.info("layout of %s: %s (%s)", root, listing.layout, LAYOUTS[listing.layout])
    manifest, quarantine = build_manifest(root, listing)
    save_table(manifest, MANIFEST, SCHEMA)
    save_table(quarantine, QUARANTINE, QUARANTINE_SCHEMA)
    name = name_source(root) if params.ingest.name == "auto" else params.ingest.name
    save_json(
        {
            "name": name,
            "source": str(root),
            "layout": listing.layout,
            "num_images": len(manifest),
            "num_quarantined": len(quarantine),
        },
        LISTING,
    )
    log.info("%d images in %d labels; %d files set aside", len(manifest), manifest["label"].nunique(), len(quarantine))


if __name__ == "__main__":
    run_stage(ingest)

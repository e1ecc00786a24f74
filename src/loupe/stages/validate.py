"""Check the manifest against the expectations; a critical failure stops the pipeline here."""

import logging
from dataclasses import asdict

from loupe.config import Params
from loupe.data.expectations import Limits, validate_images
from loupe.data.manifest import load_table
from loupe.errors import ValidationError
from loupe.stages.entry import run_stage, save_json
from loupe.stages.files import DATA_DOCS, MANIFEST, QUARANTINE, VALIDATION

log = logging.getLogger(__name__)


def validate(params: Params) -> None:
    section = params.validate_
    limits = Limits(section.min_side, section.max_side, section.max_aspect, section.max_bad_fraction)
    findings, result = validate_images(load_table(MANIFEST), load_table(QUARANTINE), limits, DATA_DOCS)
    save_json(
        {"success": result["success"], "findings": [asdict(finding) for finding in findings], "checkpoint": result},
        VALIDATION,
    )
    for finding in findings:
        log.info(
            "%s  %s",
            "ok  " if not finding.num_failing else finding.severity,
            finding.describe() if finding.num_failing else finding.sentence,
        )
    failed = [finding.describe() for finding in findings if finding.severity == "critical" and not finding.success]
    if failed:
        raise ValidationError(
            f"the images of {params.ingest.source} can't be trained on. {'. '.join(failed)}. "
            "Mend or remove these files, or change the limits under `validate` in params.yaml"
        )


if __name__ == "__main__":
    run_stage(validate)

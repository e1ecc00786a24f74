"""Write the augmentation policy of each kind of model as it will be used, and a contact sheet of it."""

import logging

from loupe.config import Params, Policy
from loupe.data.prepare import load_prepared
from loupe.data.sheets import draw_rows
from loupe.data.transforms import augment_versions, build_augmentation, choose_policy
from loupe.stages.entry import save_json
from loupe.stages.files import AUGMENT, CONTACT_SHEET, POLICY, PREPARED, SKIPPED

NUM_ORIGINALS, NUM_VERSIONS = 8, 7

log = logging.getLogger(__name__)


def augment(params: Params) -> None:
    for task in ("classifier", "detector"):
        if (PREPARED / task / SKIPPED).exists():
            continue
        prepared = load_prepared(PREPARED / task)
        name, specs = choose_policy(_read_policy(params, task), task, prepared.geometry)
        augmentation = build_augmentation(specs)
        train = prepared.index.loc[prepared.rows_of("train")]
        num_each = -(-NUM_ORIGINALS // train["label"].nunique())
        shown = train.groupby("label").head(num_each).index[:NUM_ORIGINALS]
        (AUGMENT / task).mkdir(parents=True, exist_ok=True)
        originals = prepared.images[shown.to_numpy()]
        rows = augment_versions(augmentation, originals, params.seed, NUM_VERSIONS)
        draw_rows(rows).save(AUGMENT / task / CONTACT_SHEET)
        save_json({"policy": name, "transforms": specs}, AUGMENT / task / POLICY)
        log.info("%s: policy %s (%s)", task, name, ", ".join(spec["name"] for spec in specs) or "no transforms")


def _read_policy(params: Params, task: str) -> Policy:
    """A detector in closed form knows images as they are, and nothing is overfitted by it."""
    policy: Policy = getattr(params.augment, task)
    return "none" if task == "detector" and policy == "auto" and params.train_detector.is_closed_form else policy

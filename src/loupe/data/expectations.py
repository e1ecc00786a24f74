"""What a set of images must satisfy, as a Great Expectations suite with a checkpoint, and its page for people."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")

import great_expectations as gx
import pandas as pd
from great_expectations.checkpoint import Checkpoint, UpdateDataDocsAction
from great_expectations.core import (
    ExpectationSuite,
    ExpectationValidationResult,
    ValidationDefinition,
)
from great_expectations.data_context.types.base import (
    DataContextConfig,
    InMemoryStoreBackendDefaults,
    ProgressBarsConfig,
)
from great_expectations.expectations import (
    ExpectColumnValuesToBeBetween,
    ExpectColumnValuesToBeInSet,
    ExpectColumnValuesToBeNull,
)
from great_expectations.expectations.expectation import ColumnMapExpectation
from great_expectations.expectations.metadata_types import FailureSeverity

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "I;16B", "I;16L")
NUM_NAMED = 5
DOCS_SITE = "data_docs"


@dataclass(frozen=True)
class Limits:
    """Sides in pixels; `max_bad_fraction` is the part of the files that may be unreadable."""

    min_side: int
    max_side: int
    max_aspect: float
    max_bad_fraction: float


@dataclass(frozen=True)
class Finding:
    """One expectation's result: `num_failing` images, the first of them named in `files` with what was found."""

    sentence: str
    severity: str
    success: bool
    num_failing: int
    files: list[str]

    def describe(self) -> str:
        """One sentence for a person."""
        hidden = self.num_failing - len(self.files)
        more = f" and {hidden} more" if hidden else ""
        return f"{self.sentence}: {self.num_failing} of the files fail this: {', '.join(self.files)}{more}"


def validate_images(
    manifest: pd.DataFrame, quarantine: pd.DataFrame, limits: Limits, docs_folder: Path
) -> tuple[list[Finding], Mapping[str, Any]]:
    """Run the suite on the manifest together with the quarantined files, and build Data Docs.

    Returns:
        A finding for each expectation, and the checkpoint's own result as JSON values.
    """
    context = gx.get_context(mode="ephemeral", project_config=_configure(docs_folder))
    batches = context.data_sources.add_pandas("images").add_dataframe_asset("manifest")
    batch = batches.add_batch_definition_whole_dataframe("all")
    suite = context.suites.add(ExpectationSuite(name="images", expectations=_build_expectations(limits)))
    validation = context.validation_definitions.add(ValidationDefinition(name="images", data=batch, suite=suite))
    checkpoint = context.checkpoints.add(
        Checkpoint(
            name="images",
            validation_definitions=[validation],
            actions=[UpdateDataDocsAction(name="docs", site_names=[DOCS_SITE])],
            result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["path"]},
        )
    )
    table = _add_computed_columns(manifest, quarantine)
    result = checkpoint.run(batch_parameters={"dataframe": table})
    (suite_result,) = result.run_results.values()
    return [_read_finding(one) for one in suite_result.results], result.describe_dict()


def _build_expectations(limits: Limits) -> list[ColumnMapExpectation]:
    stop, tell = FailureSeverity.CRITICAL, FailureSeverity.WARNING
    between, within = ExpectColumnValuesToBeBetween, ExpectColumnValuesToBeInSet
    small = f"Every image is at least {limits.min_side} pixels wide and high"
    large = f"Every image is at most {limits.max_side} pixels wide and high"
    long = f"No image is more than {limits.max_aspect:g} times as long as wide"
    mostly = round(1 - limits.max_bad_fraction, 9)  # 1 - 0.41 is not 0.59 in binary
    decodes, known = "Every file decodes as an image", "Every label of val and test is also a label of train"
    return [
        ExpectColumnValuesToBeNull(column="problem", mostly=mostly, severity=stop, notes=decodes),
        between(column="short_side", min_value=limits.min_side, severity=stop, notes=small),
        between(column="long_side", max_value=limits.max_side, severity=stop, notes=large),
        between(column="aspect", max_value=limits.max_aspect, severity=tell, notes=long),
        within(column="mode", value_set=list(MODES), severity=stop, notes="Every image has a known mode"),
        within(column="label_is_known", value_set=[True], severity=stop, notes=known),
        between(column="num_labels_of_content", max_value=1, severity=stop, notes="Every content has one label"),
    ]


def _add_computed_columns(manifest: pd.DataFrame, quarantine: pd.DataFrame) -> pd.DataFrame:
    sides = manifest[["width", "height"]]
    short, long = sides.min(axis=1), sides.max(axis=1)
    rows = manifest.assign(
        short_side=short,
        long_side=long,
        aspect=long / short,
        label_is_known=_is_label_known(manifest),
        num_labels_of_content=manifest.groupby("image_id")["label"].transform("nunique"),
        problem=None,
    )
    return pd.concat([rows, quarantine.rename(columns={"reason": "problem"})], ignore_index=True)


def _is_label_known(manifest: pd.DataFrame) -> pd.Series:
    """Where train holds one class alone, the rest are anomalies and need not be known."""
    in_train = set(manifest.loc[~manifest["given_split"].isin(["val", "test"]), "label"])
    return manifest["label"].isin(in_train) if len(in_train) > 1 else pd.Series(True, index=manifest.index)


def _configure(docs_folder: Path) -> DataContextConfig:
    """Everything in memory but Data Docs, which are written to `docs_folder`."""
    site = {
        "class_name": "SiteBuilder",
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs_folder.resolve())},
    }
    return DataContextConfig(
        store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
        data_docs_sites={DOCS_SITE: site},
        progress_bars=ProgressBarsConfig(globally=False),
    )


def _read_finding(result: ExpectationValidationResult) -> Finding:
    config = result.expectation_config
    assert config is not None  # results carry the expectation that they are of
    if result.exception_info.get("raised_exception"):
        raise RuntimeError(f"{config.notes}: {result.exception_info['exception_message']}")
    failing = sorted(result.result.get("unexpected_index_list") or [], key=lambda entry: entry["path"])
    return Finding(
        sentence=str(config.notes),
        severity=str(config.severity.value),
        success=bool(result.success),
        num_failing=len(failing),
        files=[_name_file(entry, config.kwargs["column"]) for entry in failing[:NUM_NAMED]],
    )


def _name_file(entry: dict[str, Any], column: str) -> str:
    value = entry[column]
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    subject = "" if column == "problem" else f"{column.replace('_', ' ')}: "
    return f"{entry['path']} ({subject}{shown})"

"""What a set of images must satisfy, as a Great Expectations suite with a checkpoint, and its page for people."""

import html
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")

import great_expectations as gx
import numpy as np
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

NUM_NAMED = 5
LEAST_DEVIATION = 1e-2  # of a grey value; less is nothing that an eye sees
DOCS_SITE = "data_docs"
QUALITIES = ("brightness", "contrast", "sharpness")
MAX_OFFSET = 6.0  # robust standard deviations; of normally distributed values, one in a thousand million is further off


@dataclass(frozen=True)
class Limits:
    """Sides in pixels; `min_images` is of a label that must be divided; `max_bad_fraction` of the files."""

    min_side: int
    max_side: int
    max_aspect: float
    min_contrast: float
    min_images: int
    max_bad_fraction: float


@dataclass(frozen=True)
class Images:
    """The tables of the ingest stage, and pairs of near-duplicates that the given splits part.

    `leaks` has first and second (paths), first_split and second_split.
    """

    manifest: pd.DataFrame
    quality: pd.DataFrame
    masks: pd.DataFrame
    quarantine: pd.DataFrame
    leaks: pd.DataFrame


@dataclass(frozen=True)
class Finding:
    """One expectation's result: `num_failing` images; `examples` are the first of them, with what was found of each."""

    sentence: str
    severity: str
    success: bool
    num_failing: int
    examples: dict[str, str]

    @property
    def mark(self) -> str:
        """`ok`, `warning` or `critical`. A few unreadable files may be borne: they are a warning."""
        if not self.num_failing:
            return "ok"
        return "warning" if self.success else self.severity

    @property
    def files(self) -> list[str]:
        """The examples, each with what was found of it."""
        return [f"{path} ({found})" for path, found in self.examples.items()]

    def describe(self) -> str:
        """One sentence for a person."""
        hidden = self.num_failing - len(self.examples)
        more = f" and {hidden} more" if hidden else ""
        return f"{self.sentence}: {self.num_failing} of the files fail this: {', '.join(self.files)}{more}"

    def to_json(self) -> dict[str, Any]:
        """Values for a file that people and programs read."""
        values = {name: getattr(self, name) for name in ("sentence", "severity", "success", "num_failing")}
        return {**values, "files": self.files}


def validate_images(rows: pd.DataFrame, limits: Limits, docs_folder: Path) -> tuple[list[Finding], Mapping[str, Any]]:
    """Run the suite on the manifest together with the quarantined files, and build Data Docs.

    Args:
        rows: from `describe_images`.

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
    safe = rows.assign(path=rows["path"].map(html.escape))  # Great Expectations writes it into its pages as it is
    result = checkpoint.run(batch_parameters={"dataframe": safe})
    (suite_result,) = result.run_results.values()
    return [_read_finding(one) for one in suite_result.results], result.describe_dict()


def _build_expectations(limits: Limits) -> list[ColumnMapExpectation]:
    stop, tell = FailureSeverity.CRITICAL, FailureSeverity.WARNING
    null, between, within = ExpectColumnValuesToBeNull, ExpectColumnValuesToBeBetween, ExpectColumnValuesToBeInSet
    decodes = f"Every file decodes as one image (up to {100 * limits.max_bad_fraction:g}% may be set aside)"
    small = f"Every image is at least {limits.min_side} pixels wide and high"
    large = f"Every image is at most {limits.max_side} pixels wide and high"
    long = f"No image is more than {limits.max_aspect:g} times as long as wide"
    few = f"Every label that must be divided has at least {limits.min_images} images"
    flat = f"No image is flat: its grey values deviate by at least {limits.min_contrast:g}"
    mostly = round(1 - limits.max_bad_fraction, 9)  # 1 - 0.41 is not 0.59 in binary
    labelled = "Every image has a label: those without can be scored, but not trained on"
    known = "Every label of val and test is also a label of train"
    parted = "Near-duplicates are not parted by the given splits"
    expectations = [
        null(column="problem", mostly=mostly, severity=stop, notes=decodes),
        between(column="short_side", min_value=limits.min_side, severity=stop, notes=small),
        between(column="long_side", max_value=limits.max_side, severity=stop, notes=large),
        between(column="aspect", max_value=limits.max_aspect, severity=tell, notes=long),
        within(column="has_label", value_set=[True], severity=stop, notes=labelled),
        within(column="label_is_known", value_set=[True], severity=stop, notes=known),
        between(column="num_images_of_label", min_value=limits.min_images, severity=stop, notes=few),
        between(column="num_labels_of_content", max_value=1, severity=stop, notes="Every content has one label"),
        null(column="mask_problem", severity=stop, notes="Every mask has its image's size and marks something"),
        null(column="near_duplicate", severity=tell, notes=parted),
        between(column="contrast", min_value=limits.min_contrast, severity=tell, notes=flat),
    ]
    for name in QUALITIES:
        sentence = f"No image is far off the rest in {name}"
        column = f"{name}_offset"
        expectations.append(
            between(column=column, min_value=-MAX_OFFSET, max_value=MAX_OFFSET, severity=tell, notes=sentence)
        )
    return expectations


def describe_images(images: Images) -> pd.DataFrame:
    """The table that the suite looks at: one row a file, with a column for each thing that is expected."""
    quality = images.quality.drop(columns="thumbnail").astype(dict.fromkeys(QUALITIES, np.float64))
    manifest = images.manifest.merge(quality, on="image_id", how="left")
    sides = manifest[["width", "height"]]
    short, long = sides.min(axis=1), sides.max(axis=1)
    masks, leaks = images.masks.set_index("path")["problem"], images.leaks
    neighbours = pd.Series([*leaks["second"], *leaks["first"]], [*leaks["first"], *leaks["second"]], dtype=object)
    rows = manifest.assign(
        short_side=short,
        long_side=long,
        aspect=long / short,
        has_label=manifest["label"].notna(),
        label_is_known=_is_label_known(manifest),
        num_images_of_label=_count_images_to_divide(manifest),
        num_labels_of_content=manifest.groupby("image_id")["label"].transform("nunique"),
        mask_problem=manifest["path"].map(masks),
        near_duplicate=manifest["path"].map(neighbours[~neighbours.index.duplicated()]),
        brightness_offset=_compute_offset(manifest["brightness"]),
        contrast_offset=_compute_offset(manifest["contrast"]),
        sharpness_offset=_compute_offset(np.log1p(manifest["sharpness"])),
        problem=None,
    )
    return pd.concat([rows, images.quarantine.rename(columns={"reason": "problem"})], ignore_index=True)


def _is_label_known(manifest: pd.DataFrame) -> pd.Series:
    """Where train holds one class alone, the rest are anomalies and need not be known."""
    in_train = manifest.loc[~manifest["given_split"].isin(["val", "test"]), "label"].unique()
    return manifest["label"].isin(in_train) if len(in_train) > 1 else pd.Series(True, index=manifest.index)


def _count_images_to_divide(manifest: pd.DataFrame) -> pd.Series:
    """Distinct contents of the image's label that are not in a given val or test; missing for those that are."""
    to_divide = manifest[~manifest["given_split"].isin(["val", "test"])]
    counts = to_divide.groupby("label")["image_id"].transform("nunique")
    return counts.reindex(manifest.index)


def _compute_offset(values: pd.Series) -> pd.Series:
    """Distance from the median in robust standard deviations: 1.4826 times the median absolute deviation.

    Where more than half of the values are equal there is no such scale, and no value is off.
    """
    deviation = 1.4826 * (values - values.median()).abs().median()
    return (values - values.median()) / deviation if deviation > LEAST_DEVIATION else values * 0


def list_worst(rows: pd.DataFrame, limits: Limits, num_images: int) -> pd.DataFrame:
    """The readable images that most deserve a look: columns path and reason.

    First those with a problem of their own, then those that are furthest off the rest.

    Args:
        rows: from `describe_images`.
    """
    rows = rows[rows["image_id"].notna()]
    offsets = rows[[f"{name}_offset" for name in QUALITIES]].set_axis(list(QUALITIES), axis=1)
    furthest = offsets.abs().max(axis=1)
    problems = {
        "two labels": rows["num_labels_of_content"] > 1,
        "its mask": rows["mask_problem"].notna(),
        "like one of another split": rows["near_duplicate"].notna(),
        "flat": rows["contrast"] < limits.min_contrast,
        **{f"far off in {name}": offsets[name].abs() > MAX_OFFSET for name in QUALITIES},
    }
    found = pd.DataFrame(problems)
    order = furthest.where(~found.iloc[:, : -len(QUALITIES)].any(axis=1), np.inf)[found.any(axis=1)]
    chosen = order.sort_values(ascending=False, kind="stable").index[:num_images]
    reasons = found.loc[chosen].idxmax(axis=1).astype("str")
    return pd.DataFrame({"path": rows.loc[chosen, "path"], "reason": reasons}).reset_index(drop=True)


def _configure(docs_folder: Path) -> DataContextConfig:
    """Everything in memory but Data Docs, which are written to `docs_folder`.

    Their page of the suite alone can't be left out: the others link to it.
    """
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
        examples={
            html.unescape(entry["path"]): _tell_value(entry, config.kwargs["column"]) for entry in failing[:NUM_NAMED]
        },
    )


def _tell_value(entry: dict[str, Any], column: str) -> str:
    value = entry[column]
    if column.endswith("_offset"):
        return f"{abs(value):.1f} deviations {'above' if value > 0 else 'below'} the median"
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    subject = "" if column == "problem" else f"{column.replace('_', ' ')}: "
    return f"{subject}{shown}"

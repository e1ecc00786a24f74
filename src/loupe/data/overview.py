"""What a page about the images tells: the tables of ingest and the findings, brought to plain values."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from loupe.data.expectations import Finding, Images

MOST_LABELS, MOST_QUARANTINED, MOST_PAIRS = 60, 200, 24  # rows that a page shows; it says how many more there are
SAMPLED_LABELS, SAMPLED_EACH = 12, 6
NAMED_REASONS = 3
SPLITS, NOT_GIVEN, NO_LABEL = ("train", "val", "test"), "not given", "no label"
MARKS = ("critical", "warning", "ok")

Row = dict[Hashable, Any]


@dataclass(frozen=True)
class Excerpt:
    """The first rows of a table, and how many more it has."""

    rows: list[Row]
    num_more: int


@dataclass(frozen=True)
class Overview:
    """`labels` has a number of images for each of `splits`; `sizes` are names, values and a path where one is meant."""

    verdict: str
    mark: str  # of the verdict: ok, warning or critical
    num_critical: int
    num_warnings: int
    num_contents: int
    num_quarantined: int
    num_leaks: int | None  # None where no splits are given
    findings: list[Finding]
    splits: list[str]
    labels: Excerpt
    sizes: list[tuple[str, str, str]]
    quarantine: Excerpt
    leaks: Excerpt
    worst: list[Row]
    samples: Excerpt
    pictured: list[str]  # paths of all images that are shown


def describe_data(images: Images, findings: Sequence[Finding], worst: pd.DataFrame) -> Overview:
    """Gather what the page shows; the same tables give the same page.

    Args:
        worst: from `list_worst`.
    """
    manifest = images.manifest.fillna({"label": NO_LABEL})
    counts = _count_images(manifest)
    leaks = _list_leaks(images)
    num_critical, num_warnings, _ = (sum(finding.mark == mark for finding in findings) for mark in MARKS)
    verdict, mark = _judge(findings)
    samples = _sample_labels(manifest, list(counts.index))
    named = [path for finding in findings for path in finding.examples]
    shown = leaks.head(MOST_PAIRS)
    sampled = [path for row in samples.rows for path in row["paths"]]
    pictured = {*named, *shown["first"], *shown["second"], *worst["path"], *sampled}
    return Overview(
        verdict=verdict,
        mark=mark,
        num_critical=num_critical,
        num_warnings=num_warnings,
        num_contents=manifest["image_id"].nunique(),
        num_quarantined=len(images.quarantine),
        num_leaks=len(leaks) if len(set(counts) & set(SPLITS)) > 1 else None,
        findings=sorted(findings, key=lambda finding: MARKS.index(finding.mark)),
        splits=list(counts.columns.drop("total")),
        labels=_excerpt(counts.reset_index(), MOST_LABELS),
        sizes=_describe_sizes(manifest) if len(manifest) else [],
        quarantine=_excerpt(images.quarantine.fillna({"label": NO_LABEL}), MOST_QUARANTINED),
        leaks=_excerpt(leaks, MOST_PAIRS),
        worst=worst.to_dict("records"),
        samples=samples,
        # What is in quarantine may be a link that leaves the folder, and is not opened.
        pictured=sorted(pictured & set(manifest["path"])),
    )


def _excerpt(table: pd.DataFrame, num_rows: int) -> Excerpt:
    return Excerpt(table.head(num_rows).to_dict("records"), max(0, len(table) - num_rows))


def _judge(findings: Sequence[Finding]) -> tuple[str, str]:
    """Whether the images can be trained on, and why not, in one sentence; and the mark of that."""
    failing = [finding for finding in findings if finding.mark == "critical"]
    num_warnings = sum(finding.mark == "warning" for finding in findings)
    if failing:
        reasons = [f"{_count_files(one.num_failing)} “{one.sentence}”" for one in failing[:NAMED_REASONS]]
        hidden = len(failing) - NAMED_REASONS
        reasons += [f"{hidden} more critical expectations fail"] if hidden > 0 else []
        return f"These images can’t be trained on: {'; '.join(reasons)}.", "critical"
    if num_warnings:
        deserve = "1 warning deserves" if num_warnings == 1 else f"{num_warnings} warnings deserve"
        return f"These images can be trained on; {deserve} a look.", "warning"
    return f"These images can be trained on: all {len(findings)} expectations are met.", "ok"


def _count_files(num_failing: int) -> str:
    return "1 file fails" if num_failing == 1 else f"{num_failing:,} files fail"


def _count_images(manifest: pd.DataFrame) -> pd.DataFrame:
    """A row a label, the most frequent first; a column a given split, and their total."""
    splits = manifest["given_split"].fillna(NOT_GIVEN)
    counts = pd.crosstab(manifest["label"], splits)
    counts = counts[[split for split in (*SPLITS, NOT_GIVEN) if split in counts]]
    return counts.assign(total=counts.sum(axis=1)).sort_values("total", ascending=False, kind="stable")


def _describe_sizes(manifest: pd.DataFrame) -> list[tuple[str, str, str]]:
    width, height = manifest["width"], manifest["height"]
    pixels, aspect = width.astype("int64") * height, width / height
    smallest, largest = (manifest.iloc[int(place)] for place in (pixels.argmin(), pixels.argmax()))
    modes = manifest["mode"].value_counts()
    bits = manifest["bits"].max()
    depth = "" if pd.isna(bits) else f"of 16-bit files, {bits:.0f} bits hold values"
    copies, masks = len(manifest) - manifest["image_id"].nunique(), manifest["mask_path"].notna().sum()
    return [
        ("median size", f"{width.median():.0f} × {height.median():.0f} px", ""),
        ("smallest", f"{smallest['width']} × {smallest['height']} px", smallest["path"]),
        ("largest", f"{largest['width']} × {largest['height']} px", largest["path"]),
        ("width to height", f"{aspect.min():.2f} to {aspect.max():.2f}, median {aspect.median():.2f}", ""),
        ("pixel format", ", ".join(f"{mode} {number:,}" for mode, number in modes.items()), depth),
        ("on disk", f"{manifest['num_bytes'].sum() / 1e6:,.1f} MB", ""),
        ("copies", f"{copies:,} files have the content of another" if copies else "none", ""),
        ("masks", f"{masks:,} images have one" if masks else "none", ""),
    ]


def _list_leaks(images: Images) -> pd.DataFrame:
    """Pairs that given splits part, with `kind`: copies, members of one group, and those that look alike.

    What is trained on stands first.
    """
    manifest, leaks = images.manifest, images.leaks
    given = manifest.dropna(subset="given_split").drop_duplicates(["image_id", "given_split"])
    given = given.rename(columns={"given_split": "split", "path": "file"})[["image_id", "file", "split"]]
    copies = given.drop_duplicates("image_id").merge(given, on="image_id", suffixes=("_first", "_second"))
    copies = copies[copies["split_first"].ne(copies["split_second"])].set_axis(
        ["image_id", "first", "first_split", "second", "second_split"], axis=1
    )
    groups = manifest.dropna(subset="group").set_index("path")["group"]
    in_one = leaks["first"].map(groups).eq(leaks["second"].map(groups))
    kinds = in_one.map({True: "of one group", False: "look alike"})
    pairs = pd.concat([copies.assign(kind="the same file"), leaks.assign(kind=kinds)], ignore_index=True)
    turned = pairs["first_split"].map(SPLITS.index) > pairs["second_split"].map(SPLITS.index)
    swap = {"first": "second", "second": "first", "first_split": "second_split", "second_split": "first_split"}
    return pd.concat([pairs[~turned], pairs[turned].rename(columns=swap)]).sort_index()


def _sample_labels(manifest: pd.DataFrame, labels: Sequence[str]) -> Excerpt:
    """Some images of each label, the first by image_id."""
    rows = manifest.sort_values(["image_id", "path"]).drop_duplicates("image_id")
    first = rows.groupby("label").head(SAMPLED_EACH).groupby("label")["path"].agg(list)
    shown: list[Row] = [{"label": label, "paths": first[label]} for label in labels[:SAMPLED_LABELS] if label in first]
    return Excerpt(shown, max(0, len(labels) - SAMPLED_LABELS))

"""What the quality audit says: findings, a table of every image's numbers, pictures of the worst."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.dataset.images import thumbnail
from components.dataset.quality import CHECKS
from components.dataset.quality.check import Check
from components.dataset.quality.judge import SMALL, Verdict, judge
from components.step import StepContext

if TYPE_CHECKING:
    import duckdb
    from numpy.typing import NDArray

WORST = 10  # images that a report names one by one
SHEET = 12  # images of a contact sheet
APART = 0.15  # of two splits: how far the chance that one's image is worse may lie from even
BEYOND_CHANCE = 5.0  # standard deviations
SPLITS = ("train", "val", "test", "unlabeled")


@dataclass(frozen=True)
class Images:
    """The clean images that were opened, and the measures of each: float64 [n, checks]."""

    paths: NDArray[np.object_]
    names: NDArray[np.object_]
    labels: NDArray[np.int64]
    splits: NDArray[np.str_]
    sources: NDArray[np.str_]
    measures: NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """A check's verdict on Images, and where the named ones stand, the worst first."""

    check: Check
    verdict: Verdict
    worst: NDArray[np.int64]


def audit(run: StepContext, db: duckdb.DuckDBPyConnection, out: Path) -> Callable[[str], None] | None:
    """Judge every clean image that was opened; ``quality.parquet`` holds all numbers.

    Reads the tables ``seen``, ``m`` and ``bad`` of the step, adds to ``cases``.

    Returns:
        What shows the worst images on the step's page, given ``data.root``; None without any image.
    """
    table = db.sql(
        """select row, m.path, coalesce(m.label, -1)::bigint as label,
            coalesce(m.class_name, m.label::varchar, '') as class_name, m.split, m.source, seen.quality
        from seen join m using (row) where seen.rule = '' and row not in (select row from bad) order by row"""
    ).to_arrow_table()
    if not table.num_rows:
        return None
    blobs = b"".join(table["quality"].to_pylist())
    measures = np.frombuffer(blobs, np.float32).reshape(-1, len(CHECKS)).astype(np.float64)
    text = [table[name].to_numpy() for name in ("path", "class_name", "split", "source")]
    images = Images(
        text[0], text[1], table["label"].to_numpy(), text[2].astype(str), text[3].astype(str), measures
    )
    sources = np.unique(images.sources, return_inverse=True)[1]
    found = []
    for place, check in enumerate(CHECKS):
        verdict = judge(check, measures[:, place], images.labels, sources)
        excess = check.badness(measures[:, place]) - check.badness(verdict.limits)
        named = np.flatnonzero(verdict.named)
        found.append(Found(check, verdict, named[np.argsort(-excess[named], kind="stable")]))
    for place, one in enumerate(found):
        _exceptions(run, images, one, place)
        _common(run, images, one, place)
    _splits(run, images)
    _add_cases(db, images, found, table["row"])
    _write(images, found, out)

    def show(root: str) -> None:
        _show(run, images, found, root)

    return show


def _said(one: Found, images: Images, place: int, index: int) -> str:
    value, limit = images.measures[index, place], one.verdict.limits[index]
    return f"{images.paths[index]} ({value:.3g}, limit {limit:.3g})"


def _exceptions(run: StepContext, images: Images, one: Found, place: int) -> None:
    alone = one.worst[~one.verdict.common[one.worst]]
    if not len(alone):
        return
    check, values = one.check, images.measures[:, place]
    shown = "; ".join(_said(one, images, place, index) for index in alone[:3])
    run.add_finding(
        check.rule, "warning", ", ".join(images.paths[alone[:WORST]]),
        f"{len(alone):,} of {len(values):,} {check.what}: {shown}{' and others' if len(alone) > 3 else ''}. "
        f"Measured: {check.number} (median {np.median(values):.3g}). All of them: findings.parquet.",
        measured=len(alone), limit=0, advice=check.advice,
    )  # fmt: skip


def _common(run: StepContext, images: Images, one: Found, place: int) -> None:
    """Too many to be exceptions: a property of the data, or a fault that struck them all."""
    common = np.flatnonzero(one.verdict.common)
    if not len(common):
        return
    check, values = one.check, images.measures[:, place]
    labels, counts = np.unique(images.labels[common], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:WORST]
    classes = [_class_name(images, labels[position]) for position in order]
    inside = f"{(images.labels == labels[order[0]]).sum():,} images of {classes[0]}"
    rest = values[~one.verdict.named]
    beside = f", that of all others {np.median(rest):.3g}" if len(rest) else ""
    run.add_finding(
        check.rule, "info", ", ".join(classes),
        f"{len(common):,} {check.what}, but these are no exceptions: {counts[order[0]]:,} of "
        f"{inside}{', ...' if len(labels) > 1 else ''}. Measured: {check.number}; "
        f"their median is {np.median(values[common]):.3g}{beside}. Whether they are like that, or one fault "
        "has struck them all, cannot be known from the images. All of them: findings.parquet.",
        measured=len(common) / len(values), limit=0.0,
        advice="Look at some of them: a night class is dark, a misfocused camera is not a class.",
    )  # fmt: skip


def _class_name(images: Images, label: int) -> str:
    if label < 0:
        return "unlabelled images"
    return f"class '{images.names[np.argmax(images.labels == label)]}'"


def _splits(run: StepContext, images: Images) -> None:
    """Splits whose real images differ as a whole: one judges other pictures than were learnt from."""
    from scipy.stats import mannwhitneyu

    real = images.sources == "real"
    train = real & (images.splits == "train")
    for split in ("val", "test"):
        held = real & (images.splits == split)
        if min(train.sum(), held.sum()) < SMALL:
            continue
        for place, check in enumerate(CHECKS):
            one, other = images.measures[held, place], images.measures[train, place]
            pairs = len(one) * len(other)
            share = float(mannwhitneyu(one, other, method="asymptotic").statistic) / pairs
            deviation = np.sqrt((len(one) + len(other) + 1) / 12 / pairs)
            if abs(share - 0.5) > max(APART, BEYOND_CHANCE * deviation):
                run.add_finding(
                    "quality.splits", "info", f"split '{split}'",
                    f"The images of '{split}' differ from those of 'train': {check.number}, in the middle "
                    f"{np.median(one):.3g} against {np.median(other):.3g}.",
                    measured=round(share, 3), limit=[0.5 - APART, 0.5 + APART],
                    advice="Scores there are for other pictures than were learnt from: if that is not meant, "
                    "let ingest split.",
                )  # fmt: skip


def _add_cases(db: duckdb.DuckDBPyConnection, images: Images, found: list[Found], rows: pa.Table) -> None:
    """Every named image, for findings.parquet."""
    numbers = rows.to_numpy()
    for place, one in enumerate(found):
        if not len(one.worst):
            continue
        values, limits = images.measures[:, place], one.verdict.limits
        more = np.where(one.verdict.common, ", as many others", "")
        batch = pa.table(  # noqa: F841 - read by DuckDB
            {
                "rule": [one.check.rule] * len(one.worst),
                "row": numbers[one.worst],
                "path": list(images.paths[one.worst]),
                "other": [""] * len(one.worst),
                "detail": [
                    f"{values[index]:.3g}, limit {limits[index]:.3g}{more[index]}" for index in one.worst
                ],
            }
        )
        db.execute("insert into cases select * from batch")


def _write(images: Images, found: list[Found], out: Path) -> None:
    """``quality.parquet``: every image's numbers, and which checks name it."""
    short = [one.check.rule.split(".")[1] for one in found]
    named = np.stack([one.verdict.named for one in found], axis=1)
    columns = {
        "path": pa.array(images.paths, pa.string()),
        "label": images.labels.astype(np.int32),
        "split": images.splits.astype(object),
        "source": images.sources.astype(object),
        **{name: images.measures[:, place].astype(np.float32) for place, name in enumerate(short)},
        **{f"is_{name}": named[:, place] for place, name in enumerate(short)},
    }
    pq.write_table(pa.table(columns), out / "quality.parquet", compression="zstd")


def _show(run: StepContext, images: Images, found: list[Found], root: str) -> None:
    if not any(one.verdict.named.any() for one in found):
        return
    there = [split for split in SPLITS if (images.splits == split).any()]
    rows = [
        [one.check.what.removeprefix("images "), int(one.verdict.named.sum())]
        + [f"{one.verdict.named[images.splits == split].mean():.2%}" for split in there]
        + [_worst_class(images, one)]
        for one in found
    ]
    run.page.table(
        "Image quality",
        ["images that", "named", *there, "most in"],
        rows,
        note="Limits come from the data's own distribution, between two fixed bounds (docs/rules.md). Every "
        "image's numbers: quality.parquet.",
    )
    if not run.params.report.thumbnails:
        return
    for place, one in enumerate(found):
        # exceptions first; of what is common a few
        alone = one.worst[~one.verdict.common[one.worst]]
        chosen = np.r_[alone, one.worst[one.verdict.common[one.worst]]][:SHEET]
        if len(chosen):
            run.page.images(
                f"The worst of {len(one.worst):,}: {one.check.what}",
                [
                    (thumbnail(root, images.paths[index]), _said(one, images, place, index))
                    for index in chosen
                ],
                note=f"In brackets: {one.check.number}.",
            )


def _worst_class(images: Images, one: Found) -> str:
    """The class with the largest share of named images."""
    if not one.verdict.named.any():
        return ""
    labels, places = np.unique(images.labels, return_inverse=True)
    shares = np.bincount(places, one.verdict.named) / np.bincount(places)
    worst = int(np.argmax(shares))
    return f"{_class_name(images, labels[worst])} ({shares[worst]:.1%})"

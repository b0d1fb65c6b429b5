"""The images that the probe looks at: which rows, and their features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from components.audit.counts import Counts, view
from components.audit.features import Extractor, extract, gradients
from components.audit.params import AuditParams
from components.audit.probe import compressed, standardised
from components.dataset.database import database
from components.step import StepContext

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_CLASSES = 2_000  # beyond it a probe has too few images a class to say anything


@dataclass(frozen=True)
class Rows:
    """Labelled images; ``place`` is the position of a row's class in ``Counts``.

    Attributes:
        vectors: float64 [n, D], principal components of features and gradients.
        small: uint8 [n, SIDE, SIDE], the images in grey.
    """

    path: list[str]
    place: NDArray[np.int64]
    split: NDArray[np.object_]
    source: NDArray[np.object_]
    vectors: NDArray[np.float64]
    small: NDArray[np.uint8]

    @property
    def real(self) -> NDArray[np.bool_]:
        return self.source == "real"

    @property
    def judging(self) -> NDArray[np.bool_]:
        """Real images that synthetic ones are judged by. The test split decides nothing."""
        return self.real & (self.split != "test")


def look(
    run: StepContext, params: AuditParams, manifest: Path, features: Path, counts: Counts
) -> Rows | None:
    """The rows and their features; None, and an info that says why, when there is no use in looking.

    Raises:
        RetortError: ``features`` is no backbone of ours, or a store cannot be reached.
    """
    if len(counts.labels) > MOST_CLASSES:
        _skipped(
            run, f"there are {len(counts.labels):,} classes, and it tells at most {MOST_CLASSES:,} apart"
        )
        return None
    table = select(manifest, params.audit.probe_images)
    paths, hashes = table["path"].to_pylist(), table["sha256"].to_pylist()
    if any("://" in path and digest is None for path, digest in zip(paths, hashes, strict=True)):
        _skipped(run, "remote images have no hashes, so every run would fetch them anew")
        return None
    found = extract(Extractor(features), params.data.root, paths, hashes)
    keep = found.readable
    if not keep.any():
        _skipped(run, f"none of {len(paths):,} images below data.root ({params.data.root}) can be read")
        return None
    _say_how_many(run, params, counts, len(paths), int(keep.sum()))
    table = table.filter(pa.array(keep))
    split, source = (table[name].to_numpy(zero_copy_only=False) for name in ("split", "source"))
    usual = (source == "real") & (split == "train")
    if not usual.any():
        _skipped(run, "there is no real training image to learn from")
        return None
    blocks = (found.deep[keep], gradients(found.small[keep]))
    vectors = np.hstack([standardised(block, usual) for block in blocks])
    return Rows(
        path=table["path"].to_pylist(),
        place=np.searchsorted(counts.labels, table["label"].to_numpy()),
        split=split,
        source=source,
        vectors=compressed(vectors, usual),
        small=found.small[keep],
    )


def _skipped(run: StepContext, why: str) -> None:
    run.add_finding(
        "synthetic.probe", "info", "probe",
        f"The probe was skipped: {why}. Recognisability, degradation, domain gap and suspect labels are "
        "not known.",
        row="4.1",
    )  # fmt: skip


def _say_how_many(run: StepContext, params: AuditParams, counts: Counts, chosen: int, read: int) -> None:
    total = int(counts.total.sum() + counts.val.sum() + counts.test.sum())
    if read == total:
        return
    how = ""
    if chosen < total:
        how = f" (audit.probe_images: {params.audit.probe_images:,}), evenly over the classes"
    if read < chosen:
        how += f"; {chosen - read:,} could not be read"
    run.add_finding(
        "synthetic.probe", "info", "images",
        f"The probe looked at {read:,} of {total:,} labelled images{how}.",
        measured=read, limit=total, row="4.1",
    )  # fmt: skip


def select(manifest: Path, limit: int) -> pa.Table:
    """Labelled rows (path, label, split, source, sha256), in the manifest's order: all, or at most ``limit``.

    Each split gets its part of the limit. Of its classes and sources the same number is taken, as far as
    they have so many, but one at least; which rows follows from the paths alone. So the labels of one split
    say nothing about which rows of another are looked at.
    """
    with database(manifest) as db:
        view(db, manifest)
        found = db.execute("select split, count(*) from m group by label, split, source").fetchall()
        sizes: dict[str, list[int]] = {}
        for split, count in found:
            sizes.setdefault(split, []).append(count)
        total = sum(map(sum, sizes.values()))
        most = {
            split: _most(np.array(groups), sum(groups) if total <= limit else sum(groups) * limit // total)
            for split, groups in sizes.items()
        }
        quoted = {split.replace("'", "''"): number for split, number in sorted(most.items())}
        cases = " ".join(f"when '{split}' then {number}" for split, number in quoted.items())
        return db.sql(
            f"""select path, label, split, source, sha256 from m
            qualify row_number() over (partition by label, split, source order by md5(path), row)
            <= case split {cases} end order by row"""  # noqa: S608
        ).to_arrow_table()


def _most(sizes: NDArray[np.int64], limit: int) -> int:
    """The largest number a group, 1 at least, by which groups of these sizes keep to the limit."""
    least, most = 1, int(sizes.max())
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if np.minimum(sizes, middle).sum() <= limit else (least, middle - 1)
    return least

"""How many images each class has, by split and source: exact, at any size of the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from components.common.errors import RetortError
from components.dataset import manifest as manifests
from components.dataset.database import database

if TYPE_CHECKING:
    import duckdb
    from numpy.typing import NDArray

SOURCES = manifests.SOURCES  # the order of the columns of ``train``


@dataclass(frozen=True)
class Counts:
    """Images by class; position c of every array is the class ``labels[c]``, called ``names[c]``.

    Attributes:
        labels: int64 [C], ascending: those that occur in train, val or test.
        train: int64 [C, 3], training images by source (real, synthetic, semi_synthetic).
        val, test: int64 [C].
    """

    labels: NDArray[np.int64]
    names: list[str]
    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]

    @property
    def total(self) -> NDArray[np.int64]:
        """Training images, int64 [C]."""
        return self.train.sum(axis=1)

    @property
    def made(self) -> NDArray[np.int64]:
        """Synthetic and semi-synthetic training images, int64 [C]."""
        return self.train[:, 1:].sum(axis=1)


def view(db: duckdb.DuckDBPyConnection, manifest: Path) -> None:
    """Make the labelled rows of a manifest visible as ``m``, with their number as ``row``."""
    source = str(manifest).replace("'", "''")  # a view takes no parameters
    db.execute(
        "create view m as select file_row_number as row, * exclude (file_row_number) "  # noqa: S608
        f"from read_parquet('{source}', file_row_number = true) where split <> 'unlabeled' and label >= 0"
    )


def count(manifest: Path) -> Counts:
    """Read the labels, splits and sources of a manifest; nothing of its size stays in memory.

    Raises:
        RetortError: when it is no manifest, or has no training image.
    """
    manifests.check(manifest)
    with database(manifest) as db:
        view(db, manifest)
        found = db.sql(
            "select label, split, source, count(*) as rows, min(class_name) as name "
            "from m group by label, split, source"
        ).to_arrow_table()
    labels, place = np.unique(found["label"].to_numpy(), return_inverse=True)
    rows = found["rows"].to_numpy()
    of_split = found["split"].to_numpy(zero_copy_only=False)
    of_source = found["source"].to_numpy(zero_copy_only=False)
    train = np.zeros((len(labels), len(SOURCES)), np.int64)
    for column, source in enumerate(SOURCES):
        chosen = (of_split == "train") & (of_source == source)
        train[place[chosen], column] = rows[chosen]
    held = {}
    for split in ("val", "test"):
        chosen = of_split == split
        held[split] = np.bincount(place[chosen], weights=rows[chosen], minlength=len(labels)).astype(np.int64)
    if not train.any():
        raise RetortError(f"{manifest}: no row is in the split 'train'; see what 'retort validate' put aside")
    names = [str(label) for label in labels]
    for c, name in zip(place.tolist(), found["name"].to_pylist(), strict=True):
        names[c] = name or names[c]
    return Counts(labels.astype(np.int64), names, train, held["val"], held["test"])

"""Splits of rows whose source has none: by content, whole groups, real images alone."""

from __future__ import annotations

import hashlib

import pyarrow as pa
import pyarrow.compute as pc

from components.dataset.columns import Columns, by_value, equals, kept, put
from components.dataset.params import Data
from components.dataset.splits import splits_of
from components.dataset.tally import Tally


def assign_splits(columns: Columns, data: Data, given: set[str | None], tally: Tally) -> Columns:
    """Real images into splits where the source has none; others are for training alone.

    Synthetic images of a group whose real ones are held out are left out: training on them would part the
    group, and only real images judge.
    """
    whole = not given or given == {"train"}
    split, source = columns["split"], columns["source"]
    free, real = equals(split, "unlabeled"), pc.equal(source, "real")
    judging = pc.is_in(split, pa.array(["val", "test"]))
    tally.moved += pc.sum(pc.and_(judging, pc.invert(pc.or_(real, free)))).as_py() or 0
    left = pc.is_null(split)
    hashed = whole or "val" not in given  # else real images stand where the source says
    if hashed:
        left = pc.or_(left, equals(split, "train"))
    beside = pc.and_(pc.and_(left, pc.invert(real)), pc.is_in(columns["group"], tally.real_groups))
    beside = pc.and_(beside, pa.scalar(hashed))
    left = pc.or_(pc.and_(left, real), beside)
    result = pc.if_else(pc.or_(free, real), split, "train")
    if not pc.any(left).as_py():
        return {**columns, "split": result}
    # a group goes by its name, so that it stays where it is when images join it
    group = by_value(columns["group"], _digest, pa.string())
    digest = pc.coalesce(group, columns["sha256"]).filter(left)
    assigned = put(
        pa.array(["train"] * len(digest)), digest.is_valid(), splits_of(digest.drop_null(), data.splits)
    )
    if not whole:  # its own test split stays as it is
        training = equals(split.filter(left), "train")
        assigned = put(assigned, pc.and_(training, equals(assigned, "test")), "train")
    columns = {**columns, "split": put(result, left, assigned)}
    held = pc.and_(beside, pc.not_equal(columns["split"], "train"))
    if not pc.any(held).as_py():
        return columns
    tally.held_out += columns["path"].filter(held).to_pylist()
    return kept(columns, pc.invert(held))


def _digest(group: str) -> str | None:
    return hashlib.sha256(group.encode()).hexdigest() if group else None

"""Which rows an epoch draws, in which order, and which worker takes which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.audit.plan import Plan
from components.common.errors import RetortError


@dataclass(frozen=True)
class Draw:
    """One worker's share of one step.

    Attributes:
        rows, views: int64 [B].
        total: rows of all workers in this step.
    """

    rows: np.ndarray
    views: np.ndarray
    total: int


def generator(*key: int) -> np.random.Generator:
    """A generator that depends on ``key`` alone: nothing that ran before changes what it draws."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def training_rows(table: pa.Table, plan: Plan) -> np.ndarray:
    """Row numbers int64 of the split ``train``, without those that the plan leaves out.

    Raises:
        RetortError: when nothing is left to train on.
    """
    keep = pc.equal(table["split"], "train")
    if plan.leave_out:
        left_out = pa.array([row.path for row in plan.leave_out], pa.string())
        keep = pc.and_(keep, pc.invert(pc.is_in(table["path"], left_out)))
    rows = np.flatnonzero(keep.to_numpy(zero_copy_only=False))
    if not len(rows):
        raise RetortError("no training rows are left: the plan leaves out all of them (or there were none)")
    return rows


def weights(table: pa.Table, rows: np.ndarray, plan: Plan) -> np.ndarray:
    """How often each row is to be drawn, float64 [rows], as the plan says: by class times by source.

    Raises:
        RetortError: when a weight is negative, or all are zero.
    """
    labels = table["label"].to_numpy()[rows]
    result = _of_labels(plan.sampling.by_class, labels)
    by_source: dict[str, dict[int, float]] = {}
    for label, of_label in plan.sampling.by_source.items():
        for source, weight in of_label.items():
            by_source.setdefault(source, {})[label] = weight
    for source, by_label in by_source.items():
        chosen = pc.equal(table["source"], source).to_numpy(zero_copy_only=False)[rows]
        result[chosen] *= _of_labels(by_label, labels[chosen])
    if not np.isfinite(result).all() or (result < 0).any():
        raise RetortError("plan: sampling: a weight is negative or not a number")
    if not result.any():
        raise RetortError("plan: sampling: all weights are zero, so there is nothing to draw")
    return result


def _of_labels(weights: Mapping[int, float], labels: np.ndarray) -> np.ndarray:
    """The weight of each label, float64 [n]; 1.0 where none is given."""
    by_label = np.ones(int(labels.max(initial=0)) + 1)
    for label, weight in weights.items():
        if 0 <= label < len(by_label):
            by_label[label] = weight
    return by_label[labels]


def draw(weights: np.ndarray, count: int, *key: int) -> np.ndarray:
    """``count`` positions, int64, each as often as its share of the weights says.

    Systematic sampling: a position whose expected number of draws is 2.3 comes two or three times, never
    once or five times, and equal weights with ``count = len(weights)`` take each position exactly once.
    """
    rng = generator(*key)
    order = rng.permutation(len(weights))  # so that no two neighbours share their fate in every epoch
    reach = np.cumsum(weights[order] * (count / weights.sum()))
    picked = np.searchsorted(reach, np.arange(count) + rng.uniform(), side="right")
    return order[np.minimum(picked, len(order) - 1)]


def spread(labels: np.ndarray, *key: int) -> np.ndarray:
    """An order of positions, int64, in which every stretch holds the classes in their overall shares.

    So the wanted distribution holds within a minibatch too, not only over an epoch: the k-th image of a
    class of n comes at about (k + u) / n of the way, with one random u a class.
    """
    rng = generator(*key)
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, starts, inverse, counts = np.unique(
        labels[by_class], return_index=True, return_inverse=True, return_counts=True
    )
    place = np.arange(len(labels)) - starts[inverse]
    at = (place + rng.uniform(size=len(counts))[inverse]) / counts[inverse]
    return by_class[np.argsort(at, kind="stable")]


def steps_per_epoch(count: int, batch_size: int, workers: int) -> int:
    """Steps that take ``count`` rows with at most ``batch_size`` rows a worker."""
    return -(-count // (batch_size * workers))


def batches(rows: np.ndarray, batch_size: int, workers: int, rank: int) -> list[tuple[np.ndarray, int]]:
    """One worker's batches of an epoch, each with the number of rows that all workers take in that step.

    Over all workers every entry of ``rows`` is taken once: none is dropped to fill the last batch, none
    repeated. Batches of one epoch differ by at most one row, so none is too small for its batch norms.

    Raises:
        RetortError: when there are fewer than two rows a worker and step.
    """
    if len(rows) < 2 * workers:
        raise RetortError(f"{len(rows)} training rows are too few for {workers} Ray workers")
    steps = np.array_split(rows, steps_per_epoch(len(rows), batch_size, workers))
    return [(np.array_split(step, workers)[rank], len(step)) for step in steps]

"""Which rows an epoch draws, in which order, in which view, and which worker takes which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from components.audit.plan_schema import Plan
from components.common.errors import RetortError

BLOCK = 1_000_000  # rows that are drawn and put in order at once: 0.4 s, however many rows there are
STREAM = 10_000  # between the epochs of two streams: more than a network has
AGAIN = 1_000_000  # between the views of a row that is drawn twice in an epoch: more than there are epochs

# what a random stream is for: part of its key, so that no two uses share their numbers
DRAW, ORDER, NOISE, INITIAL, BLOCKS, SOME = range(6)


class Columns(Protocol):
    """What sampling asks of a manifest; ``inputs.index.Index`` is one."""

    @property
    def labels(self) -> np.ndarray:
        """Integers [rows]; -1 where there is none."""

    @property
    def sources(self) -> np.ndarray:
        """Small integers [rows], places in ``source_names``."""

    @property
    def source_names(self) -> Sequence[str]:
        """Such as real and synthetic."""

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of one split, ascending."""

    def find(self, paths: Sequence[str]) -> np.ndarray:
        """Row numbers of those of the paths that are there."""


@dataclass(frozen=True)
class Mixture:
    """What is mixed into each of B pictures.

    Attributes:
        partners: rows int64 [B], each shown in the view of the row that it is mixed into.
        share: what a picture keeps of itself, float32 [B].
        boxes: int64 [B, 4]: top, left, bottom, right of what comes from the partner; empty: all is blended.
    """

    partners: np.ndarray
    share: np.ndarray
    boxes: np.ndarray


@dataclass(frozen=True)
class Draw:
    """One worker's share of one step.

    Attributes:
        rows, views: int64 [B].
        total: rows of all workers in this step.
        mixture: where pictures come mixed; None: each as it is.
    """

    rows: np.ndarray
    views: np.ndarray
    total: int
    mixture: Mixture | None = None

    def pictures(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and views of all pictures that it takes, int64 [B], or [2 B] with the partners'."""
        if self.mixture is None:
            return self.rows, self.views
        return np.concatenate([self.rows, self.mixture.partners]), np.tile(self.views, 2)

    def part(self, first: int, last: int) -> Draw:
        """Some of its rows, of the same step."""
        here, mixture = slice(first, last), self.mixture
        if mixture is not None:
            mixture = Mixture(mixture.partners[here], mixture.share[here], mixture.boxes[here])
        return Draw(self.rows[here], self.views[here], self.total, mixture)


def generator(*key: int) -> np.random.Generator:
    """A generator that depends on ``key`` alone: nothing that ran before changes what it draws."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def some(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most so many of the rows, int64 ascending: the same ones each time."""
    if len(rows) > most:
        rows = rows[np.sort(generator(seed, SOME).choice(len(rows), most, replace=False))]
    return np.asarray(rows, dtype=np.int64)


def in_order(rows: np.ndarray, batch_size: int, view: int) -> Iterator[Draw]:
    """One view of each row, in their order."""
    for start in range(0, len(rows), batch_size):
        part = np.asarray(rows[start : start + batch_size], dtype=np.int64)
        yield Draw(part, np.full(len(part), view), len(part))


def training_rows(columns: Columns, plan: Plan) -> np.ndarray:
    """Row numbers of the split ``train``, without those that the plan leaves out.

    Raises:
        RetortError: when nothing is left to train on.
    """
    rows = columns.rows("train")
    if plan.leave_out:
        out = columns.find([row.path for row in plan.leave_out])
        rows = rows[~np.isin(rows, out)]
    if not len(rows):
        raise RetortError("no training rows are left: the plan leaves out all of them (or there were none)")
    return rows


class Weights:
    """How often each row is to be drawn, as the plan says: by class times by source.

    Raises:
        RetortError: when a weight is negative, or all are zero.
    """

    def __init__(self, columns: Columns, rows: np.ndarray, plan: Plan) -> None:
        self._columns = columns
        sizes = np.zeros(1, dtype=np.int64)
        parts = range(0, len(rows), BLOCK)
        for start in parts:
            labels = columns.labels[rows[start : start + BLOCK]]
            sizes = np.bincount(labels, minlength=len(sizes)) + np.pad(
                sizes, (0, max(0, int(labels.max()) + 1 - len(sizes)))
            )
        self._by_class = _of_labels(plan.sampling.by_class, len(sizes))
        names = list(columns.source_names)
        self._by_source: dict[int, np.ndarray] = {}  # by the code of the source
        by_source: dict[str, dict[int, float]] = {}
        for label, of_label in plan.sampling.by_source.items():
            for source, weight in of_label.items():
                by_source.setdefault(source, {})[label] = weight
        for source, by_label in by_source.items():
            if source in names:
                self._by_source[names.index(source)] = _of_labels(by_label, len(sizes))
        tables = [self._by_class, *self._by_source.values()]
        if not all(np.isfinite(table).all() and (table >= 0).all() for table in tables):
            raise RetortError("plan: sampling: a weight is negative or not a number")
        if not any(self(rows[start : start + BLOCK]).any() for start in parts):
            raise RetortError("plan: sampling: all weights are zero, so there is nothing to draw")

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Row numbers [n] -> float64 [n]."""
        labels = self._columns.labels[rows]
        result = self._by_class[labels]
        if self._by_source:
            sources = self._columns.sources[rows]
            for code, by_label in self._by_source.items():
                chosen = sources == code
                result[chosen] *= by_label[labels[chosen]]
        return result

    def shares(self, rows: np.ndarray) -> np.ndarray:
        """Of each class among what is drawn, float64 [C]; sources are not weighed."""
        drawn = np.bincount(self._columns.labels[rows], minlength=len(self._by_class)) * self._by_class
        return drawn / max(1e-12, drawn.sum())


def _of_labels(weights: Mapping[int, float], count: int) -> np.ndarray:
    """The weight of each label, float64 [count]; 1.0 where none is given."""
    by_label = np.ones(count)
    for label, weight in weights.items():
        if 0 <= label < count:
            by_label[label] = weight
    return by_label


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
    class of n comes at about (k + u) / n of the way, with a random u for each image. One u a class would do
    for the shares, but then classes of one size follow one another in the same order all epoch, and with
    many of them most pairs never meet in a batch.
    """
    rng = generator(*key)
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, starts, inverse, counts = np.unique(
        labels[by_class], return_index=True, return_inverse=True, return_counts=True
    )
    place = np.arange(len(labels)) - starts[inverse]
    at = (place + rng.uniform(size=len(labels))) / counts[inverse]
    return by_class[np.argsort(at, kind="stable")]


def steps_per_epoch(count: int, batch_size: int, workers: int) -> int:
    """Steps that take ``count`` rows with at most ``batch_size`` rows a worker.

    No worker's batch is of one row (of none, where ``batch_size`` is one), which no batch norm learns from:
    for that, the last few rows may make batches larger by one.
    """
    least = min(2, batch_size)
    return max(1, min(-(-count // (batch_size * workers)), count // (least * workers)))


def even_count(count: int, batch_size: int, workers: int, parts: int = 1) -> int:
    """Rows of an epoch whose batches, of all workers, are of one size, and their parts too."""
    unit = steps_per_epoch(count, batch_size, workers) * workers * parts
    return count // unit * unit


def need_rows(count: int, workers: int) -> None:
    """Raise RetortError when there are fewer than two rows a worker: no batch norm learns from one image."""
    if count < 2 * workers:
        raise RetortError(
            f"{count} training rows are too few for {workers} Ray workers, which take two each at least: "
            "lower ray.workers, or add images"
        )


def occurrence(rows: np.ndarray) -> np.ndarray:
    """For each entry, int64, how often the same row came before it: 0, then 1, ..."""
    order = np.argsort(rows, kind="stable")
    _, starts, counts = np.unique(rows[order], return_index=True, return_counts=True)
    result = np.empty(len(rows), dtype=np.int64)
    result[order] = np.arange(len(rows)) - np.repeat(starts, counts)
    return result


class Epochs:
    """The epochs of one training: labelled rows as the plan weighs them, and unlabelled ones once each.

    Rows are drawn and put in order in blocks of ``BLOCK``, each a random part of all rows, another part in
    each epoch: so an epoch of 43 million rows begins at once, and takes no memory a row.

    Args:
        labelled: row numbers that are drawn by weight.
        unlabelled: row numbers that may be taken beside them.
        repeats: views of each row in one batch (Hoffer et al., "Augment Your Batch", 2020); an epoch then
            draws fewer rows, and stays as long.
    """

    def __init__(
        self,
        columns: Columns,
        labelled: np.ndarray,
        weights: Weights,
        unlabelled: np.ndarray,
        seed: int,
        repeats: int = 1,
    ) -> None:
        self._labels = columns.labels
        self._labelled, self._weights, self._unlabelled = labelled, weights, unlabelled
        self._seed, self._repeats = seed, repeats

    def count(self, with_unlabelled: bool, match_budget: bool) -> int:
        """Rows of an epoch; ``match_budget``: labelled rows are drawn in the unlabelled ones' place."""
        return len(self._labelled) + len(self._unlabelled) * (with_unlabelled or match_budget)

    def _blocks(self, number: int, with_unlabelled: bool, match_budget: bool) -> list[_Block]:
        """The parts of an epoch in order."""
        count = len(self._labelled) + len(self._unlabelled) * match_budget
        others = self._unlabelled if with_unlabelled else self._unlabelled[:0]
        blocks = max(1, -(-(count + len(others)) // BLOCK))
        cuts = np.arange(blocks + 1)
        drawn, more = np.diff(cuts * count // blocks), np.diff(cuts * len(others) // blocks)
        return [
            _Block(number, place, blocks, int(drawn[place]), int(more[place]), others)
            for place in range(blocks)
        ]

    def _rows(self, block: _Block) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a block in order, int64, and how often each came before."""
        seed, again = self._seed, self._repeats
        key = (block.number,) if block.of == 1 else (block.number, block.place)
        rows = _part(self._labelled, block, seed, BLOCKS, block.number)
        rows = rows[draw(self._weights(rows), -(-block.drawn // again), seed, DRAW, *key)]
        others = _part(block.others, block, seed, BLOCKS, block.number, 1)
        if again > 1 and len(others):
            some = generator(seed, BLOCKS, *key, 2).permutation(len(others))[: -(-len(others) // again)]
            others = others[some]
        rows = np.concatenate([rows, others]).astype(np.int64)
        rows = np.repeat(rows[spread(self._labels[rows], seed, ORDER, *key)], again)[: block.size]
        return rows, occurrence(rows)

    def draws(
        self,
        number: int,
        batch_size: int,
        workers: int,
        rank: int,
        view: Callable[[int, np.ndarray], np.ndarray],
        *,
        with_unlabelled: bool = False,
        match_budget: bool = False,
        even: int = 0,
        skip: int = 0,
    ) -> Iterator[Draw]:
        """One worker's share of each step of an epoch.

        Over all workers every row that was drawn is taken once: none is dropped to fill the last batch, none
        repeated. Batches of one epoch differ by at most one row.

        Args:
            even: not 0: all batches are of one size, and so are so many parts of each, so that a compiled
                network sees one shape; the few rows that are left out are others in each epoch.
            view: from the number of the epoch, and how often a row came before, int64 [B], to its view.
            skip: steps that an interrupted run has taken already.
        """
        total = self.count(with_unlabelled, match_budget)
        steps = steps_per_epoch(total, batch_size, workers)
        if even:
            total = even_count(total, batch_size, workers, even)
        ends = total * np.arange(steps + 1) // steps
        step = skip
        rows = before = np.empty(0, dtype=np.int64)
        begin = end = 0  # of ``rows``, counted over the epoch
        for block in self._blocks(number, with_unlabelled, match_budget):
            end += block.size
            if step == steps or ends[step] >= end:  # all of it was taken before, or is not wanted
                continue
            left = slice(int(ends[step]) - begin, None) if len(rows) else slice(0, 0)
            new, new_before = self._rows(block)
            rows, before = np.concatenate([rows[left], new]), np.concatenate([before[left], new_before])
            begin = end - len(rows)
            while step < steps and ends[step + 1] <= end:
                at = np.arange(ends[step] - begin, ends[step + 1] - begin)
                mine = np.array_split(at, workers)[rank]
                yield Draw(rows[mine], view(number, before[mine]), len(at))
                step += 1


@dataclass(frozen=True)
class _Block:
    """Part ``place`` of ``of`` of an epoch: rows that it draws by weight, and that it takes beside."""

    number: int
    place: int
    of: int
    drawn: int
    more: int
    others: np.ndarray

    @property
    def size(self) -> int:
        return self.drawn + self.more


def _part(rows: np.ndarray, block: _Block, *key: int) -> np.ndarray:
    """One of several random parts of some rows; together they are all of them."""
    if block.of == 1 or not len(rows):
        return rows
    first, last = (place * len(rows) // block.of for place in (block.place, block.place + 1))
    return rows[permuted(np.arange(first, last, dtype=np.uint64), len(rows), *key)]


def permuted(at: np.ndarray, count: int, *key: int) -> np.ndarray:
    """Where a random order of 0..count - 1 puts some places, without writing that order down.

    A Feistel network of four rounds over the next power of four, walked along its cycle until it is below
    ``count`` (Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, sec. 3).

    Args:
        at: uint64 [n], below ``count``.

    Returns:
        Int64 [n], as many different numbers as ``at`` has.
    """
    half = np.uint64(max(1, (int(count - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    rounds = generator(*key).integers(1, 2**63, 4, dtype=np.uint64) | np.uint64(1)
    values = _feistel(at.astype(np.uint64), half, mask, rounds)
    outside = np.flatnonzero(values >= count)
    while len(outside):
        values[outside] = _feistel(values[outside], half, mask, rounds)
        outside = outside[values[outside] >= count]
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half: np.uint64, mask: np.uint64, rounds: np.ndarray) -> np.ndarray:
    left, right = values >> half, values & mask
    for multiplier in rounds:
        mixed = (right + np.uint64(1)) * multiplier  # wraps, as it should
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)  # of splitmix64 (Steele et al., 2014)
        left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
    return (left << half) | right

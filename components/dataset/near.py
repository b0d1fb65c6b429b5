"""Near-duplicates: perceptual hashes propose pairs, exactly and in bounded memory; pixels confirm them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from components.common.progress import task

if TYPE_CHECKING:
    from numpy.typing import NDArray

PARTS = 4  # of 16 bits each
CANDIDATES = 2_000_000  # pairs held in memory at once
CROWD = 64  # images of one hash and kind that the search itself compares
NEIGHBOURS = 8
# Concordance of 16 x 16 grey pixels. Of 28-pixel images saved again (20 to 56 pixels, JPEG quality 60 to 95)
# 97 in 100 lie above it; of different ones hardly any pair does, and most of those look the same to a person.
CONFIRMED = 0.993
# A copy differs a little everywhere, another thing before the same background much in one place: how large a
# difference the worst 3 x 3 pixels may have, beside that of the whole and beside the contrast of the picture.
# Measured on pairs above CONFIRMED. Copies stay: 99.5 in 100 of 28-pixel images as above, 99.6 of 224-pixel
# photos, clouds and digits at 0.5 to 1.5 times the size. Of 1,000 frames of one camera, each with another
# digit of 40 pixels in 224, 39 keep a partner, of the same class each (1,000 had one, 971 of another class);
# of 28 pixels, which are 2 of 16, 902 do, 462 of another class (all had).
WORST = 2.85
WORST_CONTRAST = 0.25
ROUNDING = 1.25  # grey levels: what rounding and JPEG leave of no difference at all
# For pairs that must be beyond doubt. 87 in 100 copies of 28-pixel images keep both; of the 462 frames, 8 do.
SURE_WORST = 2.25
SURE_ROUNDING = 0.75
AT_ONCE = 2048  # pairs; more are no faster, since they leave the processor's cache


@dataclass(frozen=True)
class Pairs:
    """Confirmed pairs: ``one[k]`` and ``other[k]`` are positions, ``alike[k]`` their concordance."""

    one: NDArray[np.int64]
    other: NDArray[np.int64]
    alike: NDArray[np.float32]


def close_pairs(
    hashes: NDArray[np.uint64], bits: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """All pairs of positions ``i < j`` whose hashes differ in at most ``bits`` bits, each once, in portions.

    Two hashes within ``bits`` agree within ``bits // 4`` in at least one of four parts of 16 bits. So each
    part's values are the buckets, and only buckets that close to each other are compared.
    """
    radius = bits // PARTS
    masks = [
        sum(1 << bit for bit in chosen)
        for size in range(radius + 1)
        for chosen in combinations(range(16), size)
    ]
    parts = [((hashes >> np.uint64(16 * part)) & np.uint64(0xFFFF)).astype(np.int64) for part in range(PARTS)]
    with task("comparing hashes", PARTS * len(masks)) as shown:
        for part, keys in enumerate(parts):
            order = np.argsort(keys, kind="stable")
            ordered = keys[order]
            starts = np.searchsorted(ordered, np.arange(65537))
            for mask in masks:
                for left, right in _candidates(ordered, starts, mask):
                    one, other = order[left], order[right]
                    near = np.bitwise_count(hashes[one] ^ hashes[other]) <= bits
                    one, other = one[near], other[near]
                    for earlier in parts[:part]:  # found there already
                        fresh = np.bitwise_count(earlier[one] ^ earlier[other]) > radius
                        one, other = one[fresh], other[fresh]
                    if len(one):
                        yield np.minimum(one, other), np.maximum(one, other)
                shown.advance()


def _candidates(
    ordered: NDArray[np.int64], starts: NDArray[np.int64], mask: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Places in the sorted keys of all pairs whose keys differ exactly in ``mask``, in portions."""
    places = np.arange(len(ordered))
    if mask == 0:
        first, last = places + 1, starts[ordered + 1]
    else:
        partner = ordered ^ mask
        first = starts[partner]
        last = np.where(partner > ordered, starts[partner + 1], first)  # each pair of buckets once
    yield from _ranges(first, last)


def _ranges(
    first: NDArray[np.int64], last: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Every ``k`` beside each number of ``first[k] .. last[k] - 1``, in portions."""
    places = np.arange(len(first))
    counts = last - first
    total = np.concatenate([[0], np.cumsum(counts)])
    begin = 0
    while begin < len(first):
        end = max(int(np.searchsorted(total, total[begin] + CANDIDATES, side="right")) - 1, begin + 1)
        count = counts[begin:end]
        size = int(total[end] - total[begin])
        if size:
            left = np.repeat(places[begin:end], count)
            within = np.arange(size) - np.repeat(total[begin:end] - total[begin], count)
            yield left, np.repeat(first[begin:end], count) + within
        begin = end


def concordance(
    looks: NDArray[np.uint8], one: NDArray[np.int64], other: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Lin's concordance correlation (1989) of the pixels ``looks [n, 256]`` of each pair.

    Unlike Pearson's it falls with a difference in brightness or contrast, which saving an image again
    does not change, and which tells plain things of one shape apart.
    """
    result = np.zeros(len(one), np.float32)
    for start in range(0, len(one), 65536):
        a, b = (looks[index[start : start + 65536]].astype(np.float32) for index in (one, other))
        mean_a, mean_b = a.mean(axis=1), b.mean(axis=1)
        a -= mean_a[:, None]
        b -= mean_b[:, None]
        squares = np.einsum("ij,ij->i", a, a) + np.einsum("ij,ij->i", b, b)
        spread = squares + a.shape[1] * (mean_a - mean_b) ** 2
        result[start : start + 65536] = 2 * np.einsum("ij,ij->i", a, b) / np.maximum(spread, 1e-6)
    return result


def same_everywhere(
    looks: NDArray[np.uint8],
    one: NDArray[np.int64],
    other: NDArray[np.int64],
    worst_ratio: float = WORST,
    rounding: float = ROUNDING,
) -> NDArray[np.bool_]:
    """Whether the two ``looks [n, 256]`` of each pair differ nowhere much more than elsewhere.

    What saving again does to a whole picture is taken out first, by least squares: brightness, contrast, a
    shift by a part of a pixel, and how sharp edges are.
    """
    result = np.zeros(len(one), bool)
    for start in range(0, len(one), AT_ONCE):
        a, b = (looks[index[start : start + AT_ONCE]].astype(np.float32) for index in (one, other))
        rest = a - b
        rest -= rest.mean(axis=1, keepdims=True)
        causes = _causes((a + b) * np.float32(0.5))
        square = (causes @ causes.transpose(0, 2, 1)).astype(np.float64)
        trace = np.trace(square, axis1=1, axis2=2)
        # a picture of stripes has slopes in one direction alone
        square += np.eye(causes.shape[1]) * (1e-6 * trace + 1e-6)[:, None, None]
        weights = np.linalg.solve(square, (causes @ rest[:, :, None]).astype(np.float64))
        rest -= (weights.transpose(0, 2, 1).astype(np.float32) @ causes)[:, 0]
        rest *= rest
        power = rest.reshape(-1, 16, 16)
        power = power[:, 2:] + power[:, 1:-1] + power[:, :-2]
        worst = (power[:, :, 2:] + power[:, :, 1:-1] + power[:, :, :-2]).max(axis=(1, 2)) / 9
        contrast = np.einsum("ij,ij->i", causes[:, 0], causes[:, 0]) / rest.shape[1]
        limit = worst_ratio**2 * (rest.mean(axis=1) + rounding**2)
        result[start : start + AT_ONCE] = worst <= np.minimum(limit, WORST_CONTRAST**2 * contrast)
    return result


def _causes(looks: NDArray[np.float32]) -> NDArray[np.float32]:
    """``[n, 4, 256]``: the picture itself, its slopes across and down, its Laplacian; all of mean 0."""
    wide = np.pad(looks.reshape(-1, 16, 16), ((0, 0), (1, 1), (1, 1)), mode="edge")
    left, right, up, down = wide[:, 1:-1, :-2], wide[:, 1:-1, 2:], wide[:, :-2, 1:-1], wide[:, 2:, 1:-1]
    middle = wide[:, 1:-1, 1:-1]
    causes = np.stack([middle, right - left, down - up, left + right + up + down - 4 * middle], axis=1)
    causes = causes.reshape(len(looks), 4, -1)
    causes -= causes.mean(axis=2, keepdims=True)
    return causes


def near_duplicates(
    hashes: NDArray[np.uint64], looks: NDArray[np.uint8], kinds: NDArray[np.int64], bits: int
) -> Pairs:
    """For each image two confirmed partners of every kind, so that memory stays linear.

    They are the most alike, and the first by position: in a cluster of copies each but the first has one
    before it. Where more than CROWD images of one kind share a hash, the first CROWD of them stand for all
    in the search, so that the cost is linear: the others are compared with these, with those next to them
    in brightness, and with the partners of these that they match.

    Args:
        hashes: ``[n]`` perceptual hashes of different contents, none of them flat.
        looks: ``[n, 256]`` their grey pixels at 16 x 16.
        kinds: ``[n]`` what a pair is judged by (its split and label, say): an image keeps partners in
            each kind that it has some in.
    """
    best = _Best(looks, kinds)
    leads = _leads(hashes, kinds)
    leaders, crowd = np.flatnonzero(leads), np.flatnonzero(~leads)
    for one, other in close_pairs(hashes[leaders], bits):
        best.try_pairs(leaders[one], leaders[other])
    if len(crowd):
        for one, other in _within_crowds(hashes, looks, leaders, crowd):
            best.try_pairs(one, other)
        known = best.pairs()
        led = ~leads[known.one] & leads[known.other]
        member, leader = known.one[led], known.other[led]
        # the same hash, so whatever is within reach of the leader's is within reach of the member's
        first, last = (np.searchsorted(known.one, leader, side=side) for side in ("left", "right"))
        for place, partner in _ranges(first, last):
            one, other = member[place], known.other[partner]
            best.try_pairs(one[one != other], other[one != other])
    return best.pairs()


def _leads(hashes: NDArray[np.uint64], kinds: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each image is among the first CROWD of its hash and kind."""
    order = np.lexsort((kinds, hashes))
    hash_, kind = hashes[order], kinds[order]
    starts = np.ones(len(order), bool)
    starts[1:] = (hash_[1:] != hash_[:-1]) | (kind[1:] != kind[:-1])
    places = np.arange(len(order))
    leads = np.zeros(len(order), bool)
    leads[order] = places - np.maximum.accumulate(np.where(starts, places, 0)) < CROWD
    return leads


def _within_crowds(
    hashes: NDArray[np.uint64], looks: NDArray[np.uint8], leaders: NDArray[np.int64], crowd: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of one hash: each of the crowd with all leaders, and with its neighbours in brightness."""
    by_hash = leaders[np.argsort(hashes[leaders], kind="stable")]
    first, last = (np.searchsorted(hashes[by_hash], hashes[crowd], side=side) for side in ("left", "right"))
    for place, leader in _ranges(first, last):
        yield crowd[place], by_hash[leader]
    ordered = crowd[np.lexsort((looks[crowd].mean(axis=1), hashes[crowd]))]
    for step in range(1, NEIGHBOURS + 1):
        one, other = ordered[:-step], ordered[step:]
        same = hashes[one] == hashes[other]
        yield one[same], other[same]


class _Best:
    """The partners worth keeping among all pairs that are tried; memory stays linear in the images."""

    def __init__(self, looks: NDArray[np.uint8], kinds: NDArray[np.int64]) -> None:
        self.looks = looks
        self.kinds = kinds
        self.found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []
        self.held = 0

    def try_pairs(self, one: NDArray[np.int64], other: NDArray[np.int64]) -> None:
        """Keep those of the pairs, both ways, that the pixels confirm."""
        alike = concordance(self.looks, one, other)
        sure = np.flatnonzero(alike >= CONFIRMED)
        sure = sure[same_everywhere(self.looks, one[sure], other[sure])]
        one, other, alike = one[sure], other[sure], alike[sure]
        self.found.append((np.r_[one, other], np.r_[other, one], np.r_[alike, alike]))
        self.held += 2 * len(one)
        if self.held > CANDIDATES:
            self.pairs()

    def pairs(self) -> Pairs:
        """What is kept, in the order of ``one``."""
        one, other, alike = _best(self.found, self.kinds)
        self.found, self.held = [(one, other, alike)], len(one)
        return Pairs(one, other, alike)


def _best(
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]], kinds: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    if not found:
        none = np.zeros(0, np.int64)
        return none, none, none.astype(np.float32)
    one, other, alike = (np.concatenate([item[place] for item in found]) for place in range(3))
    keep = np.zeros(len(one), bool)
    for rank in ((other, -alike), (other,)):
        order = np.lexsort((*rank, kinds[other], one))
        mine, theirs = one[order], kinds[other[order]]
        first = np.ones(len(one), bool)
        first[1:] = (mine[1:] != mine[:-1]) | (theirs[1:] != theirs[:-1])
        keep[order[first]] = True
    kept = order[keep[order]]
    return one[kept], other[kept], alike[kept]

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
# Concordance of 16 x 16 grey pixels. Of 28-pixel images saved again (20 to 56 pixels, JPEG quality 60 to 95)
# 97 in 100 lie above it; of different ones hardly any pair does, and most of those look the same to a person.
CONFIRMED = 0.994


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
    counts = last - first
    total = np.concatenate([[0], np.cumsum(counts)])
    begin = 0
    while begin < len(ordered):
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


def near_duplicates(
    hashes: NDArray[np.uint64], looks: NDArray[np.uint8], kinds: NDArray[np.int64], bits: int
) -> Pairs:
    """For each image two confirmed partners of every kind, so that memory stays linear.

    They are the most alike, and the first by position: in a cluster of copies each but the first has one
    before it.

    Args:
        hashes: ``[n]`` perceptual hashes of different contents, none of them flat.
        looks: ``[n, 256]`` their grey pixels at 16 x 16.
        kinds: ``[n]`` what a pair is judged by (its split and label, say): an image keeps partners in
            each kind that it has some in.
    """
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []
    held = 0
    for one, other in close_pairs(hashes, bits):
        alike = concordance(looks, one, other)
        sure = alike >= CONFIRMED
        one, other, alike = one[sure], other[sure], alike[sure]
        found.append((np.r_[one, other], np.r_[other, one], np.r_[alike, alike]))
        held += 2 * len(one)
        if held > CANDIDATES:
            found = [_best(found, kinds)]
            held = len(found[0][0])
    one, other, alike = _best(found, kinds)
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
    return one[keep], other[keep], alike[keep]

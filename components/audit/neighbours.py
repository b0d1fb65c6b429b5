"""The second opinion on labels: how near the closest images of each class are.

It knows nothing of means, covariances or linear borders. A class of several kinds of images has neighbours
in each, and an image far from everything is about as far from one class as from another, so that it says
little: what a discriminant takes for sure, extrapolated, nobody else vouches for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

NEAREST = 3  # images of a class that are looked at: one alone may have a wrong label itself
DIRECTIONS = 128  # of most variance: more of them only make it slower
SAME = 1e-3  # of the images' usual length: a smaller distance is that of copies, and rounding
AT_ONCE = 2**23  # distances in memory, 64 MiB


def closeness(
    vectors: NDArray[np.float64], known: NDArray[np.bool_], places: NDArray[np.int64], classes: int
) -> NDArray[np.float64]:
    """Minus the logarithm of the mean distance to the NEAREST images of each class, float64 [n, C].

    Only the rows ``known`` are neighbours, and none is its own. A class without any has minus infinity.
    Copies are all equally near, whatever rounding makes of a distance of nothing.

    Args:
        vectors: float64 [n, D], the components of most variance last.
        places: int64 [n], the rows' classes; those of rows that are not ``known`` are not looked at.
    """
    vectors = np.ascontiguousarray(vectors[:, -DIRECTIONS:])
    learnt = np.flatnonzero(known)
    learnt = learnt[np.argsort(places[learnt], kind="stable")]
    starts = np.searchsorted(places[learnt], np.arange(classes + 1))
    beside = vectors[learnt]
    lengths = (vectors**2).sum(axis=1)
    least = max(SAME * SAME * float(lengths[learnt].mean()), 1e-300)
    own = np.full(len(vectors), -1)
    own[learnt] = np.arange(len(learnt))
    result = np.full((len(vectors), classes), -np.inf)
    step = max(AT_ONCE // len(learnt), 1)
    for first in range(0, len(vectors), step):
        chunk = slice(first, first + step)
        distances = vectors[chunk] @ beside.T
        distances *= -2.0
        distances += lengths[chunk, None]
        distances += lengths[learnt]
        np.maximum(distances, least, out=distances)
        mine = own[chunk]
        distances[np.flatnonzero(mine >= 0), mine[mine >= 0]] = np.inf
        for c in np.flatnonzero(np.diff(starts)).tolist():
            result[chunk, c] = _near(distances[:, starts[c] : starts[c + 1]])
    return result


def _near(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared distances [n, m] to the images of a class -> its closeness [n]; infinite ones are left out."""
    count = min(NEAREST, distances.shape[1])
    nearest = np.sqrt(np.sort(np.partition(distances, count - 1, axis=1)[:, :count], axis=1))
    there = np.isfinite(nearest)
    number = there.sum(axis=1)
    mean = np.where(there, nearest, 0.0).sum(axis=1) / np.maximum(number, 1)
    return np.where(number > 0, -np.log(np.maximum(mean, 1e-300)), -np.inf)

"""Which images a check names: outliers of the data's own distribution, between two bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from components.dataset.quality.check import Check

if TYPE_CHECKING:
    from numpy.typing import NDArray

FAR = 4.0  # spreads from the median
NORMAL = 1.4826  # standard deviation of normal values to their median absolute deviation
SMALL = 30  # images below which a class, or a source, is not judged by its own distribution
COMMON = 0.2  # share of a class, or of all, above which the images are like that


@dataclass(frozen=True)
class Verdict:
    """What one check says about each image.

    ``named`` are outliers. Of these, ``common`` are so many in their class, or in all, that they are no
    exception: whether the data are like that, or a fault has struck them all, cannot be known from them.
    """

    named: NDArray[np.bool_]
    common: NDArray[np.bool_]
    limits: NDArray[np.float64]  # in the check's own unit, an image each


def limit(check: Check, badness: NDArray[np.float64]) -> float:
    """The badness beyond which one of these is named.

    The spread is that of the better half: up to half of the images may be bad without it growing wide.
    """
    middle = float(np.median(badness))
    spread = NORMAL * float(np.median(middle - badness[badness <= middle]))
    never, sure = (float(check.badness(bound)) for bound in (check.never, check.sure))
    return float(np.clip(middle + FAR * max(spread, check.floor), never, sure))


def judge(
    check: Check, values: NDArray[np.float64], labels: NDArray[np.int64], sources: NDArray[np.int64]
) -> Verdict:
    """Judge images by those of their source, and milder by those of their class where it differs.

    A class of night scenes lies beyond the limit of all as a whole: it is named as common, whatever its own
    limit says, since a whole class that is under-exposed looks the same. In a class that merely tends that
    way, only what is an outlier of the class too is named.

    Args:
        values: the measures, float64 [n].
        labels: int64 [n]; the unlabelled have one of their own.
        sources: int64 [n]: real, synthetic and so on are never compared with each other.
    """
    badness = check.badness(values)
    limits = np.empty(len(values))
    common = np.zeros(len(values), bool)
    for of_source in _places(sources):
        overall = limit(check, badness[of_source] if len(of_source) >= SMALL else badness)
        limits[of_source] = overall
        if not (badness[of_source] > overall).any():
            continue
        classes = [of_source[inside] for inside in _places(labels[of_source])]
        large = [places for places in classes if len(places) >= SMALL]
        for places in large:
            if (badness[places] > overall).mean() > COMMON:
                common[places] = True
        others = of_source[~common[of_source]]
        if len(others) and (badness[others] > overall).mean() > COMMON:
            common[others] = True
        for places in large:
            if not common[places[0]]:
                limits[places] = max(overall, limit(check, badness[places]))
    named = badness > limits
    return Verdict(named, named & common, check.scale.back(check.sign * limits))


def _places(keys: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Where each key stands."""
    order = np.argsort(keys, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(keys[order])) + 1)

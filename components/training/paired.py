"""Two networks on the same images: the difference of what they recognise, and how sure it is.

Every interval here is one of 95 %. Images on which both are right, or both wrong, tell nothing apart; without
any other one the interval still has a width, since other images might tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import hypot, sqrt

import numpy as np

Z = 1.959964  # of the normal distribution: 95 %


@dataclass(frozen=True)
class Difference:
    """Ours minus theirs, -1..1, and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """In points, such as ``+1.8 points (95 % interval -0.3 to +3.9)``."""
        return f"{points(self.value)} points (95 % interval {points(self.low)} to {points(self.high)})"

    def rounded(self) -> dict[str, float]:
        """For a file."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


def points(value: float) -> str:
    """A difference of shares in points of a hundred, with its sign."""
    return f"{100 * value:+.1f}"


def around(value: float, half: float | None, form: str) -> str:
    """A value by the format ``form``, with half its interval behind it, where that is known."""
    return form.format(value) + ("" if half is None else f" ± {half:.2%}")


def top1(actual: np.ndarray, ours: np.ndarray, other: np.ndarray) -> Difference:
    """Difference of top-1.

    Args:
        actual, ours, other: classes int64 [n], n > 0.
    """
    return difference(_by_image(actual, ours, other))


def difference(value: np.ndarray, groups: np.ndarray | None = None) -> Difference:
    """The mean of paired differences, with an interval that counts no group for more than one witness.

    Images of one group (a patient, a burst, a camera's scene) err together, so the sums of groups vary, not
    the images: the variance is the cluster-robust one, the quantile Student's t of one less than the groups.
    Cameron & Miller, "A practitioner's guide to cluster-robust inference" (2015), sec. II.B and VI.D. A
    bootstrap over groups gives the same where there are many, and is too narrow where there are few. The two
    images of ``adjusted`` are added here, too, as groups of their own; without ``groups`` it is ``top1``.

    Args:
        value: float [n]: 1 where ours alone is right, -1 where the other alone is, else 0.
        groups: int64 [n], any numbers; None: each image stands alone.
    """
    if groups is None:
        middle, error = adjusted(value)
        return _within(float(value.mean()), middle, Z * error)
    from scipy.stats import t

    _, place = np.unique(groups, return_inverse=True)
    sums, images = np.bincount(place, weights=value), np.bincount(place)
    number, count = len(sums), len(value) + 2
    if number < 2:
        return Difference(float(value.mean()), -1.0, 1.0)
    middle = float(sums.sum()) / count
    squares = float(((sums - middle * images) ** 2).sum()) + 1 + 2 * middle**2
    error = sqrt(squares * number / (number - 1)) / count
    # groups of one image are images: there the normal quantile is as exact as Student's, and known already
    quantile = Z if number == len(value) else float(t.ppf(0.975, number - 1))
    return _within(float(value.mean()), middle, quantile * error)


def no_worse(value: np.ndarray, groups: np.ndarray | None = None) -> float:
    """How likely a loss as great as this one, or greater, is by chance where both are equally good.

    Exact: whether ours or the other is the better one in a group is a coin's fall for each group, and all
    falls are summed up. With groups of one image it is McNemar's exact test, one-sided.

    Args:
        value: int or float [n], of -1, 0 and 1, as in ``difference``.
        groups: int64 [n]; None: each image stands alone.
    """
    from scipy.signal import convolve
    from scipy.stats import binom

    if groups is None:
        sums = np.asarray(value).astype(np.int64)
    else:
        _, place = np.unique(groups, return_inverse=True)
        sums = np.rint(np.bincount(place, weights=value)).astype(np.int64)
    sizes, counts = np.unique(np.abs(sums[sums != 0]), return_counts=True)
    chances = np.ones(1)  # of what those of our favour sum up to
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        part = np.zeros(size * count + 1)
        part[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = convolve(chances, part)
    won = int(sums[sums > 0].sum())
    return float(min(1.0, max(0.0, chances[: won + 1].sum())))


def macro_recall(actual: np.ndarray, ours: np.ndarray, other: np.ndarray) -> Difference:
    """Difference of macro recall: the mean of the classes' differences, each adjusted on its own.

    Args:
        actual, ours, other: classes int64 [n], n > 0.
    """
    value = _by_image(actual, ours, other)
    _, place = np.unique(actual, return_inverse=True)
    images, total, squares = (np.bincount(place, weights=of) for of in (None, value, value**2))
    middles, errors = _adjusted(images, total, squares)
    half = Z * float(np.sqrt((errors**2).sum())) / len(images)
    return _within(float((total / images).mean()), float(middles.mean()), half)


def adjusted(value: np.ndarray) -> tuple[float, float]:
    """Middle and standard error of the mean of paired differences, with two images added that disagree.

    Agresti & Min, "Simple improved confidence intervals for comparing matched proportions" (2005), sec. 2:
    half an image is added to each of the four cells of the table of both networks' answers. With means over
    seeds in place of -1, 0 and 1 the same sums are taken.

    Args:
        value: float [n]: 1 where ours alone is right, -1 where the other alone is, else 0.
    """
    middle, error = _adjusted(np.asarray(len(value)), value.sum(), (value**2).sum())
    return float(middle), float(error)


def _adjusted(images: np.ndarray, total: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``adjusted`` from the sums of ``value`` and of its squares, of one class or of many [K]."""
    count = images + 2
    return total / count, np.sqrt(np.maximum(0.0, squares + 1 - total**2 / count)) / count


def wald(actual: np.ndarray, ours: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Difference of top-1, and half its 95 % interval as Wald has it: symmetric, and none where both agree.

    Args:
        actual, ours, other: classes int64 [n].
    """
    value = _by_image(actual, ours, other)
    return float(value.mean()), 1.96 * float(value.std()) / sqrt(max(1, len(value)))


def worse(actual: np.ndarray, ours: np.ndarray, other: np.ndarray) -> float:
    """How likely the other would seem so much better by chance: McNemar's exact test, one-sided.

    Args:
        actual, ours, other: classes int64 [n].
    """
    from scipy.stats import binomtest

    value = _by_image(actual, ours, other)
    won, lost = int((value > 0).sum()), int((value < 0).sum())
    return float(binomtest(lost, won + lost, alternative="greater").pvalue) if won + lost else 1.0


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half its 95 % interval by Student's t; None for a single value."""
    from scipy.stats import t

    count = len(values)
    if count < 2:
        return float(np.mean(values)), None
    half = float(t.ppf(0.975, count - 1)) * float(np.std(values, ddof=1)) / sqrt(count)
    return float(np.mean(values)), half


def gain(actual: np.ndarray, ours: np.ndarray, other: np.ndarray) -> tuple[float, float | None]:
    """Difference of top-1 between two ways of training, and half its 95 % interval; None with a single seed.

    Both kinds of noise count: that of training (differences by seed, Student's t) and that of the images
    (differences by image, averaged over seeds), as independent ones. The second holds a part of the first,
    so the interval is rather too wide than too narrow.

    Args:
        actual: classes int64 [n].
        ours, other: predicted classes int64 [seeds, n], in the same order of seeds.
    """
    difference = np.stack([_by_image(actual, one, two) for one, two in zip(ours, other, strict=True)])
    value, by_seed = interval(difference.mean(axis=1).tolist())
    if by_seed is None:
        return value, None
    _, error = adjusted(difference.mean(axis=0))
    return value, hypot(by_seed, Z * error)


def _by_image(actual: np.ndarray, ours: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (ours == actual).astype(float) - (other == actual).astype(float)


def _within(value: float, middle: float, half: float) -> Difference:
    """An interval around the adjusted middle that holds the difference itself, and ends where shares do."""
    return Difference(value, max(-1.0, min(value, middle - half)), min(1.0, max(value, middle + half)))

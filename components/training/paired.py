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
    value = _by_image(actual, ours, other)
    middle, error = adjusted(value)
    return _within(float(value.mean()), middle, Z * error)


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

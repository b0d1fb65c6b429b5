"""Two networks on the same images: differences, their intervals, and how often these hold the truth."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from scipy.stats import binom

from components.training import paired
from components.training.paired import Difference, macro_recall, top1, wald, worse


def answers(both: int, ours: int, other: int, neither: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels (all 0) and predictions of two networks, by how many images each of them is right on."""
    one = np.repeat([0, 0, 1, 1], [both, ours, other, neither])
    two = np.repeat([0, 1, 0, 1], [both, ours, other, neither])
    return np.zeros(len(one), np.int64), one, two


def test_the_interval_of_agresti_and_min() -> None:
    """Their example: approval of a prime minister, asked twice (Agresti & Min, 2005, table 1)."""
    found = top1(*answers(794, 150, 86, 570))
    assert found.value == pytest.approx(64 / 1600)
    # by hand: (b + c + 1) - (b - c)^2 / (n + 2), over n + 2
    error = sqrt(237 - 64**2 / 1602) / 1602
    assert found.low == pytest.approx(64 / 1602 - 1.96 * error, abs=1e-6)
    assert found.high == pytest.approx(64 / 1602 + 1.96 * error, abs=1e-6)
    assert (round(found.low, 3), round(found.high, 3)) == (0.021, 0.059)


def test_walds_interval() -> None:
    gain, half = wald(*answers(83, 12, 5, 0))
    assert gain == pytest.approx(0.07)
    # 12 images speak for us, 5 against
    assert half == pytest.approx(1.96 * (0.17 - 0.07**2) ** 0.5 / 10)


def test_no_discordant_image_is_no_certainty() -> None:
    found = top1(*answers(90, 0, 0, 10))
    assert found.value == 0
    assert found.high == -found.low == pytest.approx(1.96 * 1 / 102, abs=1e-5)


@pytest.mark.parametrize(
    ("count", "ours", "other"), [(50, 0.07, 0.04), (200, 0.1, 0.07), (336, 0.05, 0.07), (1000, 0.015, 0.01)]
)
def test_the_interval_holds_the_truth_as_often_as_it_says(count: int, ours: float, other: float) -> None:
    """Simulated tables; each network alone is right on such a share of images."""
    rng = np.random.default_rng(0)
    both, held = 0.8, 0
    for table in rng.multinomial(count, [both, ours, other, 1 - both - ours - other], size=2000):
        found = top1(*answers(*table))
        held += found.low <= ours - other <= found.high
    assert held / 2000 >= 0.94


def test_macro_recall_counts_each_class_alike() -> None:
    actual = np.repeat([0, 1], [90, 10])
    ours, other = actual.copy(), actual.copy()
    other[90:95] = 0  # half of the rare class
    found = macro_recall(actual, ours, other)
    assert found.value == pytest.approx(0.25)
    assert top1(actual, ours, other).value == pytest.approx(0.05)
    # by hand: classes of 90 and 10 images, two added to each
    errors = [sqrt(1) / 92, sqrt(6 - 25 / 12) / 12]
    middle = (0 + 5 / 12) / 2
    assert found.low == pytest.approx(middle - 1.96 * sqrt(sum(e**2 for e in errors)) / 2, abs=1e-5)
    assert found.low < found.value < found.high


def test_mcnemars_exact_test() -> None:
    """Of 12 images that tell, 2 speak for ours: as likely as at most 2 heads of 12."""
    assert worse(*answers(50, 2, 10, 5)) == pytest.approx(binom.cdf(2, 12, 0.5))
    assert worse(*answers(50, 0, 0, 5)) == 1


@pytest.mark.parametrize("spread", [0.003, 0.006, 0.01])
def test_the_gain_over_three_seeds_holds_the_truth(spread: float) -> None:
    """A true gain of one point on 5,000 images, of trainings whose gains differ by so much beside the images.

    An interval of one seed's images is of that pair of networks: it misses the gain of distilling.
    """
    rng = np.random.default_rng(1)
    held, by_images, trials, truth = 0, 0, 400, 0.01
    actual = np.zeros(5000, np.int64)
    for _ in range(trials):
        ours, other = np.ones((2, 3, 5000), np.int64)
        for seed in range(3):
            gain = truth + rng.normal(0, spread)
            kinds = rng.choice(4, 5000, p=[0.8, 0.03 + gain / 2, 0.03 - gain / 2, 0.14])
            ours[seed][kinds <= 1] = 0
            other[seed][(kinds == 0) | (kinds == 2)] = 0
        value, half = paired.gain(actual, ours, other)
        assert half is not None
        held += abs(value - truth) <= half
        first = top1(actual, ours[0], other[0])
        by_images += first.low <= truth <= first.high
    assert held / trials >= 0.95
    assert by_images / trials < 0.9


def test_a_difference_is_said_in_points() -> None:
    assert str(Difference(0.0176, -0.003, 0.0391)) == "+1.8 points (95 % interval -0.3 to +3.9)"

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


def test_without_groups_and_with_groups_of_one_the_interval_is_the_same() -> None:
    value = np.random.default_rng(3).choice([-1.0, 0.0, 1.0], 400, p=[0.05, 0.85, 0.1])
    one, other = paired.difference(value), paired.difference(value, np.arange(400))
    assert (other.value, other.low, other.high) == pytest.approx((one.value, one.low, one.high), abs=1e-4)


def test_an_interval_by_groups_is_that_of_scipys_bootstrap_over_groups() -> None:
    """Where groups are many, the two must agree; images alone would say half of it."""
    from scipy.stats import bootstrap

    rng = np.random.default_rng(4)
    groups = np.repeat(np.arange(300), rng.integers(2, 8, 300))
    tendency = rng.normal(0.05, 0.25, 300)
    value = (rng.random(len(groups)) < np.abs(tendency[groups])) * np.sign(tendency[groups])
    found = paired.difference(value, groups)
    sums, sizes = np.bincount(groups, weights=value), np.bincount(groups)
    drawn = bootstrap(
        (sums, sizes), lambda a, b: a.sum() / b.sum(), paired=True, vectorized=False, method="percentile",
        n_resamples=2000, rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    width = drawn.high - drawn.low
    assert found.low == pytest.approx(drawn.low, abs=0.1 * width)
    assert found.high == pytest.approx(drawn.high, abs=0.1 * width)
    alone = paired.difference(value)
    assert alone.high - alone.low < 0.8 * width


def test_intervals_of_few_groups_hold_the_truth_as_often_as_they_say() -> None:
    """Twelve groups whose images err together: 95 of 100 intervals, within three standard errors of that."""
    rng, held = np.random.default_rng(6), 0
    groups = np.repeat(np.arange(12), 20)
    for _ in range(500):
        lean = rng.normal(0, 0.3, 12)
        value = (rng.random(240) < np.abs(lean[groups])) * np.sign(lean[groups])
        held += paired.difference(value, groups).low <= 0 <= paired.difference(value, groups).high
    assert held >= 500 * 0.95 - 3 * sqrt(500 * 0.95 * 0.05)


def test_one_group_says_nothing_of_others() -> None:
    assert paired.difference(np.ones(100), np.zeros(100, int)) == Difference(1.0, -1.0, 1.0)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (5, 0), (8, 3), (3, 8), (40, 25)])
def test_the_chance_of_a_loss_is_mcnemars(lost: int, won: int) -> None:
    from scipy.stats import binomtest

    value = np.repeat([-1, 1, 0], [lost, won, 50])
    expected = binomtest(lost, lost + won, alternative="greater").pvalue if lost + won else 1.0
    assert paired.no_worse(value) == pytest.approx(expected)
    assert paired.no_worse(value, np.arange(len(value))) == pytest.approx(expected)


def test_the_chance_of_a_loss_by_groups_is_scipys_permutation_test() -> None:
    from scipy.stats import permutation_test

    rng = np.random.default_rng(7)
    groups = np.repeat(np.arange(11), rng.integers(1, 7, 11))
    value = rng.choice([-1, 0, 1], len(groups), p=[0.35, 0.5, 0.15])
    sums = np.bincount(groups, weights=value)
    exact = permutation_test(
        (sums, np.zeros(11)), lambda a, b: (a - b).sum(), permutation_type="samples", vectorized=False,
        n_resamples=np.inf, alternative="less",
    )  # fmt: skip
    assert paired.no_worse(value, groups) == pytest.approx(exact.pvalue)

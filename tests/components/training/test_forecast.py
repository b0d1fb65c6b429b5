"""The forecast of what distilling changes, asked about distillations that it was not fitted to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from components.training import forecast
from components.training.forecast import Said, Setting, features, right_when_sure
from tests.components.training.planted import Plant, digits, grow

# the causes are planted, and pull both ways; none of these images, networks or settings was used to fit
PLANTS = [
    Plant("a good teacher, no pool", per_class=10, teacher_more=100, student=64, noise=0.3),
    Plant("a few labels, a pool", per_class=5, pool=700),
    Plant("a few labels, a pool, labels mixed in", per_class=5, pool=700, share=0.5),
    Plant("ten labels a class, a pool", per_class=10, pool=700),
    Plant("a teacher that was hardly trained", per_class=30, teacher_steps=15),
    Plant("a teacher of wrong labels", per_class=30, teacher_noise=0.7),
    Plant("a teacher of a third of the images, no pool", per_class=20, teacher_part=0.3),
    Plant("a teacher of wrong labels, and a pool", per_class=20, pool=500, teacher_noise=0.8),
    Plant("a tiny teacher", per_class=30, teacher=2),
    Plant("a few noisy labels, a pool", per_class=8, pool=700, noise=0.2),
]


def said(teacher: str, alone: str, sure: list[float] | None = None) -> Said:
    """Ten images of class 0, on which each is right (+) or wrong (-)."""
    actual = np.zeros(len(teacher), np.int64)
    answers = [np.array([0 if mark == "+" else 1 for mark in marks]) for marks in (teacher, alone)]
    return Said(actual, *answers, np.array(sure or [0.5] * len(teacher), np.float32))


def test_the_numbers_by_hand() -> None:
    """Top-1 of 0.8 and 0.5; as many chosen images as labelled ones; a fifth of the loss is the labels'."""
    both = said("++++++++--", "+++++-----", [0.9] * 8 + [0.1] * 2)
    found = features(both, Setting(2, 100, 200, 100, label_share=0.2, learnt=0.9))
    assert found["imitation"] == pytest.approx(0.9**2 * 0.3)
    # the surest half of each class that it sees: four of eight right ones, one of two wrong ones
    assert right_when_sure(both, 0.5) == pytest.approx(4 / 5)
    assert found["mistaken"] == pytest.approx((0.8 * 0.1 + 0.2) / 2)
    assert found["more"] == pytest.approx(0.5 * (1 - 2**-0.25) * 0.8)
    assert found["together"] == 0
    three = features(both, Setting(2, 100, 200, 100, label_share=0.2, learnt=0.9, members=3))
    assert three["together"] == pytest.approx(0.5 * 3 / 4)


def test_what_a_better_teacher_and_more_images_do() -> None:
    setting = Setting(10, 100, 0, 0, label_share=0.0, learnt=0.9)
    better, worse = said("+++++++++-", "+++++-----"), said("+++-------", "+++++-----")
    assert forecast.forecast(better, setting).value > 0 > forecast.forecast(worse, setting).value
    mixed = replace(setting, label_share=0.5)
    assert forecast.forecast(worse, mixed).value > forecast.forecast(worse, setting).value
    pool = replace(setting, unlabelled=400, chosen=400)
    assert forecast.forecast(worse, pool).value < forecast.forecast(better, pool).value


def test_a_short_control_makes_it_wider() -> None:
    both = said("++++++++--", "+++++-----")
    whole = Setting(10, 100, 0, 0, label_share=0.0, learnt=0.9)
    short = replace(whole, done=0.1)
    one, two = forecast.forecast(both, whole), forecast.forecast(both, short)
    assert two.value == one.value
    assert two.high - two.low > one.high - one.low


# (student alone and forecast without a committee, on validation; what a committee of two brought, on test):
# CIFAR-10, then photographs of clothing; 15 labels a class and an unlabelled pool
DISTILLED = [
    (0.427, -0.007, 0.068), (0.443, -0.017, 0.081), (0.510, -0.027, 0.070),
    (0.561, 0.017, 0.098), (0.505, -0.058, 0.061), (0.542, -0.030, 0.053),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "others"), [(slice(0, 3), slice(3, 6)), (slice(3, 6), slice(0, 3))])
def test_what_a_committee_brings_is_told_of_the_other_data_set(ours: slice, others: slice) -> None:
    """The weight is the mean of both sets'; fitted to either alone it foretells the other one."""
    parts = 2 / 3
    weight = np.mean([(gain - before) / ((1 - alone) * parts) for alone, before, gain in DISTILLED[ours]])
    assert weight == pytest.approx(forecast.WEIGHTS["together"], abs=0.05)
    for alone, before, gain in DISTILLED[others]:
        assert before + weight * (1 - alone) * parts == pytest.approx(gain, abs=forecast.Z * forecast.SPREAD)


@pytest.mark.slow
def test_its_sign_is_right_in_nine_of_ten() -> None:
    images, wrong, held = digits(), [], 0
    for number, plant in enumerate(PLANTS):
        grown = grow(images, plant, seed=number)
        found = forecast.forecast(grown.said, grown.setting)
        print(f"{plant.name}: forecast {found}, gain {100 * grown.gain:+.1f} +- {100 * grown.spread:.1f}")
        if np.sign(found.value) != np.sign(grown.gain):
            wrong.append(plant.name)
        held += found.low <= grown.gain <= found.high
    assert len(wrong) <= 1, wrong
    assert held >= 9, "and its interval holds what came"

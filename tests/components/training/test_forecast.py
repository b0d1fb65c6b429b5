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

"""Whether new images look otherwise: the statistic against scipy's, and when it speaks."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import energy_distance

from components.retraining import look
from components.retraining.look import Answers


def test_the_statistic_is_the_energy_distance() -> None:
    """Of one dimension scipy has it: the root of 2 A - B - C."""
    random = np.random.default_rng(0)
    one, other = random.normal(0, 1, 40), random.normal(0.7, 1.5, 60)
    found = look.energy(np.concatenate([one, other])[:, None], 40, np.random.default_rng(1))
    between = np.abs(one[:, None] - other[None]).mean()
    assert found.distance == pytest.approx(energy_distance(one, other) ** 2 / (2 * between))


def answers(random: np.random.Generator, counts: dict[str, int], shift: float = 0.0) -> Answers:
    """Features around a mean of each class, which the champion says rightly."""
    names = np.repeat(list(counts), list(counts.values()))
    means = np.array([{"a": 0.0, "b": 4.0}[name] for name in names])
    features = random.normal(means[:, None] + shift, 1.0, (len(names), 8)).astype(np.float32)
    return Answers(features, names, names)


def test_another_mix_of_classes_is_no_other_look() -> None:
    random = np.random.default_rng(2)
    found = look.drift(answers(random, {"a": 200, "b": 20}), answers(random, {"a": 20, "b": 200}), 0)
    assert found is not None
    assert found.images == 40, "as many of each class on both sides"
    assert found.p > 0.01
    moved = look.drift(
        answers(random, {"a": 100, "b": 100}), answers(random, {"a": 100, "b": 100}, shift=1.0), 0
    )
    assert moved is not None
    assert moved.p <= 0.01
    assert moved.distance > found.distance


def test_chance_alone_speaks_as_often_as_it_may() -> None:
    random = np.random.default_rng(3)
    ps = [
        found.p
        for _ in range(40)
        if (found := look.drift(answers(random, {"a": 30}), answers(random, {"a": 30}), 0)) is not None
    ]
    assert sum(p <= 0.05 for p in ps) <= 6, "binomial: more has a chance of 1 in 300"


def test_of_few_images_nothing_is_said() -> None:
    random = np.random.default_rng(4)
    assert look.drift(answers(random, {"a": 19}), answers(random, {"a": 300}), 0) is None
    assert look.drift(answers(random, {"a": 4, "b": 4}), answers(random, {"a": 4, "b": 4}), 0) is None

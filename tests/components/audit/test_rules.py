"""The rules on features that are drawn here: what one class's synthetic images cost two others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from components.audit import rules
from components.audit.counts import Counts
from components.audit.features import SIDE
from components.audit.params import AuditParams
from components.audit.probe import Folded
from components.audit.rows import Rows
from components.step import StepContext
from components.tracking.tracker import Tracker

CLASSES, EACH, MADE = 6, 200, 600


def test_a_culprit_of_two_classes_is_halved_once_and_its_files_are_named_once() -> None:
    """Nearly half each of class 0's synthetic images look like classes 1 and 2, which lose recall by them."""
    rng = np.random.default_rng(0)
    centre = 1.7 * np.eye(CLASSES, 12)
    real = np.repeat(np.arange(CLASSES), EACH)
    alike = rng.choice(3, MADE, p=[0.1, 0.45, 0.45])
    vectors = np.concatenate([rng.normal(centre[real]), rng.normal(1.2 * centre[alike])]).astype(np.float32)
    place = np.concatenate([real, np.zeros(MADE, np.int64)])
    made = np.arange(len(place)) >= len(real)
    held = ~made & (np.arange(len(place)) % EACH >= 140)
    rows = Rows(
        path=[f"{at}.png" for at in range(len(place))],
        place=place,
        split=np.where(held, "val", "train").astype(object),
        source=np.where(made, "synthetic", "real").astype(object),
        vectors=vectors,
        small=rng.integers(0, 255, (len(place), SIDE, SIDE)).astype(np.uint8),
    )
    train = np.zeros((CLASSES, 3), np.int64)
    train[:, 0], train[0, 1] = 140, MADE
    counts = Counts(
        np.arange(CLASSES), [f"class {c}" for c in range(CLASSES)], train, np.full(CLASSES, 60),
        np.zeros(CLASSES, np.int64),
    )  # fmt: skip
    params = AuditParams()
    run = StepContext("audit-synthetic", params, Path("out"), Tracker("audit-synthetic", params.registry))
    classes = rules.blow_up(run, counts, 100.0)
    before = classes[0].weight
    judging = Folded(vectors[~made], place[~made], CLASSES, params.general.seed)
    told = judging.scores(0.1).argmax(axis=1)
    samples = rules.degradation(run, counts, rows, classes, 0.1, judging, told)
    degraded = [f.subject for f in run.report.findings if f.rule == "synthetic.degradation"]
    assert len(degraded) >= 2, degraded
    assert classes[0].weight == before * rules.HARM
    assert samples
    assert len({one.path for one in samples}) == len(samples)


def two_classes(seed: int, noise: bool) -> list[rules.Class]:
    """What rule 2 says of two classes of bars, across and upright, with 60 synthetic images each.

    Args:
        noise: the synthetic images show nothing; else bars, as the real ones.
    """
    rng = np.random.default_rng(seed)
    each, made_each = 40, 60
    place = np.concatenate([np.repeat([0, 1], each), np.repeat([0, 1], made_each)])
    made = np.arange(len(place)) >= 2 * each
    shown = np.repeat(rng.integers(0, 255, (len(place), SIDE, 1)), SIDE, axis=2)
    small = np.where(place[:, None, None] == 0, shown, shown.swapaxes(1, 2)).astype(np.uint8)
    vectors = rng.normal(np.where(place[:, None] == 0, 1.0, -1.0), 1.0, (len(place), 10))
    if noise:
        small[made] = rng.integers(0, 255, (2 * made_each, SIDE, SIDE))
        vectors[made] = rng.normal(0, 1.0, (2 * made_each, 10))
    rows = Rows(
        path=[f"{at}.png" for at in range(len(place))], place=place,
        split=np.full(len(place), "train", object),
        source=np.where(made, "synthetic", "real").astype(object), vectors=vectors, small=small,
    )  # fmt: skip
    train = np.array([[each, made_each, 0], [each, made_each, 0]])
    counts = Counts(np.arange(2), ["across", "upright"], train, np.zeros(2, int), np.zeros(2, int))
    params = AuditParams()
    run = StepContext("audit-synthetic", params, Path("out"), Tracker("audit-synthetic", params.registry))
    classes = rules.blow_up(run, counts, 100.0)
    told = Folded(vectors[~made], place[~made], 2, 0).scores(0.1).argmax(axis=1)
    rules.recognisable(run, params, counts, rows, classes, 0.1, told)
    named = [f.subject for f in run.report.findings if f.rule == "synthetic.recognisable"]
    assert len(named) == sum(one.unrecognisable for one in classes)
    return classes


@pytest.mark.parametrize("seed", range(4))
def test_noise_in_two_classes_is_not_recognised_by_two_tries(seed: int) -> None:
    """Either of two classifiers is right for three in four by chance, and the limit is 70 %."""
    classes = two_classes(seed, noise=True)
    assert any(one.unrecognisable for one in classes)
    for one in classes:
        assert not one.unrecognisable or one.weight <= 0.7, "hits by chance give no weight"


@pytest.mark.parametrize("seed", range(2))
def test_synthetic_images_like_real_ones_are_recognised(seed: int) -> None:
    assert not any(one.unrecognisable for one in two_classes(seed, noise=False))


def test_what_two_tries_do_better_than_chance() -> None:
    """Worked out by hand: as one classifier that does as much better than chance would be right."""
    zeros, ones = np.zeros(4, int), np.ones(4, int)
    assert rules._beyond_chance(zeros, zeros, 0, 2) == 1.0
    assert rules._beyond_chance(ones, ones, 0, 2) == 0.0
    # one says this class to every image, the other one the other: right for all, and no better than chance
    assert rules._beyond_chance(zeros, ones, 0, 2) == 0.5
    # hits 3 of 4; another one of 99 is said to 2 of 4, each to a 99th: 0.75 - 0.5 / 99, times 0.99, plus 0.01
    told, also = np.array([0, 0, 5, 5]), np.array([0, 0, 0, 5])
    assert rules._beyond_chance(told, also, 0, 100) == pytest.approx((0.75 - 0.5 / 99) * 0.99 + 0.01)

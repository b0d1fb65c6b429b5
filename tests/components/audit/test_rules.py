"""The rules on features that are drawn here: what one class's synthetic images cost two others."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from components.audit import rules
from components.audit.counts import Counts
from components.audit.features import SIDE
from components.audit.params import AuditParams
from components.audit.rows import Rows
from components.common.step import Run
from components.common.tracking import Tracker

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
    run = Run("audit-synthetic", params, Path("out"), Tracker("audit-synthetic", params.registry))
    classes = rules.blow_up(run, counts, 100.0)
    before = classes[0].weight
    samples = rules.degradation(run, params, counts, rows, classes, 0.1)
    degraded = [f.subject for f in run.report.findings if f.rule == "synthetic.degradation"]
    assert len(degraded) >= 2, degraded
    assert classes[0].weight == before * rules.HARM
    assert samples
    assert len({one.path for one in samples}) == len(samples)

"""What is said of trained networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from components.common.params import StepParams
from components.common.step import Run
from components.common.tracking import Tracker
from components.training.distill import _gain
from components.training.results import paired_gain


def test_paired_gain() -> None:
    actual = np.zeros(100, dtype=np.int64)
    ours, other = actual.copy(), actual.copy()
    ours[:5], other[3:15] = 1, 1  # wrong: ours 5, other 12, both 2
    gain, half = paired_gain(actual, ours, other)
    assert gain == pytest.approx(0.07)
    # 10 images speak for us, 3 against: variance (13/100 - 0.07^2)
    assert half == pytest.approx(1.96 * (0.13 - 0.07**2) ** 0.5 / 10)


@pytest.mark.parametrize(("wrong", "level"), [(30, "warning"), (3, "info"), (0, "info")])
def test_a_student_clearly_below_its_control_is_a_warning(wrong: int, level: str, tmp_path: Path) -> None:
    """Clearly: the whole interval of the difference, image by image, is below zero."""
    actual = np.zeros(100, dtype=np.int64)
    ours, control = actual.copy(), actual.copy()
    ours[:wrong], control[99] = 1, 1
    params = StepParams()
    run = Run("distill", params, tmp_path, Tracker("distill", params.registry))
    none = np.empty(0, dtype=np.int64)
    said = {"student": {"val": ours, "test": none}, "control": {"val": control, "test": none}}
    _gain(run, {"val": actual, "test": none}, said)
    (finding,) = run.report.findings
    assert (finding.rule, finding.level) == ("distill.gain", level)
    assert ("export --of teacher" in finding.advice) is (level == "warning")

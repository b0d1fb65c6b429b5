"""What is said of trained networks."""

from __future__ import annotations

import numpy as np
import pytest

from components.training.results import paired_gain


def test_paired_gain() -> None:
    actual = np.zeros(100, dtype=np.int64)
    ours, other = actual.copy(), actual.copy()
    ours[:5], other[3:15] = 1, 1  # wrong: ours 5, other 12, both 2
    gain, half = paired_gain(actual, ours, other)
    assert gain == pytest.approx(0.07)
    # 10 images speak for us, 3 against: variance (13/100 - 0.07^2)
    assert half == pytest.approx(1.96 * (0.13 - 0.07**2) ** 0.5 / 10)

"""How far scores may move: the tolerance, or float32's rounding of large logits."""

from __future__ import annotations

import numpy as np
import pytest

from components.export.parity import MARGIN, MOST_ROUNDING, ROUNDING, Comparison, rounding, softmax

TOLERANCE = 1e-4


def moved(logits: list[float], by: float, tolerance: float = TOLERANCE) -> Comparison:
    """One image whose first logit is moved by ``by`` in the exported file."""
    network = np.array([logits], np.float32)
    other = network + np.array([[by] + [0.0] * (len(logits) - 1)], np.float64)
    comparison = Comparison(tolerance)
    comparison.add(network, softmax(other), np.array([0]))
    return comparison


def test_scores_are_the_softmax_of_the_logits() -> None:
    assert softmax(np.array([[np.log(3.0), 0.0], [900.0, 900.0]])) == pytest.approx(
        np.array([[0.75, 0.25], [0.5, 0.5]])
    )


# two logits that differ by 0.3 have scores of 0.57 and 0.43: one of them moved by d moves both by 0.245 d
@pytest.mark.parametrize(
    ("logits", "by", "holds"),
    [
        ([0.3, 0.0], 3e-4, True),  # 7e-5: within the tolerance
        ([0.3, 0.0], 6e-4, False),  # 1.5e-4: small logits round to far less
        ([80.3, 80.0], 6e-4, True),  # 1.5e-4: 0.7e-5 of the largest logit, as float32 kernels differ
        ([80.3, 80.0], 4e-3, False),  # 1e-3: more than rounding
        ([80.0, -80.0], 0.5, True),  # logits that matter to no score may move
    ],
)
def test_rounding_of_large_logits_is_no_fault_and_anything_more_is(
    logits: list[float], by: float, holds: bool
) -> None:
    comparison = moved(logits, by)
    assert comparison.holds is holds
    assert not comparison.different_ids


def test_another_class_is_a_tie_only_within_the_limit() -> None:
    tie = moved([80.0, 80.0 + 1e-4], 3e-4)
    assert (tie.ties, tie.different_ids, tie.holds) == (1, 0, True)
    other = moved([80.0, 80.01], 0.02)
    assert (other.ties, other.different_ids, other.holds) == (0, 1, False)


def test_a_network_without_finite_logits_is_equal_to_nothing() -> None:
    comparison = Comparison(TOLERANCE)
    comparison.add(np.array([[np.nan, 0.0]], np.float32), np.array([[0.5, 0.5]]), np.array([0]))
    assert not comparison.holds
    assert "logits of the network" in comparison.failure


def test_a_network_is_allowed_what_float32_takes_from_it_and_no_more_than_a_bound() -> None:
    """A network that hardly learned was called a bad export: float32 itself was 8e-6 of its logits off."""
    exact = np.array([[80.3, 80.0]])
    assert rounding((exact * (1 + 1e-7)).astype(np.float32), exact) == ROUNDING
    assert rounding(exact * (1 + 8e-6), exact) == pytest.approx(MARGIN * 8e-6)
    assert rounding(exact * (1 + 1e-2), exact) == MOST_ROUNDING
    assert rounding(exact * np.nan, exact) == ROUNDING
    # 2.4e-4 of a score, where 1e-5 of the largest logit would allow 1.4e-4
    network = np.array([[28.3, 28.0]])
    other = softmax(network + np.array([[1e-3, 0.0]]))
    for allowed, holds in ((ROUNDING, False), (MARGIN * 8e-6, True)):
        comparison = Comparison(TOLERANCE, allowed)
        comparison.add(network, other, np.array([0]))
        assert comparison.holds is holds

"""DIST: correlations against numpy's, and what it must not see."""

import numpy as np
import pytest
import torch

from components.training.tasks.dist import DIST, correlation, relations

torch.manual_seed(3)
STUDENT, TEACHER = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)


def test_correlations_are_numpys() -> None:
    p, q = STUDENT.softmax(1), TEACHER.softmax(1)
    inter, intra = relations(STUDENT, q, 1.0)
    images = [1 - np.corrcoef(p[i], q[i])[0, 1] for i in range(6)]
    classes = [1 - np.corrcoef(p[:, c], q[:, c])[0, 1] for c in range(5)]
    assert inter.tolist() == pytest.approx(images, rel=1e-6)
    assert intra.tolist() == pytest.approx(classes, rel=1e-6)
    whole = DIST.divergence(STUDENT, q, 1.0).mean().item()
    assert whole == pytest.approx(np.mean(images) + np.mean(classes), rel=1e-6)


def test_a_temperature_softens_both_and_keeps_the_gradients_size() -> None:
    p, q = (STUDENT / 2).softmax(1), (TEACHER / 2).softmax(1)
    inter, _ = relations(STUDENT, TEACHER.softmax(1), 2.0)
    expected = [4 * (1 - np.corrcoef(p[i], q[i])[0, 1]) for i in range(6)]
    assert inter.tolist() == pytest.approx(expected, rel=1e-6)


def test_by_hand() -> None:
    # deviations [-1, 0, 1] and [-1, 2, -1]: no relation; of [1, 3] and [2, 8]: all of it
    a = torch.tensor([[1.0, 2.0, 3.0]])
    assert correlation(a, torch.tensor([[1.0, 4.0, 1.0]])).item() == pytest.approx(0)
    assert correlation(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 8.0]])).item() == pytest.approx(1)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_classifier_that_begins_with_zeros_learns_without_a_leap(rows: int) -> None:
    logits = torch.zeros(rows, 3, requires_grad=True)
    DIST.divergence(logits, TEACHER[:rows, :3].softmax(1).float(), 1.0).mean().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert 0 < logits.grad.norm() < 100
    steps = torch.zeros(rows, 3, requires_grad=True)
    optimizer = torch.optim.SGD([steps], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        DIST.divergence(steps, TEACHER[:rows, :3].softmax(1).float(), 1.0).mean().backward()
        optimizer.step()
    assert (steps.argmax(1) == TEACHER[:rows, :3].argmax(1)).all()

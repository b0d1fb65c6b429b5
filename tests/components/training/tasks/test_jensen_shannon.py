"""The Jensen-Shannon divergence against values worked out by hand."""

from math import log

import pytest
import torch

from components.training.tasks.jensen_shannon import js_divergence

# two classes: logits [0, ln 3] give p = [1/4, 3/4]; [0, 0] give [1/2, 1/2]
LOGITS = torch.tensor([[0.0, log(3)], [0.0, 0.0]])


def test_by_hand() -> None:
    teacher = torch.tensor([[0.5, 0.5]])
    # p = [1/4, 3/4], q = [1/2, 1/2], m = [3/8, 5/8]
    p_m = 0.25 * log(0.25 / 0.375) + 0.75 * log(0.75 / 0.625)
    q_m = 0.5 * log(0.5 / 0.375) + 0.5 * log(0.5 / 0.625)
    assert js_divergence(LOGITS[:1], teacher).item() == pytest.approx((p_m + q_m) / 2)
    assert js_divergence(LOGITS, LOGITS.softmax(1)).tolist() == pytest.approx([0, 0], abs=1e-7)
    certain = js_divergence(torch.tensor([[200.0, -200.0]]), torch.tensor([[0.0, 1.0]]))
    assert certain.item() == pytest.approx(log(2)), "bounded, whatever the two say"


def test_it_moves_the_student_towards_a_certain_teacher() -> None:
    logits = torch.zeros(1, 3, requires_grad=True)
    js_divergence(logits, torch.tensor([[1.0, 0.0, 0.0]])).mean().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] < 0 < logits.grad[0, 1]

"""Symmetric KL / 2: by hand, against the reference's formula, and by its gradient."""

from math import log, sqrt

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from components.training.tasks import task_of
from components.training.tasks.jensen_shannon import js_divergence
from components.training.tasks.kd import softened_kl
from components.training.tasks.ssld import symmetric_kl

# two classes: logits [0, ln 3] give p = [1/4, 3/4]
LOGITS = torch.tensor([[0.0, log(3)]])
TEACHER = torch.tensor([[0.5, 0.5]])


def published(student: Tensor, teacher: Tensor) -> Tensor:
    """As PaddleClas states its DMLLoss: probabilities, their logarithms, and KL in both directions.

    Each is summed over classes and averaged over the batch; no class count, no epsilon.
    """
    p, q = student.softmax(1), teacher.softmax(1)
    there = functional.kl_div(p.log(), q, reduction="batchmean")
    back = functional.kl_div(q.log(), p, reduction="batchmean")
    return (there + back) / 2


def gradient(value: Tensor, by: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(value, by)
    return found


def test_by_hand() -> None:
    # p = [1/4, 3/4], q = [1/2, 1/2]: KL(p||q) = ln 2 - H(p), KL(q||p) = (ln 2 + ln 2/3) / 2
    there = 0.25 * log(0.5) + 0.75 * log(1.5)
    back = 0.5 * log(2) + 0.5 * log(2 / 3)
    assert symmetric_kl(LOGITS, TEACHER).item() == pytest.approx((there + back) / 2)
    assert symmetric_kl(LOGITS, LOGITS.softmax(1)).item() == pytest.approx(0, abs=1e-7)


def test_its_gradient_by_hand() -> None:
    logits = LOGITS.clone().requires_grad_()
    found = gradient(symmetric_kl(logits, TEACHER).sum(), logits)
    # (p - q + p (ln p/q - KL(p||q))) / 2; the first class: p = 1/4, q = 1/2, ln p/q = -ln 2
    kl = 0.25 * log(0.5) + 0.75 * log(1.5)
    first = (0.25 - 0.5 + 0.25 * (-log(2) - kl)) / 2
    assert found.tolist()[0] == pytest.approx([first, -first])


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_it_is_what_the_reference_computes(classes: int) -> None:
    torch.manual_seed(classes)
    student = (2 * torch.randn(8, classes, dtype=torch.float64)).requires_grad_()
    teacher = 3 * torch.randn(8, classes, dtype=torch.float64)
    ours, theirs = symmetric_kl(student, teacher.softmax(1)).mean(), published(student, teacher)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    torch.testing.assert_close(gradient(ours, student), gradient(theirs, student), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("classes", "published", "shannon", "kl"),
    [(10, 0.63, 0.104, 0.84), (1_000, 0.454, 0.0034, 0.90), (100_000, 0.45, 5.7e-5, 0.90)],
)
def test_gradients_where_a_classifier_begins(
    classes: int, published: float, shannon: float, kl: float
) -> None:
    """Before a teacher that gives 90 % to one class: the true divergence vanishes with many classes."""
    logits = torch.zeros(1, classes, dtype=torch.float64, requires_grad=True)
    teacher = torch.full((1, classes), 0.1 / (classes - 1), dtype=torch.float64)
    teacher[0, 0] = 0.9
    norms = [
        gradient(value.sum(), logits).norm().item()
        for value in (
            symmetric_kl(logits, teacher), js_divergence(logits, teacher), softened_kl(logits, teacher, 1.0),
        )
    ]  # fmt: skip
    assert norms == pytest.approx([published, shannon, kl], rel=0.015)


def test_the_gradients_scale_against_cross_entropys() -> None:
    scales = {name: task_of(name).gradient_scale(1000, None) for name in ("ssld", "js", "kd", "labels")}
    # p = 1/C: p - q is .899 at the teacher's class; ssld's other half is p (ln p/q - KL), next to nothing
    q, rest = 0.9, 0.1 / 999
    kl = (log(0.001 / q) + 999 * log(0.001 / rest)) / 1000
    first = (0.001 - q + 0.001 * (log(0.001 / q) - kl)) / 2
    other = (0.001 - rest + 0.001 * (log(0.001 / rest) - kl)) / 2
    whole = sqrt((0.001 - q) ** 2 + 999 * (0.001 - rest) ** 2)
    assert scales["ssld"] == pytest.approx(sqrt(first**2 + 999 * other**2) / whole, rel=1e-6)
    assert scales["kd"] == pytest.approx(1, rel=1e-6)
    assert scales["labels"] == 1
    assert scales["js"] == pytest.approx(0.0034 / 0.9, rel=0.02)

"""Softened KL: by hand, and against torch's cross-entropy."""

from math import log, sqrt

import pytest
import torch
from torch.nn import functional

from components.training.params import Distill
from components.training.tasks import task_of
from components.training.tasks.kd import softened_kl


def test_by_hand() -> None:
    # at T = 2: student [0, ln 9 / 2] = [0, ln 3] gives [1/4, 3/4]; teacher [0, 0] stays [1/2, 1/2]
    student, teacher = torch.tensor([[0.0, log(9)]]), torch.tensor([[0.5, 0.5]])
    assert softened_kl(student, teacher, 2.0).item() == pytest.approx(4 * (log(2) + log(2 / 3)) / 2)
    # teacher [9/10, 1/10] at T = 2: in the ratio of 3 to 1
    even = torch.zeros(1, 2)
    expected = 4 * (0.75 * log(0.75 / 0.5) + 0.25 * log(0.25 / 0.5))
    assert softened_kl(even, torch.tensor([[0.9, 0.1]]), 2.0).item() == pytest.approx(expected)


def test_its_gradient_is_t_times_the_difference_of_softened_answers() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    student.requires_grad_()
    (found,) = torch.autograd.grad(softened_kl(student, teacher.softmax(1), 3.0).sum(), student)
    expected = 3 * ((student / 3).softmax(1) - (teacher / 3).softmax(1))
    torch.testing.assert_close(found, expected.detach())


def test_without_temperature_it_is_cross_entropy_but_for_a_constant() -> None:
    torch.manual_seed(0)
    student, teacher = (
        torch.randn(4, 5, dtype=torch.float64),
        torch.randn(4, 5, dtype=torch.float64).softmax(1),
    )
    theirs = functional.cross_entropy(student, teacher, reduction="none") - torch.special.entr(teacher).sum(1)
    torch.testing.assert_close(softened_kl(student, teacher, 1.0), theirs)


def test_a_temperature_makes_gradients_smaller_where_classes_are_many() -> None:
    warm = task_of("kd").gradient_scale(1000, Distill(temperature=2.0))
    # softened by 2, .9 against .1 / 999 is sqrt(.9) / (sqrt(.9) + 999 sqrt(.1 / 999)) = .0867
    top = sqrt(0.9) / (sqrt(0.9) + sqrt(0.1 * 999))
    expected = 2 * sqrt((top - 0.001) ** 2 + ((1 - top) / 999 - 0.001) ** 2 * 999)
    assert warm == pytest.approx(expected / 0.8995, rel=1e-3)

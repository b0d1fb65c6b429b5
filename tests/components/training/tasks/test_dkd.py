"""Decoupled KL: its parts by hand, and that they add up to KL."""

from math import log

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from components.training.augmentation import Mix
from components.training.tasks import dkd
from components.training.tasks.dkd import decoupled_kl
from components.training.tasks.kd import softened_kl
from tests.components.training.tasks import teaching

torch.manual_seed(2)
STUDENT, TEACHER = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
TARGET = torch.tensor([0, 1, 4, 2])


def parts(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD from probabilities, without logarithms of sums."""
    p, q = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    is_target = functional.one_hot(target, p.shape[1]).bool()
    binary_p, binary_q = (torch.stack([x[is_target], 1 - x[is_target]], 1) for x in (p, q))
    others_p, others_q = (x[~is_target].view(len(x), -1) for x in (p, q))
    others_p, others_q = (x / x.sum(1, keepdim=True) for x in (others_p, others_q))
    return (
        (binary_q * (binary_q / binary_p).log()).sum(1),
        (others_q * (others_q / others_p).log()).sum(1),
    )


def test_by_hand() -> None:
    # p = [1/2, 1/4, 1/4], q = [3/4, 1/6, 1/12], target 0
    student, teacher = torch.tensor([[log(2), 0.0, 0.0]]), torch.tensor([[3 / 4, 1 / 6, 1 / 12]])
    tckd = 0.75 * log(0.75 / 0.5) + 0.25 * log(0.25 / 0.5)
    nckd = 2 / 3 * log((2 / 3) / 0.5) + 1 / 3 * log((1 / 3) / 0.5)
    found = decoupled_kl(student, teacher, torch.tensor([0]), 1.0).item()
    assert found == pytest.approx(dkd.ALPHA * tckd + dkd.BETA * nckd, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_its_parts(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    tckd, nckd = parts(STUDENT, TEACHER, TARGET, temperature)
    found = decoupled_kl(STUDENT, TEACHER.softmax(1), TARGET, temperature)
    expected = temperature**2 * (dkd.ALPHA * tckd + dkd.BETA * nckd)
    torch.testing.assert_close(found, expected)
    # eq. 5: KL is TCKD and NCKD, the latter as much as the teacher doubts
    monkeypatch.setattr(dkd, "ALPHA", 1.0)
    q = (TEACHER / temperature).softmax(1)
    monkeypatch.setattr(dkd, "BETA", 1 - q.gather(1, TARGET[:, None]).squeeze(1))
    whole = decoupled_kl(STUDENT, TEACHER.softmax(1), TARGET, temperature)
    torch.testing.assert_close(whole, softened_kl(STUDENT, TEACHER.softmax(1), temperature))


def test_two_classes_leave_nothing_among_the_others() -> None:
    student, teacher = torch.tensor([[0.0, log(3)]]), torch.tensor([[0.5, 0.5]])
    expected = dkd.ALPHA * (0.5 * log(2) + 0.5 * log(2 / 3))
    assert decoupled_kl(student, teacher, torch.tensor([1]), 1.0).item() == pytest.approx(expected)


def test_the_target_is_the_label_or_else_what_the_teacher_is_surest_of() -> None:
    q = TEACHER.softmax(1)
    of = teaching.task("dkd", STUDENT, TEACHER, [0, -1, 4, -1])
    target = torch.tensor([0, int(q[1].argmax()), 4, int(q[3].argmax())])
    expected = decoupled_kl(STUDENT, q, target, 1.0).mean().item()
    assert teaching.loss(of, 4).item() == pytest.approx(expected, rel=1e-5)


def test_mixed_images_have_both_targets() -> None:
    q, mix = TEACHER.softmax(1), Mix(shift=1, share=0.7)
    of = teaching.task("dkd", STUDENT, TEACHER, TARGET.tolist())
    own, partner = (decoupled_kl(STUDENT, q, target, 1.0) for target in (TARGET, TARGET.roll(-1)))
    expected = (0.7 * own + 0.3 * partner).mean().item()
    assert teaching.loss(of, 4, mix).item() == pytest.approx(expected, rel=1e-5)

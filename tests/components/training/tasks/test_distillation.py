"""What all methods share: label share, mixed images, images without labels, and numbers at their limits."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from components.training import losses
from components.training.augmentation import Mix
from components.training.label_form import LabelForm
from components.training.losses.ohem import Ohem
from components.training.tasks import TASKS, task_of
from components.training.tasks.distillation import FLOOR, log_probabilities
from components.training.tasks.ssld import symmetric_kl
from tests.components.training.tasks import teaching

torch.manual_seed(5)
STUDENT, TEACHER = torch.randn(4, 3), 2 * torch.randn(4, 3)
LABELS = [2, 0, -1, 1]  # the third has none
DIVERGENCE = symmetric_kl(STUDENT, TEACHER.softmax(1))
CROSS = functional.cross_entropy(STUDENT, torch.tensor([2, 0, 0, 1]), reduction="none")


def value(share: float, mix: Mix | None = None, criterion: losses.Loss | None = None) -> float:
    of = teaching.task("ssld", STUDENT, TEACHER, LABELS, criterion, label_share=share)
    return teaching.loss(of, 4, mix).item()


def test_labels_count_by_their_share_and_only_where_there_are_any() -> None:
    assert value(0.0) == pytest.approx(DIVERGENCE.mean().item())
    own = torch.tensor([True, True, False, True])
    for share in (0.3, 1.0):
        expected = torch.where(own, (1 - share) * DIVERGENCE + share * CROSS, DIVERGENCE).mean()
        assert value(share) == pytest.approx(expected.item(), rel=1e-6)


def test_an_image_without_a_label_teaches_what_the_teacher_says_whatever_the_share() -> None:
    of = teaching.task("ssld", STUDENT, TEACHER, [-1] * 4, label_share=1.0)
    assert teaching.loss(of, 4).item() == pytest.approx(DIVERGENCE.mean().item())


def test_a_mixed_image_has_as_much_of_a_label_as_of_what_is_labelled_in_it() -> None:
    mix, share = Mix(shift=1, share=0.75), 0.4
    partner = functional.cross_entropy(STUDENT, torch.tensor([0, 0, 1, 2]), reduction="none")
    known, other = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    labelled = 0.75 * known + 0.25 * other
    cross = 0.75 * known * CROSS + 0.25 * other * partner
    expected = ((1 - share * labelled) * DIVERGENCE + share * cross).mean().item()
    assert value(share, mix) == pytest.approx(expected, rel=1e-6)


def test_the_labels_loss_is_the_plans() -> None:
    hardest = Ohem(0.25)
    expected = 0.5 * CROSS[[0, 1, 3]].max() + 0.5 * DIVERGENCE[[0, 1, 3]].sum() / 4 + DIVERGENCE[2] / 4
    assert value(0.5, criterion=hardest) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name", [name for name in TASKS if name not in ("labels", "deit", "deit_soft", "feature")]
)
def test_half_precision_and_cached_zeros_leave_every_gradient_finite(name: str, dtype: torch.dtype) -> None:
    """Answers are kept as a few bytes: of top-k the rest is uniform, and what is tiny is nothing."""
    certain = torch.tensor([[30.0, 0.0, -90.0, -90.0], [0.0, 40.0, -140.0, 0.0]])
    forms = [LabelForm(4, 4), LabelForm(4, 2), LabelForm(4, 2, 3.0)]
    kept = [form.logits(form.encode(certain)).exp() for form in forms]
    assert (kept[0] == 0).any()
    wrong = torch.tensor([[-60.0, 60.0, 0.0, 0.0], [60.0, -60.0, 0.0, 0.0]]).to(dtype)
    near = (certain / 10).to(dtype)
    for teacher in kept:
        for student in (wrong, near):
            of = teaching.task(name, student, certain, [0, -1], label_share=0.5)
            of.said = lambda batch, mix, teacher=teacher: teacher  # type: ignore[method-assign]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = teaching.loss(of, 2)
            found.float().backward()
            gradient = of.network.logits.grad
            assert isinstance(gradient, Tensor)
            assert torch.isfinite(found)
            assert torch.isfinite(gradient).all()
            assert gradient.abs().max() > 0


def test_a_cached_answer_has_the_gradient_of_the_teachers_own() -> None:
    torch.manual_seed(1)
    teacher, student = 3 * torch.randn(16, 50), torch.randn(16, 50)
    form = LabelForm(50, 50)
    for name in ("ssld", "kd"):
        gradients = []
        for said in (teacher.softmax(1), form.logits(form.encode(teacher)).exp()):
            logits = student.clone().requires_grad_()
            task_of(name).divergence(logits, said, 1.0).mean().backward()  # type: ignore[attr-defined]
            gradients.append(logits.grad)
        whole, kept = gradients
        assert whole is not None
        assert kept is not None
        assert (whole - kept).norm() < 1e-3 * whole.norm()


def test_logarithms_of_probabilities_are_softened_logits() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64)
    for temperature in (1.0, 4.0):
        expected = functional.log_softmax(logits / temperature, 1)
        torch.testing.assert_close(log_probabilities(logits.softmax(1), temperature), expected)
    zero = log_probabilities(torch.tensor([[1.0, 0.0]]))
    assert zero[0, 1].item() == pytest.approx(np.log(FLOOR), rel=1e-5)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_gradients_have_a_scale_where_a_classifier_begins(name: str) -> None:
    for classes in (2, 10, 1000):
        assert 0 < task_of(name).gradient_scale(classes, None) < 4

"""A head for labels and one for the teacher: losses by hand, and a real DeiT's."""

from math import log
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from components.common.errors import RetortError
from components.models import build
from components.models.params import Arch
from components.training.augmentation import Mix
from components.training.tasks import task_of
from components.training.tasks.kd import softened_kl
from tests.components.training.tasks import teaching

TEACHER = torch.tensor([[0.0, log(3)], [log(4), 0.0], [0.0, 1.0]])


class TwoHeads(nn.Module):
    """As timm's: both heads' logits while it trains, when that is asked for, and else their mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Parameter(torch.randn(3, 2))
        self.head_dist = nn.Parameter(torch.randn(3, 2))
        self.both = False

    def set_distilled_training(self, enable: bool = True) -> None:
        self.both = enable

    def forward(self, inputs: Tensor) -> Any:
        if self.both and self.training:
            return self.head, self.head_dist
        return (self.head + self.head_dist) / 2


def test_hard_half_labels_half_what_the_teacher_decides() -> None:
    network = TwoHeads()
    of = teaching.task("deit", network, TEACHER, [0, 0, 1], label_share=0.5)
    decided = functional.cross_entropy(network.head_dist, torch.tensor([1, 0, 1]))
    stated = functional.cross_entropy(network.head, torch.tensor([0, 0, 1]))
    assert teaching.loss(of, 3).item() == pytest.approx(((decided + stated) / 2).item())


def test_soft_as_published() -> None:
    network = TwoHeads()
    of = teaching.task("deit_soft", network, TEACHER, [0, 0, 1], label_share=0.9, temperature=3.0)
    taught = softened_kl(network.head_dist, TEACHER.softmax(1), 3.0).mean()
    stated = functional.cross_entropy(network.head, torch.tensor([0, 0, 1]))
    assert teaching.loss(of, 3).item() == pytest.approx((0.1 * taught + 0.9 * stated).item(), rel=1e-5)


@pytest.mark.parametrize("name", ["deit", "deit_soft"])
@pytest.mark.parametrize("labels", [[-1, -1, -1], [0, -1, 1]])
@pytest.mark.parametrize("mix", [None, Mix(shift=1, share=0.6)])
def test_both_heads_learn_from_every_batch(name: str, labels: list[int], mix: Mix | None) -> None:
    network = TwoHeads()
    of = teaching.task(name, network, TEACHER, labels, label_share=0.5)
    teaching.loss(of, 3, mix).backward()
    for head in (network.head, network.head_dist):
        assert head.grad is not None
        assert (head.grad.abs().sum(1) > 0).all(), "of an image without a label the teacher is the label"


def test_scale() -> None:
    assert task_of("deit").gradient_scale(1000, None) == 1.0
    assert task_of("deit_soft").gradient_scale(1000, None) == pytest.approx(1.0)


def test_a_network_with_one_head_is_refused() -> None:
    with pytest.raises(RetortError, match=r"distill\.method: Linear has no head"):
        teaching.task("deit", nn.Linear(2, 2), TEACHER, [0], label_share=0.5)


def test_a_real_one_answers_with_the_mean_of_its_heads() -> None:
    arch = Arch(name="deit_tiny_distilled_patch16_224")
    torch.manual_seed(0)
    network = build.create(arch, 2)
    of = teaching.task("deit", network, TEACHER, [0, 0, -1], label_share=0.5)
    given = teaching.batch(of, 3, size=32)
    images = torch.randn(3, 3, 32, 32)
    learnt = of.train()(images, given, None)
    learnt.loss.backward()
    assert all(parameter.grad is not None for parameter in of.parameters()), "DDP waits for each"
    own, taught = network(images)
    torch.testing.assert_close(learnt.logits, (own + taught) / 2)
    with torch.no_grad():
        answer = of.eval().network(images)
    torch.testing.assert_close(answer, (own + taught) / 2)
    plain = build.create(arch, 2)
    plain.load_state_dict(network.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(cast(nn.Module, plain).eval()(images), answer)

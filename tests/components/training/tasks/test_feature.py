"""A projector between what both classifiers read."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from components.common.errors import RetortError
from components.models import build
from components.models.params import Arch
from components.training.tasks.feature import Feature
from components.training.tasks.kd import softened_kl
from components.training.teacher import Answer
from tests.components.training.tasks import teaching

LOGITS = torch.tensor([[0.0, 1.0, 2.0], [1.0, -1.0, 0.0]])
SEEN = functional.layer_norm(torch.randn(2, 8, generator=torch.Generator().manual_seed(4)), (8,))


class Seeing(teaching.Online):
    feature_width = 8

    def __init__(self, crops: Any = ()) -> None:
        super().__init__(LOGITS)
        self.crops = crops

    @property
    def teacher(self) -> Any:
        return self

    def features(self, pixels: Tensor) -> tuple[Answer, Tensor]:
        return Answer(self.logits), SEEN


def network() -> nn.Module:
    torch.manual_seed(1)
    return build.create(Arch(name="test_resnet"), 3)


def test_the_loss_is_kl_and_the_projectors_error() -> None:
    of = teaching.task("feature", network(), LOGITS, [0, -1], answers=Seeing())
    assert isinstance(of, Feature)
    given = teaching.batch(of, 2, size=32)
    images = torch.randn(2, 3, 32, 32)
    learnt = of.eval()(images, given, None)
    module: Any = of.network
    seen = module.forward_head(module.forward_features(images), pre_logits=True)
    logits = module(images)
    hint = functional.mse_loss(of.projector(seen), SEEN) / 2
    expected = softened_kl(logits, LOGITS.softmax(1), 1.0).mean() + hint
    assert learnt.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(learnt.logits, logits)


def test_everything_learns_from_images_without_labels_too() -> None:
    of = teaching.task("feature", network(), LOGITS, [-1, -1], answers=Seeing(), label_share=0.5)
    given = teaching.batch(of, 2, size=32)
    of.train()(torch.randn(2, 3, 32, 32), given, None).loss.backward()
    assert all(parameter.grad is not None for parameter in of.parameters()), "DDP waits for each"
    assert {name.split(".")[0] for name, _ in of.named_parameters()} == {"network", "projector"}


def test_all_workers_begin_with_the_same_projector() -> None:
    first, second = (teaching.task("feature", network(), LOGITS, [0], answers=Seeing()) for _ in range(2))
    torch.rand(1)
    assert isinstance(first, Feature)
    assert isinstance(second, Feature)
    assert torch.equal(first.projector.weight, second.projector.weight)


def test_cached_answers_hold_no_features() -> None:
    with pytest.raises(RetortError, match=r"feature compares .* distill\.teacher_labels to online"):
        teaching.task("feature", network(), LOGITS, [0], answers=Seeing(crops=[object()]))

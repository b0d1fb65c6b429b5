"""What the last layers of a network read, against timm's own way to it."""

from typing import Any

import pytest
import torch
from torch import nn

from components.common.errors import RetortError
from components.models import build
from components.models.params import Arch, Head
from components.models.pooled import Pooled


@pytest.mark.parametrize(
    "arch",
    [
        Arch(name="test_vit"),
        Arch(name="test_efficientnet"),
        Arch(name="mobilenetv3_small_050"),
        Arch(name="test_resnet", head=Head(bottleneck=2)),
        Arch(name="deit_tiny_distilled_patch16_224"),
    ],
    ids=lambda arch: arch.name,
)
def test_what_a_classifier_reads_is_timms_pre_logits(arch: Arch) -> None:
    module: Any = build.create(arch, 3).eval()
    seen = Pooled(module)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        module(images)
        found = seen.take()
        expected = module.forward_head(module.forward_features(images), pre_logits=True)
    assert found.shape == (2, seen.width)
    if arch.name.startswith("deit"):  # two tokens, side by side; timm takes their mean
        found = found.view(2, 2, -1).mean(1)
    torch.testing.assert_close(found, expected.flatten(1))
    with pytest.raises(AssertionError, match="has not computed"):
        seen.take()


def test_a_compiled_network_is_heard_too() -> None:
    module: Any = build.create(Arch(name="test_resnet"), 3).eval()
    seen = Pooled(module)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        module(images)
        expected = seen.take()
        module.compile(backend="aot_eager")
        for _ in range(2):
            module(images)
            torch.testing.assert_close(seen.take(), expected)


def test_a_network_without_a_classifier_is_named() -> None:
    with pytest.raises(RetortError, match="Conv2d does not end in fully connected layers"):
        Pooled(nn.Conv2d(3, 3, 1))

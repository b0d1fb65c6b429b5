"""ACB: a pretrained network keeps its output, trains in three branches, and folds back into one."""

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from components.export import graph
from components.models import acb, build
from components.models.params import Arch

SHAPES = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
    nn.Conv2d(4, 8, 5, padding=2, groups=4),
    nn.Conv2d(4, 6, 7, stride=2, padding=3),
    nn.Conv2d(4, 6, 3, padding=2, dilation=2),
    nn.Conv2d(4, 6, 4, stride=4),
    nn.Conv2d(4, 6, 2, padding=1),
    Conv2dSame(4, 6, 3, stride=2, bias=False),
    Conv2dSame(4, 4, 5, stride=2, groups=4),
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def stir(module: nn.Module) -> nn.Module:
    """Batch norms as training leaves them: fresh ones would hide mistakes in folding them."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1, 0.5)
            nn.init.normal_(part.bias)
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.3, 3)
    return module.eval()


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("conv", SHAPES, ids=str)
def test_a_block_begins_as_its_convolution_and_folds_into_one(conv: nn.Conv2d) -> None:
    images = torch.randn(2, 4, 17, 20)
    block = acb.ACB(conv).eval()
    with torch.inference_mode():
        assert apart(block(images), conv(images)) < 1e-6
    stir(block)
    folded = block.fold()
    assert type(folded) is type(conv)
    assert folded.kernel_size == conv.kernel_size
    with torch.inference_mode():
        assert apart(folded(images), block(images)) < 1e-5
        assert apart(block(images), conv(images)) > 0.01, "otherwise the test says nothing"


@pytest.mark.parametrize("name", ["test_efficientnet", "tf_efficientnet_lite0", "resnet18d"])
def test_a_network_keeps_its_output_when_it_is_widened(name: str) -> None:
    plain = build.plain(Arch(name=name), 5).eval()
    stir(plain)
    images = torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        before = plain(images)
        after = build.with_blocks(plain, Arch(name=name, blocks="acb")).eval()(images)
    assert any(isinstance(part, acb.ACB) for part in plain.modules())
    assert apart(after, before) < 1e-5


def test_a_trained_network_folds_to_the_same_answers() -> None:
    arch = Arch(name="test_efficientnet", blocks="acb")
    module = build.create(arch, 5)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 5
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(images), labels).backward()
        optimizer.step()
    moved = [part for part in module.modules() if isinstance(part, acb.ACB)]
    assert all(part.horizontal_bn.weight.abs().max() > 0 for part in moved), "every branch learns"
    module.eval()
    folded, blocks = graph.fold(module)
    assert blocks == len(moved)
    assert not any(isinstance(part, acb.ACB) for part in folded.modules())
    with torch.inference_mode():
        assert apart(folded(images), module(images)) < 1e-5
    plain = {name: t.shape for name, t in build.plain(arch, 5).state_dict().items()}
    names = {name: t.shape for name, t in folded.state_dict().items()}
    assert plain.items() <= names.items(), "the plain network's names; folded convolutions have a bias too"

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


def test_blocks_are_in_the_mode_and_precision_of_their_network() -> None:
    """DaViT looks at its convolutions' kernels and strides itself."""
    plain = build.plain(Arch(name="davit_tiny"), 5).double().eval()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        before = plain(images)
        after = build.with_blocks(plain, Arch(name="davit_tiny", blocks="acb"))(images)
    assert apart(after, before) < 1e-5


@pytest.mark.parametrize("name", ["test_efficientnet", "tf_efficientnet_lite0", "resnet18d"])
def test_what_a_trained_networks_norms_have_learnt_stays_true(name: str) -> None:
    """Widening changes nothing in training either, least of all the statistics of the norms behind blocks."""
    plain = build.plain(Arch(name=name), 5)
    images = torch.randn(16, 3, 64, 64)
    norms = [part for part in plain.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        before = plain.train()(images)  # the norms know these images now
        known = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
        after = build.with_blocks(plain, Arch(name=name, blocks="acb")).train()(images)
    assert apart(after, before) < 1e-2  # eps counts twice
    for norm, (mean, variance) in zip(norms, known, strict=True):
        assert torch.allclose(norm.running_mean, mean, rtol=0.02, atol=1e-3)
        assert torch.allclose(norm.running_var, variance, rtol=0.02, atol=1e-3)


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


@pytest.mark.parametrize("name", ["test_efficientnet", "resnet18d", "resnetv2_18"])
def test_a_widened_network_goes_back_to_plain_convolutions(name: str) -> None:
    """With the plain network's own tensors, wherever a norm takes a block's output and nothing else does."""
    module = stir(build.create(Arch(name=name, blocks="acb"), 5))
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        before = module(images)
        blocks = acb.narrow(module)
        after = module(images)
    assert blocks > 0
    assert apart(after, before) < 1e-4
    own = set(build.plain(Arch(name=name), 5).state_dict())
    extra = set(module.state_dict()) - own
    assert own <= set(module.state_dict())
    if name == "resnetv2_18":  # sums of blocks' outputs go to the next norm and to the shortcut: biases stay
        assert extra
        assert all(tensor.endswith(".bias") for tensor in extra)
    else:
        assert not extra

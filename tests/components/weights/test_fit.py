"""Whether kernels belong to the running statistics behind them, on a network trained here on real images."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from components.weights.fit import norm_fits


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A narrow ResNet after five epochs on handwritten digits."""
    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.float32) / 8 - 1)[:, None].expand(-1, 3, -1, -1)
    images = functional.interpolate(images, size=32)
    labels = torch.from_numpy(digits.target).long()
    torch.manual_seed(0)
    module = timm.create_model("resnet10t", num_classes=10)
    optimizer = torch.optim.SGD(module.parameters(), 0.05, momentum=0.9)
    for rows in torch.randperm(5 * len(images)).remainder(len(images)).split(64):
        optimizer.zero_grad()
        functional.cross_entropy(module(images[rows]), labels[rows]).backward()
        optimizer.step()
    return module.eval()


def test_a_trained_networks_norms_fit_and_it_is_left_as_it_was(trained: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    state = torch.get_rng_state()
    fits = norm_fits(trained)
    norms = [name for name, module in trained.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert {fit.norm for fit in fits} == set(norms)
    assert not [fit for fit in fits if fit.unlikely]
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert norm_fits(trained) == fits


def test_a_kernel_that_is_not_its_own_shows_at_its_norm_alone(trained: nn.Module) -> None:
    kernel = trained.get_parameter("layer3.0.conv2.weight")
    own = kernel.detach().clone()
    with torch.no_grad():
        kernel.copy_(own.flip(0))  # the same values, in other channels' places
    try:
        assert [fit.norm for fit in norm_fits(trained) if fit.unlikely] == ["layer3.0.bn2"]
    finally:
        with torch.no_grad():
            kernel.copy_(own)


def test_statistics_that_no_training_has_touched_say_nothing() -> None:
    torch.manual_seed(0)
    assert norm_fits(timm.create_model("resnet10t", num_classes=10).eval()) == []
    assert norm_fits(timm.create_model("test_vit", num_classes=10).eval()) == []

"""Pixels to a network's input."""

import pytest
import torch

from components.training.normalise import Normalise


def test_each_network_gets_its_own_normalisation() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    half = Normalise([0.5] * 3, [0.5] * 3, torch.device("cpu"))(pixels)
    assert half[0, 0, 0].tolist() == pytest.approx([-1, 1])
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    other = Normalise(mean, std, torch.device("cpu"))(pixels)
    assert other[0, :, 0, 1].tolist() == pytest.approx([(1 - m) / s for m, s in zip(mean, std, strict=True)])
    assert other.is_contiguous(memory_format=torch.channels_last)

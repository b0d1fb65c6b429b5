"""Pictures for tests of what is done to pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def pictures(count: int, size: int = 24, seed: int = 0) -> Tensor:
    """Smooth coloured noise, uint8 [count, 3, size, size]."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    fine = functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    return (fine * 255).round().to(torch.uint8)


def differs(made: Tensor, expected: Tensor) -> Tensor:
    return (made.int() - expected.int()).abs()

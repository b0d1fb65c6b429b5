"""Pixels to a network's input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Normalise:
    """Pixels to a network's input. Teacher and student may differ here: each has its own.

    Args:
        mean, std: per RGB channel, for pixels in 0..1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        scale = torch.tensor(std, device=device).view(1, 3, 1, 1) * 255
        self._factor = 1 / scale
        self._offset = -torch.tensor(mean, device=device).view(1, 3, 1, 1) * 255 / scale
        self._device = device

    def __call__(self, pixels: Tensor) -> Tensor:
        """Uint8 [B, 3, S, S] -> float32 [B, 3, S, S], channels last."""
        values = pixels.to(self._device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        return values.float().mul_(self._factor).add_(self._offset)

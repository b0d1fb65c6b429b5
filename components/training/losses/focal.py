"""The focal loss: easy images count less."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from components.training.losses.base import Loss


class Focal(Loss):
    """Mean of ``-(1 - p[label])^gamma log p[label]`` (Lin et al., "Focal Loss", 2017, eq. 4)."""

    def __init__(self, gamma: float = 2.0, smoothing: float = 0.0) -> None:
        super().__init__(smoothing)
        if gamma < 0:
            raise ValueError(f"gamma must not be negative, got {gamma}")
        self.gamma = gamma

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        log_p = functional.log_softmax(logits, dim=1).gather(1, labels[:, None]).squeeze(1)
        return -((1 - log_p.exp()).clamp_min(0) ** self.gamma * log_p)


LOSS = Focal

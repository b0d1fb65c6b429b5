"""What a loss of labels is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from components.audit.plan_schema import Plan


class Loss(nn.Module):
    """A loss of labels: one value an image, then their mean.

    Args:
        smoothing: share of the loss that is the mean cross-entropy of all classes (Szegedy et al.,
            "Rethinking the Inception Architecture", 2016, sec. 7).
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be at least 0 and below 1, got {smoothing}")
        self.smoothing = smoothing

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits float [B, C], labels int64 [B] -> float [B], without smoothing."""
        raise NotImplementedError

    def per_image(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits float [B, C], labels int64 [B] -> float [B]."""
        values = self.of_labels(logits, labels)
        if not self.smoothing:
            return values
        uniform = -functional.log_softmax(logits, dim=1).mean(dim=1)
        return (1 - self.smoothing) * values + self.smoothing * uniform

    def reduce(self, values: Tensor) -> Tensor:
        """Float [B] -> scalar."""
        return values.mean()

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits float [B, C], labels int64 [B] -> scalar."""
        return self.reduce(self.per_image(logits, labels))

    @classmethod
    def of_plan(cls, plan: Plan, class_num: int, smoothing: float, **arguments: Any) -> Loss:
        """The loss that a plan asks for with these arguments; ``class_num`` is C.

        Raises:
            TypeError, ValueError: an argument is unknown or makes no sense.
        """
        return cls(**arguments, smoothing=smoothing)

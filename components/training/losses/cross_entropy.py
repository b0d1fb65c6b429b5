"""Cross-entropy."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from components.training.losses.base import Loss


class CrossEntropy(Loss):
    """Mean of ``-log p[label]``."""

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels, reduction="none")


LOSS = CrossEntropy

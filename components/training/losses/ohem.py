"""Online hard example mining: the hardest images of a batch."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

from components.training.losses.base import Loss


class Ohem(Loss):
    """Cross-entropy over the hardest images of a batch (Shrivastava et al., "OHEM", 2016).

    Args:
        keep: share of the batch that counts; at least one image does. Each worker chooses among its own.
    """

    def __init__(self, keep: float = 0.7, smoothing: float = 0.0) -> None:
        super().__init__(smoothing)
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, got {keep}")
        self.keep = keep

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels, reduction="none")

    def reduce(self, values: Tensor) -> Tensor:
        return values.topk(math.ceil(self.keep * len(values))).values.mean()


LOSS = Ohem

"""Cross-entropy that weighs classes by the effective number of their samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from components.audit.plan_schema import Plan
from components.training.losses.base import Loss


class ClassBalanced(Loss):
    """Cross-entropy weighted by class (Cui et al., "Effective Number of Samples", 2019, eq. 10).

    The weights keep their size whatever a batch holds: the sum is divided by the batch, not by its weights.

    Args:
        weights: float [C], one a class, 1.0 on average.
    """

    weights: Tensor

    def __init__(self, weights: Tensor, smoothing: float = 0.0) -> None:
        super().__init__(smoothing)
        self.register_buffer("weights", weights)

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels, reduction="none") * self.weights[labels]

    @classmethod
    def of_plan(cls, plan: Plan, class_num: int, smoothing: float, **arguments: Any) -> Loss:
        """The plan's weights; without them, those of the effective number of the plan's counts."""
        return cls(_weights(plan, class_num, **arguments), smoothing)


def _weights(
    plan: Plan, class_num: int, beta: float = 0.999, weights: dict[str, float] | None = None
) -> Tensor:
    if weights is None:
        return effective_number_weights(plan.sampling.counts, beta, class_num)
    by_label = {int(label): float(weight) for label, weight in weights.items()}
    return torch.tensor([by_label.get(label, 1.0) for label in range(class_num)])


def effective_number_weights(counts: dict[int, int], beta: float, class_num: int) -> Tensor:
    """Weights ``(1 - beta) / (1 - beta^n)`` by class, 1.0 on average; a class without rows gets 0."""
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be at least 0 and below 1, got {beta}")
    sizes = [counts.get(label, 0) for label in range(class_num)]
    raw = torch.tensor([(1 - beta) / (1 - beta**n) if n else 0.0 for n in sizes], dtype=torch.float64)
    return (raw * (raw > 0).sum() / raw.sum()).float()


LOSS = ClassBalanced

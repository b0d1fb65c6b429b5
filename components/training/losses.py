"""Losses of labels that the plan may ask for; what a student learns of its teacher is in ``tasks``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.audit.plan_schema import Plan
from components.common.errors import RetortError


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


class CrossEntropy(Loss):
    """Mean of ``-log p[label]``."""

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels, reduction="none")


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


def effective_number_weights(counts: dict[int, int], beta: float, class_num: int) -> Tensor:
    """Weights ``(1 - beta) / (1 - beta^n)`` by class, 1.0 on average; a class without rows gets 0."""
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be at least 0 and below 1, got {beta}")
    sizes = [counts.get(label, 0) for label in range(class_num)]
    raw = torch.tensor([(1 - beta) / (1 - beta**n) if n else 0.0 for n in sizes], dtype=torch.float64)
    return (raw * (raw > 0).sum() / raw.sum()).float()


def from_plan(plan: Plan, class_num: int, smoothing: float = 0.0) -> Loss:
    """The loss that the plan asks for, with label smoothing.

    Raises:
        RetortError: naming the plan's key, when an argument is unknown or makes no sense.
    """

    def class_balanced(
        beta: float = 0.999, weights: dict[str, float] | None = None, smoothing: float = 0.0
    ) -> Loss:
        if weights is None:
            given = effective_number_weights(plan.sampling.counts, beta, class_num)
        else:
            by_label = {int(label): float(weight) for label, weight in weights.items()}
            given = torch.tensor([by_label.get(label, 1.0) for label in range(class_num)])
        return ClassBalanced(given, smoothing)

    makers: dict[str, Callable[..., Loss]] = {
        "cross_entropy": CrossEntropy,
        "focal": Focal,
        "ohem": Ohem,
        "class_balanced": class_balanced,
    }
    arguments: dict[str, Any] = plan.loss.arguments
    try:
        return makers[plan.loss.name](**arguments, smoothing=smoothing)
    except (TypeError, ValueError) as error:
        raise RetortError(f"plan: loss.arguments of '{plan.loss.name}': {error}") from None

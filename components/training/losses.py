"""Losses: those that the plan may ask for, and the one between teacher and student."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.audit.plan import Plan
from components.common.errors import RetortError


class CrossEntropy(nn.Module):
    """Mean of ``-log p[label]``."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits float [B, C], labels int64 [B] -> scalar."""
        return functional.cross_entropy(logits, labels)


class Focal(nn.Module):
    """Mean of ``-(1 - p[label])^gamma log p[label]`` (Lin et al., "Focal Loss", 2017, eq. 4)."""

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        if gamma < 0:
            raise ValueError(f"gamma must not be negative, got {gamma}")
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits float [B, C], labels int64 [B] -> scalar."""
        log_p = functional.log_softmax(logits, dim=1).gather(1, labels[:, None]).squeeze(1)
        return -((1 - log_p.exp()).clamp_min(0) ** self.gamma * log_p).mean()


class Ohem(nn.Module):
    """Cross-entropy over the hardest images of a batch (Shrivastava et al., "OHEM", 2016).

    Args:
        keep: share of the batch that counts; at least one image does.
    """

    def __init__(self, keep: float = 0.7) -> None:
        super().__init__()
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, got {keep}")
        self.keep = keep

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits float [B, C], labels int64 [B] -> scalar."""
        losses = functional.cross_entropy(logits, labels, reduction="none")
        return losses.topk(math.ceil(self.keep * len(losses))).values.mean()


class ClassBalanced(nn.Module):
    """Cross-entropy weighted by class (Cui et al., "Effective Number of Samples", 2019, eq. 10).

    The weights keep their size whatever a batch holds: the sum is divided by the batch, not by its weights.

    Args:
        weights: float [C], one a class, 1.0 on average.
    """

    weights: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits float [B, C], labels int64 [B] -> scalar."""
        losses = functional.cross_entropy(logits, labels, reduction="none")
        return (losses * self.weights[labels]).mean()


class JSDivergence(nn.Module):
    """Mean Jensen-Shannon divergence between student and teacher (Lin, 1991; used by SSLD).

    ``(KL(p || m) + KL(q || m)) / 2`` with ``m = (p + q) / 2``, in nats: between 0 and ln 2.
    """

    def forward(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """Student's logits float [B, C], teacher's probabilities float [B, C] -> scalar."""
        log_p = functional.log_softmax(logits, dim=1)
        p = log_p.exp()
        tiny = torch.finfo(p.dtype).tiny
        log_m = ((p + teacher) / 2).clamp_min(tiny).log()
        kl_p = (p * (log_p - log_m)).sum(1)
        kl_q = (torch.xlogy(teacher, teacher) - teacher * log_m).sum(1)
        return ((kl_p + kl_q) / 2).mean()


def effective_number_weights(counts: dict[int, int], beta: float, class_num: int) -> Tensor:
    """Weights ``(1 - beta) / (1 - beta^n)`` by class, 1.0 on average; a class without rows gets 0."""
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be at least 0 and below 1, got {beta}")
    sizes = [counts.get(label, 0) for label in range(class_num)]
    raw = torch.tensor([(1 - beta) / (1 - beta**n) if n else 0.0 for n in sizes], dtype=torch.float64)
    return (raw * (raw > 0).sum() / raw.sum()).float()


def from_plan(plan: Plan, class_num: int) -> nn.Module:
    """The loss that the plan asks for.

    Raises:
        RetortError: naming the plan's key, when an argument is unknown or makes no sense.
    """

    def class_balanced(beta: float = 0.999, weights: dict[str, float] | None = None) -> nn.Module:
        if weights is None:
            return ClassBalanced(effective_number_weights(plan.sampling.counts, beta, class_num))
        by_label = {int(label): float(weight) for label, weight in weights.items()}
        return ClassBalanced(torch.tensor([by_label.get(label, 1.0) for label in range(class_num)]))

    makers: dict[str, Callable[..., nn.Module]] = {
        "cross_entropy": CrossEntropy,
        "focal": Focal,
        "ohem": Ohem,
        "class_balanced": class_balanced,
    }
    arguments: dict[str, Any] = plan.loss.arguments
    try:
        return makers[plan.loss.name](**arguments)
    except (TypeError, ValueError) as error:
        raise RetortError(f"plan: loss.arguments of '{plan.loss.name}': {error}") from None

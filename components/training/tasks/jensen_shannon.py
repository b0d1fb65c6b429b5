"""The Jensen-Shannon divergence as it is defined."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from components.training.tasks.distillation import Distillation


def js_divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """Jensen-Shannon divergence of student and teacher (Lin, "Divergence measures", 1991, sec. III).

    ``(KL(p || m) + KL(q || m)) / 2`` with ``m = (p + q) / 2``, in nats: between 0 and ln 2.

    Args:
        logits: the student's, float [B, C].
        teacher: probabilities, float [B, C].

    Returns:
        Float [B].
    """
    log_p = functional.log_softmax(logits, dim=1)
    p = log_p.exp()
    tiny = torch.finfo(p.dtype).tiny
    log_m = ((p + teacher) / 2).clamp_min(tiny).log()
    kl_p = (p * (log_p - log_m)).sum(1)
    kl_q = (torch.xlogy(teacher, teacher) - teacher * log_m).sum(1)
    return (kl_p + kl_q) / 2


class JensenShannon(Distillation):
    """That divergence, which the SSLD paper names; what its code computes is ``ssld.py``.

    Bounded, and flat where a network with many classes begins: SGD needs a far larger rate, or AdamW, which
    sees no scale. The temperature is not used.
    """

    @staticmethod
    def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return js_divergence(logits, teacher)

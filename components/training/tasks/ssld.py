"""SSLD: the divergence that is published as JS, and is symmetric KL / 2."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from components.training.tasks.distillation import Distillation, log_probabilities


def symmetric_kl(logits: Tensor, teacher: Tensor) -> Tensor:
    """``(KL(p || q) + KL(q || p)) / 2`` of student ``p`` and teacher ``q``, one an image.

    The sum over classes, not their mean: ``sum_c (p_c - q_c) (log p_c - log q_c) / 2``, in nats, never
    negative. Its gradient by the logits is ``(p - q + p (log p/q - KL(p || q))) / 2``.

    Args:
        logits: the student's, float [B, C].
        teacher: probabilities, float [B, C].

    Returns:
        Float [B].
    """
    log_p, log_q = functional.log_softmax(logits, dim=1), log_probabilities(teacher)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1) / 2


class SSLD(Distillation):
    """Cui et al., "Beyond Self-Supervision: A Simple Yet Effective Network Distillation Alternative", 2021.

    The paper names the Jensen-Shannon divergence; what PaddleClas computes for its recipes
    (``DistillationDMLLoss``) is ``symmetric_kl``, summed over classes and averaged over the batch, and so is
    what its published networks learnt. The true divergence (``jensen_shannon.py``) has a gradient that
    vanishes where a network begins: with 1,000 classes it is 130 times smaller. The paper has neither labels'
    loss nor temperature: the latter is not used.
    """

    @staticmethod
    def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return symmetric_kl(logits, teacher)

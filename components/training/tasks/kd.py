"""Knowledge distillation: KL divergence of softened answers, beside the labels."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from components.training.tasks.distillation import Distillation, log_probabilities


def softened_kl(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(q || p)`` with ``p = softmax(z / T)`` and ``q = softmax(v / T)``, one an image.

    ``T^2`` keeps the gradient, ``T (p - q)``, from shrinking as both answers flatten.

    Args:
        logits: the student's ``z``, float [B, C].
        teacher: ``softmax(v)``, float [B, C].
        temperature: T.

    Returns:
        Float [B], in nats.
    """
    log_p = functional.log_softmax(logits / temperature, dim=1)
    log_q = log_probabilities(teacher, temperature)
    return functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1) * temperature**2


class KnowledgeDistillation(Distillation):
    """Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015, sec. 2.

    ``(1 - s) T^2 KL(q || p) + s CE``: their weighted average of both objectives. At T = 1 the first is
    cross-entropy with soft labels, but for a constant (Beyer et al., "Knowledge distillation: A good teacher
    is patient and consistent", 2022, with s = 0).
    """

    @staticmethod
    def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return softened_kl(logits, teacher, temperature)

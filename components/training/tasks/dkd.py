"""Decoupled knowledge distillation: the target class apart from the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

from components.training.tasks.distillation import Distillation, log_probabilities

if TYPE_CHECKING:
    from components.training.augmentation import Mix
    from components.training.inputs.feed import Batch

ALPHA, BETA = 1.0, 0.5  # as published for ImageNet


def decoupled_kl(logits: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """``T^2 (alpha TCKD + beta NCKD)``, one an image (Zhao et al., 2022, eq. 7).

    TCKD is the KL divergence of ``[p_t, 1 - p_t]``, whether it is the target; NCKD that of the other classes
    among themselves, ``p_i / (1 - p_t)``. With alpha = 1 and beta = 1 - q_t both add up to KL (eq. 5).

    Args:
        logits: the student's, float [B, C].
        teacher: probabilities ``q``, float [B, C].
        target: t, int64 [B].
        temperature: that softens both.

    Returns:
        Float [B], in nats.
    """
    is_target = functional.one_hot(target, logits.shape[1]).bool()
    log_p = functional.log_softmax(logits / temperature, dim=1)
    log_q = log_probabilities(teacher, temperature)

    def parts(log: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logarithms of p_t and 1 - p_t, float [B], and of p_i / (1 - p_t), float [B, C], 0 at the target."""
        others = log.masked_fill(is_target, float("-inf"))
        rest = others.logsumexp(1)
        return (
            log.gather(1, target[:, None]).squeeze(1),
            rest,
            (log - rest[:, None]).masked_fill(is_target, 0),
        )

    target_p, rest_p, among_p = parts(log_p)
    target_q, rest_q, among_q = parts(log_q)
    tckd = target_q.exp() * (target_q - target_p) + rest_q.exp() * (rest_q - rest_p)
    nckd = (among_q.exp() * (among_q - among_p)).sum(1)
    return (ALPHA * tckd + BETA * nckd) * temperature**2


class DecoupledKD(Distillation):
    """Zhao et al., "Decoupled Knowledge Distillation", 2022.

    The target is the label; of an image without one, the class that the teacher is surest of. Of mixed images
    each of both targets counts by its share.
    """

    @staticmethod
    def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return decoupled_kl(logits, teacher, teacher.argmax(1), temperature)

    def compare(self, logits: Tensor, teacher: Tensor, batch: Batch, mix: Mix | None) -> Tensor:
        labels = batch.extra["labels"]

        def of(labels: Tensor) -> Tensor:
            target = labels.where(labels >= 0, teacher.argmax(1))
            return decoupled_kl(logits, teacher, target, self.temperature)

        if mix is None:
            return of(labels)
        return of(labels) * mix.share + of(mix.partners(labels)) * (1 - mix.share)

"""DIST: relations instead of values, by Pearson's correlation."""

from __future__ import annotations

import torch
from torch import Tensor

from components.training.tasks.distillation import Distillation, log_probabilities

# of the mean: a deviation below it counts as it, for correlations of what is all alike have no gradient that
# means anything (a classifier that begins with zeros)
FLAT = 0.01
FRESH_ROWS = 32  # images of ``gradient_scale``


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of probabilities along the last axis.

    Args:
        a, b: float [..., n].

    Returns:
        Float [...].
    """

    def standard(values: Tensor) -> Tensor:
        mean = values.mean(-1, keepdim=True)
        centred = values - mean
        least = FLAT * mean.detach() * values.shape[-1] ** 0.5
        # a norm that is zero has no gradient
        squared = centred.square().sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
        return centred / squared.sqrt().maximum(least)

    return (standard(a) * standard(b)).sum(-1)


def relations(logits: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """``T^2 (1 - rho)`` between student and teacher (Huang et al., 2022, eq. 8 and 9).

    Args:
        logits: the student's, float [B, C].
        teacher: probabilities, float [B, C].
        temperature: that softens both.

    Returns:
        Inter-class: of each image, over the classes, float [B]. Intra-class: of each class, over the images
        of the batch, float [C].
    """
    p = (logits / temperature).softmax(1)
    q = log_probabilities(teacher, temperature).exp()
    squared = temperature**2
    return squared * (1 - correlation(p, q)), squared * (1 - correlation(p.T, q.T))


class DIST(Distillation):
    """Huang et al., "Knowledge Distillation from A Stronger Teacher", 2022, eq. 10.

    ``alpha CE + beta L_inter + gamma L_intra``, published with 1, 2 and 2: a label share of a third here, but
    for a factor. How sure the teacher is does not count, only how its answers go together. Batches that are
    taken in parts, and workers, compare the images that they have.
    """

    @staticmethod
    def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        inter, intra = relations(logits, teacher, temperature)
        return inter + intra.mean()

    @classmethod
    def fresh(cls, class_num: int) -> Tensor:
        """Correlations need something that varies: logits with a deviation of 1."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(FRESH_ROWS, class_num, dtype=torch.float64, generator=generator)

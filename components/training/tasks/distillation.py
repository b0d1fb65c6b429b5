"""Learning from what a teacher says about the same view of each image, with labels or without."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from math import exp
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from components.training.label_form import LOWEST
from components.training.sampling import Draw
from components.training.tasks.base import Learnt, Setup, Task

if TYPE_CHECKING:
    from components.training.augmentation import Mix
    from components.training.inputs.feed import Batch
    from components.training.params import Distill

FLOOR = exp(LOWEST)  # least probability that is felt: of answers that are kept, and of those asked for
TEMPERATURE = 1.0  # that softens both answers, where neither settings nor method say more
CERTAIN = 0.9  # what the teacher of ``gradient_scale`` gives to one class; the others share the rest


def log_probabilities(teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """A teacher's answer, softened, as logarithms: of its logits ``v``, ``log_softmax(v / T)``.

    Probabilities do for that, since they are logits but for a number that softmax does not see. Zeros become
    ``FLOOR``, so that each logarithm is finite.

    Args:
        teacher: probabilities, float [B, C].
        temperature: T; above 1 it raises what is small.

    Returns:
        Float [B, C], of at least single precision.
    """
    precise = teacher if teacher.dtype == torch.float64 else teacher.float()
    return functional.log_softmax(precise.clamp_min(FLOOR).log() / temperature, dim=1)


class Distillation(Task):
    """The teacher's probabilities, cached by view or asked for at every step; a subclass compares.

    Of an image with a label ``(1 - s) D + s L``: the divergence ``D`` from the teacher, the labels' loss
    ``L`` as the plan asks for it, and the label share ``s``; of an image without one ``D`` alone. Where
    images are mixed, each of both counts by its share of the mixture.
    """

    unlabelled = True

    def __init__(self, setup: Setup, network: nn.Module) -> None:
        super().__init__(setup, network)
        assert setup.answers is not None, "distillation without a teacher"
        self.answers = setup.answers
        self.label_share = label_share(setup.distill)
        self.temperature = temperature(setup.distill)

    @staticmethod
    @abstractmethod
    def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """How far the student is from the teacher, an image.

        Args:
            logits: the student's, float [B, C].
            teacher: probabilities, float [B, C].

        Returns:
            Float [B].
        """

    def compare(self, logits: Tensor, teacher: Tensor, batch: Batch, mix: Mix | None) -> Tensor:
        """The same, for methods that need to know more of the batch; float [B]."""
        return self.divergence(logits, teacher, self.temperature)

    def view(self, number: int, before: np.ndarray) -> np.ndarray:
        """One of the views that the teacher has labelled, where its answers are cached."""
        if not self.answers.crops:
            return super().view(number, before)
        return (number + before) % len(self.answers.crops)

    def shown(self, draws: Iterator[Draw]) -> Iterator[Draw]:
        """Mixed as they were when the teacher was asked, where its answers are cached."""
        return draws if self.answers.mixer is None else map(self.answers.mixer, draws)

    def extra(self, draw: Draw) -> dict[str, np.ndarray]:
        taken = self.answers.take(draw.rows, draw.views)
        taken["labels"] = self.setup.labels[draw.rows].astype(np.int64)
        if draw.mixture is not None:
            taken["partners"] = self.setup.labels[draw.mixture.partners].astype(np.int64)
            taken["share"] = draw.mixture.share
        return taken

    def said(self, batch: Batch, mix: Mix | None) -> Tensor:
        """The teacher's probabilities, float32 [B, C], of what the student sees."""
        if not self.answers.crops:
            return self.answers.teacher(batch.pixels).probabilities
        return self.answers.dense(batch.extra)  # of the mixture, if images come mixed

    def forward(self, inputs: Tensor, batch: Batch, mix: Mix | None) -> Learnt:
        teacher = self.said(batch, mix)
        logits = self.network(inputs).float()
        values = self.compare(logits, teacher, batch, mix)
        return Learnt(self.with_labels(values, logits, batch, mix), logits)

    def with_labels(self, divergence: Tensor, logits: Tensor, batch: Batch, mix: Mix | None) -> Tensor:
        """Divergences, float [B], and the labels' loss by its share: a scalar, the mean over the batch."""
        if not self.label_share:
            return divergence.mean()
        losses, known = self.stated(logits, batch, mix)
        taught = ((1 - self.label_share * known) * divergence).mean()
        return taught + self.label_share * self.setup.criterion.reduce(losses)

    def stated(self, logits: Tensor, batch: Batch, mix: Mix | None) -> tuple[Tensor, Tensor]:
        """The labels' loss of each image, 0 where there is none, and how much of the image has a label.

        Returns:
            Two float [B]; the second 0 or 1, or between them where images are mixed.
        """
        labels, criterion = batch.extra["labels"], self.setup.criterion
        known = (labels >= 0).float()
        losses = criterion.per_image(logits, labels.clamp_min(0)) * known  # without a label any will do
        if mix is not None:
            partners = mix.partners(labels)
            theirs = (partners >= 0).float()
            partly = criterion.per_image(logits, partners.clamp_min(0)) * theirs
            losses = losses * mix.share + partly * (1 - mix.share)
            known = known * mix.share + theirs * (1 - mix.share)
        return losses, known

    @classmethod
    def fresh(cls, class_num: int) -> Tensor:
        """Logits of a classifier that knows nothing yet, float64 [n, C]: all alike."""
        return torch.zeros(1, class_num, dtype=torch.float64)

    @classmethod
    def gradient_scale(cls, class_num: int, distill: Distill | None) -> float:
        """Of a classifier that knows nothing, and a teacher that gives 90 % to one class, the label's.

        Cross-entropy is that with what is learnt here: the teacher's answer, and the label by its share.
        """
        logits = cls.fresh(class_num).requires_grad_()
        labels = torch.arange(len(logits)) % class_num
        certain = functional.one_hot(labels, class_num).double()
        teacher = certain * (CERTAIN - (1 - CERTAIN) / (class_num - 1)) + (1 - CERTAIN) / (class_num - 1)
        share = label_share(distill)
        loss = (1 - share) * cls.divergence(logits, teacher, temperature(distill)).sum()
        loss = loss + share * functional.cross_entropy(logits, labels, reduction="sum")
        (ours,) = torch.autograd.grad(loss, logits)
        theirs = logits.detach().softmax(1) - ((1 - share) * teacher + share * certain)
        return float(ours.norm() / theirs.norm())


def label_share(distill: Distill | None) -> float:
    """The labels' share that is set; 0 where none is."""
    return 0.0 if distill is None or distill.label_share is None else distill.label_share


def temperature(distill: Distill | None) -> float:
    """The temperature that is set, or ``TEMPERATURE``."""
    return TEMPERATURE if distill is None or distill.temperature is None else distill.temperature

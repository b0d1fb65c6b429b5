"""Learning from what a teacher says about the same view of each image, with labels or without."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from components.training import losses
from components.training.sampling import Draw
from components.training.tasks.base import Learnt, Setup, Task

if TYPE_CHECKING:
    from components.training.augmentation import Mix
    from components.training.inputs.feed import Batch


class Distillation(Task):
    """The teacher's probabilities, cached by view or asked for at every step; a subclass compares."""

    unlabelled = True

    def __init__(self, setup: Setup, network: nn.Module) -> None:
        super().__init__(setup, network)
        assert setup.answers is not None, "distillation without a teacher"
        self.answers = setup.answers

    @abstractmethod
    def divergence(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """The student's logits float [B, C], the teacher's probabilities float [B, C] -> float [B]."""

    def view(self, number: int, before: np.ndarray) -> np.ndarray:
        """One of the views that the teacher has labelled, where its answers are cached."""
        if not self.answers.crops:
            return super().view(number, before)
        return (number + before) % len(self.answers.crops)

    def extra(self, draw: Draw) -> dict[str, np.ndarray]:
        return self.answers.take(draw.rows, draw.views)

    def forward(self, inputs: Tensor, batch: Batch, mix: Mix | None) -> Learnt:
        if self.answers.crops:
            teacher = self.answers.dense(batch.extra)
            if mix is not None:  # the teacher saw both, each on its own
                teacher = mix.targets(teacher)
        else:
            teacher = self.answers.teacher(batch.pixels).probabilities
        logits = self.network(inputs)
        return Learnt(self.divergence(logits.float(), teacher).mean(), logits)


class JensenShannon(Distillation):
    """SSLD's loss: the Jensen-Shannon divergence of student and teacher."""

    def divergence(self, logits: Tensor, teacher: Tensor) -> Tensor:
        return losses.js_divergence(logits, teacher)

"""Feature distillation: what the student sees, through a projector, against what the teacher sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from components.common.errors import RetortError
from components.models.pooled import Pooled
from components.training.tasks.base import Learnt, Setup
from components.training.tasks.kd import KnowledgeDistillation

if TYPE_CHECKING:
    from components.training.augmentation import Mix
    from components.training.inputs.feed import Batch

SEED = 1  # of the projector: all workers begin with the same


class Feature(KnowledgeDistillation):
    """Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, eq. 3, beside knowledge distillation.

    ``|u(x) - r(v(x))|^2 / 2``, the mean over u's entries: ``v`` is what the student's classifier reads, ``u``
    what the teacher's reads, and ``r`` a linear projector, learnt with the student and thrown away. It is
    added to KL, so that the classifier learns too. In the paper ``u`` and ``v`` are maps of layers in the
    middle; vectors fit networks of any two kinds. ``u`` is brought to mean 0 and deviation 1 of each image,
    so that both parts are of one size whatever the teacher.
    """

    def __init__(self, setup: Setup, network: nn.Module) -> None:
        super().__init__(setup, network)
        if self.answers.crops:
            raise RetortError(
                "distill.method: feature compares what both networks see, which is not kept on disk; set "
                "distill.teacher_labels to online, or take another method"
            )
        self._seen = Pooled(network)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.projector = nn.Linear(self._seen.width, self.answers.teacher.feature_width)

    def forward(self, inputs: Tensor, batch: Batch, mix: Mix | None) -> Learnt:
        answer, features = self.answers.teacher.features(batch.pixels)
        logits = self.network(inputs).float()
        hint = (self.projector(self._seen.take()).float() - features).square().mean(1) / 2
        values = self.compare(logits, answer.probabilities, batch, mix) + hint
        return Learnt(self.with_labels(values, logits, batch, mix), logits)

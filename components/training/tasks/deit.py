"""DeiT: a token, and a head, of its own for what the teacher says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.nn import functional

from components.common.errors import RetortError
from components.training.tasks.base import Learnt, Setup
from components.training.tasks.distillation import Distillation
from components.training.tasks.kd import softened_kl

if TYPE_CHECKING:
    from components.training.augmentation import Mix
    from components.training.inputs.feed import Batch
    from components.training.params import Distill


class DeiT(Distillation):
    """Touvron et al., "Training data-efficient image transformers & distillation through attention", 2021.

    Hard, eq. 3: ``s CE(z_cls, y) + (1 - s) CE(z_dist, argmax q)``, with s = 1/2. The head ``cls`` learns the
    labels, the head ``dist`` what the teacher decides; once trained, the network answers with the mean of
    both. Of an image without a label ``cls`` too learns from the teacher.
    """

    def __init__(self, setup: Setup, network: nn.Module) -> None:
        super().__init__(setup, network)
        if not hasattr(network, "set_distilled_training"):
            raise RetortError(
                f"distill.method: {type(network).__name__} has no head that learns from a teacher; take a "
                "student.arch.name that has one, or another method"
            )
        assert 0 < self.label_share < 1, "one of both heads would learn nothing"
        cast(Any, network).set_distilled_training(True)

    @staticmethod
    def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return functional.cross_entropy(logits, teacher.argmax(1), reduction="none")

    def forward(self, inputs: Tensor, batch: Batch, mix: Mix | None) -> Learnt:
        teacher, share = self.said(batch, mix), self.label_share
        own, taught = (logits.float() for logits in self.network(inputs))
        losses, known = self.stated(own, batch, mix)
        values = (1 - share) * self.compare(taught, teacher, batch, mix)
        values = values + share * (1 - known) * self.compare(own, teacher, batch, mix)
        loss = values.mean() + share * self.setup.criterion.reduce(losses)
        return Learnt(loss, (own + taught) / 2)

    @classmethod
    def gradient_scale(cls, class_num: int, distill: Distill | None) -> float:
        return 1.0  # cross-entropy, both of it


class SoftDeiT(DeiT):
    """Soft, eq. 2 of the same: ``s CE(z_cls, y) + (1 - s) T^2 KL(q || z_dist)``, with s = 0.9 and T = 3."""

    @staticmethod
    def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return softened_kl(logits, teacher, temperature)

    @classmethod
    def gradient_scale(cls, class_num: int, distill: Distill | None) -> float:
        return super(DeiT, cls).gradient_scale(class_num, distill)

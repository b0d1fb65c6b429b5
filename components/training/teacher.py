"""The teacher: a trained network that only answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from components.common.errors import RetortError
from components.models import checkpoint
from components.models.card import ModelCard, first_difference
from components.training.normalise import Normalise
from components.training.precision import Precision


@dataclass(frozen=True)
class Answer:
    """What a teacher says of a batch: logits float [B, C]."""

    logits: Tensor

    @property
    def probabilities(self) -> Tensor:
        """Float32 [B, C]."""
        return self.logits.float().softmax(dim=1)


class Teacher:
    """A trained network that only answers: frozen, in eval mode, fed as its own card says.

    The published SSLD teacher normalises by the batch while it teaches (76.00 % instead of 75.84 % in that
    paper's table); answers that are kept on disk exclude that, for they must not depend on the batch.
    """

    def __init__(self, folder: Path, precision: Precision) -> None:
        module, card = checkpoint.load(folder)
        self.card: ModelCard = card
        self._precision = precision
        self._module: nn.Module = module.to(precision.device).to(memory_format=torch.channels_last).eval()
        self._module.requires_grad_(False)
        self._normalise = Normalise(card.mean, card.std, precision.device)

    def assert_frozen(self) -> None:
        """Raises AssertionError when a part of the teacher could train, or normalises by the batch."""
        assert not any(part.training for part in self._module.modules()), "the teacher left eval mode"
        assert not any(parameter.requires_grad for parameter in self._module.parameters())

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Answer:
        """Uint8 [B, 3, S, S] -> its answer."""
        inputs = self._normalise(pixels)
        with self._precision.autocast():
            return Answer(self._module(inputs))


def need_same_classes(teacher: ModelCard, class_names: list[str], size: int) -> None:
    """Raises RetortError when the teacher was trained for other classes or another input size."""
    own, again = teacher.class_names, "run 'retort finetune' on this data first"
    if len(own) != len(class_names):
        raise RetortError(
            f"teacher: trained for {len(own)} classes, this data has {len(class_names)} (or "
            f"global.class_num asks for them); {again}"
        )
    label = first_difference(own, dict(enumerate(class_names)))
    if label is not None:
        raise RetortError(
            f"teacher: its classes are named otherwise: it calls label {label} '{own[label]}', this data "
            f"'{class_names[label]}'; {again}"
        )
    if teacher.input_size[1:] != [size, size]:
        raise RetortError(
            f"teacher: trained at {teacher.input_size[1]} px, global.image_size is {size}; "
            "run 'retort finetune' again"
        )

"""The teacher: a trained network that only answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.common.errors import RetortError
from components.models import checkpoint
from components.models.card import ModelCard, first_difference
from components.models.pooled import Pooled
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
        self._seen: Pooled | None = None
        self._sums = self._summed()  # of its values, as they were read

    @property
    def cards(self) -> list[ModelCard]:
        """Of all networks that answer."""
        return [self.card]

    @property
    def feature_width(self) -> int:
        """D of ``features``."""
        if self._seen is None:
            self._seen = Pooled(self._module)
        return self._seen.width

    def assert_frozen(self) -> None:
        """Raises AssertionError when a part of the teacher could train, or normalises by the batch."""
        assert not any(part.training for part in self._module.modules()), "the teacher left eval mode"
        assert not any(parameter.requires_grad for parameter in self._module.parameters())

    def changed(self) -> str:
        """What is no longer as it was when the teacher was opened, in words; empty: nothing."""
        for name, part in self._module.named_modules():
            if part.training:
                return f"{name or 'the network'} is in training mode"
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad:
                return f"{name} takes gradients"
        now = self._summed()
        return next((f"the values of {name} are others" for name in now if now[name] != self._sums[name]), "")

    def _summed(self) -> dict[str, int]:
        """One number for each tensor: the sum of its values' bits, read as integers; one look at a GPU."""
        tensors = self._module.state_dict()
        sums = []
        for tensor in tensors.values():
            bits = tensor.detach()
            if bits.is_floating_point():
                bits = bits.view(torch.int32 if bits.element_size() == 4 else torch.int16)
            sums.append(bits.sum(dtype=torch.int64))
        return dict(zip(tensors, torch.stack(sums).tolist(), strict=True))

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Answer:
        """Uint8 [B, 3, S, S] -> its answer."""
        inputs = self._normalise(pixels)
        with self._precision.autocast():
            return Answer(self._module(inputs))

    def features(self, pixels: Tensor) -> tuple[Answer, Tensor]:
        """Uint8 [B, 3, S, S] -> its answer, and what its classifier reads, float32 [B, D].

        That is brought to mean 0 and deviation 1 of each image.
        """
        assert self.feature_width
        assert self._seen is not None
        answer = self(pixels)
        read = self._seen.take().float()
        return answer, functional.layer_norm(read, read.shape[1:])


class Teachers(Teacher):
    """Several teachers that answer with the mean of their probabilities (Hinton et al., 2015, sec. 5).

    Each is fed as its own card says. ``card`` is the first one's.
    """

    def __init__(self, each: Sequence[Teacher]) -> None:
        self._each = list(each)
        self.card = self._each[0].card

    @property
    def cards(self) -> list[ModelCard]:
        return [card for teacher in self._each for card in teacher.cards]

    @property
    def feature_width(self) -> int:
        return sum(teacher.feature_width for teacher in self._each)

    def assert_frozen(self) -> None:
        for teacher in self._each:
            teacher.assert_frozen()

    def changed(self) -> str:
        return next((what for teacher in self._each if (what := teacher.changed())), "")

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Answer:
        return _mean([teacher(pixels) for teacher in self._each])

    def features(self, pixels: Tensor) -> tuple[Answer, Tensor]:
        """The mean answer; and what all of their classifiers read, side by side."""
        both = [teacher.features(pixels) for teacher in self._each]
        return _mean([answer for answer, _ in both]), torch.cat([read for _, read in both], dim=1)


def _mean(answers: Sequence[Answer]) -> Answer:
    """Logits of the mean of probabilities: its logarithm."""
    logs = torch.stack([answer.logits.float().log_softmax(1) for answer in answers])
    return Answer(logs.logsumexp(0) - math.log(len(answers)))


def open_teacher(
    folder: Path, more: Sequence[Path], class_names: list[str], size: int, precision: Precision
) -> Teacher:
    """The teacher of a folder, and those of others averaged with it.

    Raises:
        RetortError: one was trained for other classes, or another size.
    """
    teachers = []
    for each in (folder, *more):
        teacher = Teacher(each, precision)
        who = "teacher" if each is folder else f"distill.teachers: {each}"
        need_same_classes(teacher.card, class_names, size, who)
        teachers.append(teacher)
    return Teachers(teachers) if more else teachers[0]


def need_same_classes(teacher: ModelCard, class_names: list[str], size: int, who: str = "teacher") -> None:
    """Raises RetortError when a teacher was trained for other classes or another input size.

    Args:
        who: how the message calls it.
    """
    own, again = teacher.class_names, "run 'retort finetune' on this data first"
    if len(own) != len(class_names):
        raise RetortError(
            f"{who}: trained for {len(own)} classes, this data has {len(class_names)} (or "
            f"global.class_num asks for them); {again}"
        )
    label = first_difference(own, dict(enumerate(class_names)))
    if label is not None:
        raise RetortError(
            f"{who}: its classes are named otherwise: it calls label {label} '{own[label]}', this data "
            f"'{class_names[label]}'; {again}"
        )
    if teacher.input_size[1:] != [size, size]:
        raise RetortError(
            f"{who}: trained at {teacher.input_size[1]} px, global.image_size is {size}; "
            "run 'retort finetune' again"
        )

"""A batch, and a teacher that is not there: a task as it meets them, without data or training."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from components.training import losses
from components.training.augmentation import Mix
from components.training.inputs.feed import Batch
from components.training.params import Distill
from components.training.sampling import Draw
from components.training.soft_labels import Answers
from components.training.tasks import task_of
from components.training.tasks.base import Setup
from components.training.tasks.distillation import Distillation
from components.training.teacher import Answer


class Online:
    """Answers of a teacher that is asked at every step, and says always the same."""

    crops: tuple[()] = ()

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def take(self, rows: np.ndarray, views: np.ndarray) -> dict[str, np.ndarray]:
        return {}

    def teacher(self, pixels: Tensor) -> Answer:
        return Answer(self.logits)


class Said(nn.Module):
    """A network that says always the same, and learns it: float [B, C]."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits


def task(
    name: str,
    student: Tensor | nn.Module,
    teacher: Tensor,
    labels: list[int],
    criterion: losses.Loss | None = None,
    answers: Any = None,
    **settings: Any,
) -> Distillation:
    """A task for rows 0, 1, ... of a manifest with these labels.

    Args:
        student: its logits, float [B, C], or a network.
        teacher: its logits, float [B, C].
    """
    setup = Setup(
        np.array(labels, np.int32),
        criterion or losses.CrossEntropy(),
        cast(Answers, answers or Online(teacher)),
        torch.device("cpu"),
        Distill.model_validate(settings),
    )
    network = student if isinstance(student, nn.Module) else Said(student)
    return cast(Distillation, task_of(name)(setup, network))


def batch(of: Distillation, count: int, size: int = 2) -> Batch:
    """The first ``count`` rows, as a feed hands them on."""
    draw = Draw(np.arange(count), np.zeros(count, np.int64), count)
    extra = {name: torch.from_numpy(part) for name, part in of.extra(draw).items()}
    return Batch(draw, torch.zeros(count, 3, size, size, dtype=torch.uint8), extra, 0.0)


def loss(of: Distillation, count: int, mix: Mix | None = None) -> Tensor:
    """What the task makes of these rows."""
    given = batch(of, count)
    value = of(given.pixels.float(), given, mix).loss
    assert isinstance(value, Tensor)
    return value

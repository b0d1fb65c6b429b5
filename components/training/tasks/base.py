"""A task: what a phase learns from a batch. The trainer knows nothing of it but its loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from components.training import losses
from components.training.sampling import AGAIN, Draw

if TYPE_CHECKING:
    from components.training.augmentation import Mix
    from components.training.inputs.feed import Batch
    from components.training.params import Distill
    from components.training.soft_labels import Answers


@dataclass(frozen=True)
class Setup:
    """What a task may need.

    ``labels``: integers by row of the manifest; -1 where there is none. ``criterion``: the labels' loss, as
    the plan asks for it. ``distill``: how to learn from ``answers``, the teacher's.
    """

    labels: np.ndarray
    criterion: losses.Loss
    answers: Answers | None
    device: torch.device
    distill: Distill | None = None


@dataclass(frozen=True)
class Learnt:
    """Loss: scalar, the mean over the batch. Logits: float [B, C]."""

    loss: Tensor
    logits: Tensor


class Task(nn.Module, ABC):
    """What is learnt, apart from the loop: a subclass, and its line in ``TASKS`` or ``METHODS``.

    Modules that a subclass makes for itself (a projector, say) learn with the network, and are kept in
    checkpoints until the phase is over.

    Args:
        network: what is trained, ``self.network``.
    """

    unlabelled: ClassVar[bool] = False  # whether it learns from images without labels too

    def __init__(self, setup: Setup, network: nn.Module) -> None:
        super().__init__()
        self.setup = setup  # its parts do not learn: it is no module
        self.network = network

    def view(self, number: int, before: np.ndarray) -> np.ndarray:
        """Which view of each image an epoch shows: a fresh one each time.

        Args:
            number: of the epoch, over all phases of the network.
            before: how often the row came before in this epoch, int64 [B].
        """
        return number + before * AGAIN

    def shown(self, draws: Iterator[Draw]) -> Iterator[Draw]:
        """The draws of an epoch, as the task has them shown."""
        return draws

    @classmethod
    def gradient_scale(cls, class_num: int, distill: Distill | None) -> float:
        """Norm of the loss's gradient where a classifier begins, relative to cross-entropy's; 1: the same.

        A rate that suits cross-entropy, divided by it, suits the task, where the optimizer is one whose steps
        grow with the gradient (SGD); AdamW and LAMB divide by its size themselves.
        """
        return 1.0

    @abstractmethod
    def extra(self, draw: Draw) -> dict[str, np.ndarray]:
        """What travels with the pixels of a step; called in the thread that feeds."""

    @abstractmethod
    def forward(self, inputs: Tensor, batch: Batch, mix: Mix | None) -> Learnt:
        """Loss and logits of a batch.

        Args:
            inputs: float32 [B, 3, S, S], normalised for the network.
            batch: with ``pixels`` uint8 [B, 3, S, S], mixed already where ``mix`` is given, and ``extra``.
            mix: which image was mixed into which, and how much of it.
        """

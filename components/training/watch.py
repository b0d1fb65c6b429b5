"""The steps of an epoch, watched without waiting for the device: losses, and values that are no number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from operator import add, sub
from time import monotonic

import torch
from torch import Tensor
from torch import distributed as dist

from components.training.group import Group
from components.training.pace import Pace

LOOKED_STEPS = 50  # on a GPU, at most, between two looks at what it has computed: each waits for all of it
LOOKED_SECONDS = 5.0  # ... and about so long at most: SIGTERM is heard then


@dataclass(frozen=True)
class Sums:
    """What some steps came to, over all workers.

    Attributes:
        loss: sum of the images' losses.
        right, told: images that were recognised, and those that have a label to tell by. Of mixed images the
            larger part counts.
        images: all of them.
    """

    loss: float = 0.0
    right: float = 0.0
    told: float = 0.0
    images: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(*map(add, astuple(self), astuple(other)))

    def __sub__(self, other: Sums) -> Sums:
        return Sums(*map(sub, astuple(self), astuple(other)))


class StepWatch:
    """What is known of an epoch's steps: on a CPU after each, on a GPU at looks, some seconds apart.

    Every worker watches in the same way. A value that is no number makes fused optimizers leave everything
    as it is, on the device itself; it is found out at the next look.

    Args:
        steps: of the epoch.
        done: steps that an interrupted run has taken, and ``before``, what they came to.
        wishes: whether this worker was asked to stop, and whether it wants a checkpoint: where one has a
            wish, all learn of it at the same look (``stop``, ``save``).
        every: steps between two looks, as an earlier epoch has found it.
        fail: called with what the loss became and the step, counted from 1, when a value is no number.
    """

    def __init__(
        self,
        device: torch.device,
        group: Group,
        steps: int,
        done: int,
        before: Sums,
        fail: Callable[[float, int], None],
        wishes: Callable[[], tuple[bool, bool]],
        every: int | None = None,
    ) -> None:
        self._at_once = device.type == "cpu"
        self.every = 1 if self._at_once else every or LOOKED_STEPS
        self._next = done + self.every
        self._wishes = wishes
        self._group, self._steps, self._step, self._fail = group, steps, done, fail
        self._sum = torch.zeros((5,), dtype=torch.float64, device=device)
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._last = torch.zeros((5,), dtype=torch.float64, device=device)
        self._work: dist.Work | None = None
        self._everyone = 1
        self._images = 0  # of all workers, since this job began with the epoch
        self._since = 0  # steps since the last look
        self._at = monotonic()
        self._before = before
        self.total = before  # of the epoch
        self.lately, self.looked = (
            Sums(),
            0,
        )  # what the steps between the last two looks came to, and how many
        self.stop = self.save = False
        self.waited = 0.0  # seconds, for images
        self.images = 0

    def begin(self, parts: list[tuple[Tensor, Tensor, Tensor]], everyone: int) -> None:
        """Begin to sum what a step came to, and what workers wish, over all of them.

        Args:
            parts: of this worker's batch, scalars each: the sum of its images' losses, how many images were
                recognised, and how many have a label to tell by.
            everyone: images of all workers.
        """
        self._everyone = everyone
        loss, right, told = (torch.stack(values).sum().double() for values in zip(*parts, strict=True))
        # filled on the device: no copy
        wishes = [torch.full_like(loss, float(wish)) for wish in self._wishes()]
        self._last = torch.stack([loss, right, told, *wishes])
        self._work = self._group.start_sum(self._last)

    def end(self) -> None:
        """All gradients are there; so are the others' losses soon."""
        if self._work is not None:
            self._work.wait()
        self._sum = self._sum + self._last
        self._images += self._everyone
        self.guard(self._last[0])

    def guard(self, value: Tensor) -> None:
        """Note a scalar that is no number."""
        bad = ~torch.isfinite(value)
        self._first_bad = torch.where(bad & (self._first_bad < 0), self._step, self._first_bad)
        if self._at_once:
            self._need_finite()

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the step, unless a value was no number."""
        if not self._at_once:
            # as GradScaler does it: fused optimizers leave everything as it is where this is 1
            optimizer.grad_scale = None  # type: ignore[attr-defined]
            optimizer.found_inf = (self._first_bad >= 0).float()  # type: ignore[attr-defined]
        optimizer.step()

    def due(self) -> bool:
        """A step was taken; whether it is time to look."""
        self._step += 1
        self._since += 1
        return self._step >= self._next or self._step == self._steps

    def look(self, pace: Pace) -> float:
        """Wait for what was computed; the mean loss of the last step."""
        last, so_far = torch.stack([self._last, self._sum]).tolist()
        self._need_finite()
        total = self._before + Sums(so_far[0], so_far[1], so_far[2], self._images)
        self.lately, self.total = total - self.total, total
        self.stop, self.save = last[3] > 0, last[4] > 0
        now = monotonic()
        seconds = (now - self._at) / self._since
        for _ in range(self._since):
            pace.step(seconds)
        self._at, self.looked, self._since = now, self._since, 0
        if not self._at_once:
            fit = int(LOOKED_SECONDS / max(seconds, 1e-6))
            self.every = self._group.agree(min(LOOKED_STEPS, max(1, fit)))
        self._next = self._step + self.every
        return last[0] / self._everyone

    def _need_finite(self) -> None:
        first = int(self._first_bad)
        if first >= 0:
            loss = float(self._last[0]) / self._everyone
            self._fail(loss if not math.isfinite(loss) else math.nan, first + 1)

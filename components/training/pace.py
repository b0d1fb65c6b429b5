"""How much longer a job takes: from what its steps and epochs have taken so far, and corrected by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TIMED_STEPS = 4  # before anything is said; the first of a phase warms up, and is not timed
TIMED_SECONDS = 1.0  # ... that they take together
FORWARD = 0.3  # of a training step: what an image of the validation takes, until that was measured
OFF = 1 / 3  # an estimate that is off by more is said again
WORTH_SECONDS = 5.0  # less is not worth a word


class Promise:
    """What a person was told of the end, and whether that still holds."""

    def __init__(self) -> None:
        self._end: float | None = None

    @property
    def told(self) -> bool:
        """Whether anything was said yet."""
        return self._end is not None

    def renew(self, now: float, left: float) -> bool:
        """Whether to say that ``left`` seconds are left: for the first time, or because it was wrong."""
        if self._end is not None:
            off = abs(now + left - self._end)
            if off < WORTH_SECONDS or off <= OFF * max(self._end - now, left):
                return False
        self._end = now + left
        return True


@dataclass(frozen=True)
class Part:
    """A phase: its epochs, the steps of each, and the images that a worker takes in a step.

    Images of another size count by their pixels; ``judging``: what one of the validation counts then.
    """

    epochs: int
    steps: int
    images: float
    judging: float = 1.0


class Pace:
    """What a job has taken, and what is left of it.

    Args:
        parts: its phases.
        validation: images that a worker judges after each epoch.
        at_the_end: images that it judges when all phases are done.
    """

    def __init__(self, parts: Sequence[Part], validation: float, at_the_end: float) -> None:
        self._parts = parts
        self._validation, self._at_the_end = validation, at_the_end
        self._part = 0
        self._epochs = 0
        self._steps = 0  # of the epoch that runs
        self._timed = 0
        self._timed_seconds = 0.0
        self._image_seconds = 0.0  # of training
        self._after_epochs: list[float] = []

    def phase(self, part: int, epochs: int) -> None:
        """A phase begins, with so many epochs done in an earlier run."""
        self._part, self._epochs, self._steps = part, epochs, 0
        self._timed, self._timed_seconds = 0, 0.0

    def step(self, seconds: float) -> None:
        """A step was taken."""
        self._steps += 1
        if self._steps > 1:  # the first of an epoch starts the loader, too
            self._timed += 1
            self._timed_seconds += seconds
            self._image_seconds = self._timed_seconds / self._timed / self._parts[self._part].images

    def epoch(self, seconds: float) -> None:
        """An epoch is over; judging it and keeping its checkpoint took so long."""
        self._after_epochs.append(seconds / self._parts[self._part].judging)
        self._epochs, self._steps = self._epochs + 1, 0

    @property
    def step_seconds(self) -> float | None:
        """Of a step of this phase; None: none was timed yet."""
        return self._timed_seconds / self._timed if self._timed else None

    @property
    def known(self) -> bool:
        """Whether enough was measured to say something."""
        return bool(self._after_epochs) or (
            self._timed >= TIMED_STEPS and self._timed_seconds >= TIMED_SECONDS
        )

    def left(self) -> float:
        """Seconds until all phases are done and judged."""
        after = self._after_epochs
        judging = sum(after) / len(after) if after else self._validation * FORWARD * self._image_seconds
        image = judging / self._validation if after and self._validation else FORWARD * self._image_seconds
        seconds = self._at_the_end * image
        for place, part in enumerate(self._parts):
            if place < self._part:
                continue
            done = self._epochs if place == self._part else 0
            steps = (part.epochs - done) * part.steps - (self._steps if place == self._part else 0)
            seconds += (
                steps * part.images * self._image_seconds + (part.epochs - done) * part.judging * judging
            )
        return seconds

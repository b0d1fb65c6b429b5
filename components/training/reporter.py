"""What rank 0 tells the driver: progress, estimates, notes."""

from __future__ import annotations

from time import monotonic
from typing import Any

from components.training.context import Context
from components.training.pace import Promise

SEND_SECONDS = 0.4  # between two signs of progress


class Reporter:
    """Sends events; silent on all ranks but 0."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._sent = 0.0
        self._promise = Promise()

    def send(self, kind: str, **values: Any) -> None:
        if self._context.rank == 0:
            self._context.send(kind, **values)

    def at(self, what: str) -> None:
        """What this worker does from now on, of any rank: a sign of life."""
        self._context.at(what)

    def note(self, said: str) -> None:
        """Something that a person should know, in a line."""
        self.send("note", said=said)

    def begin(self, name: str, total: int, unit: str, **values: Any) -> None:
        """Something long begins: so many units."""
        self._sent = 0.0
        self.send("phase", name=name, total=total, unit=unit, **values)

    def progress(self, done: int, note: str = "") -> None:
        if monotonic() - self._sent > SEND_SECONDS:
            self._sent = monotonic()
            self.send("progress", done=done, note=note)

    def promise(self, left: float, name: str) -> None:
        """So many seconds are left: told at first, and whenever what was told turned out wrong."""
        again = self._promise.told
        if self._context.rank == 0 and self._promise.renew(monotonic(), left):
            self.send("estimate", name=name, seconds=left, again=again)

    def forget_promise(self) -> None:
        """What was promised is over; the next promise is of something else."""
        self._promise = Promise()

"""Progress of long work: bars on a terminal, plain lines with percentages elsewhere (CI, pods)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

T = TypeVar("T")

QUIET_SECONDS = 2.0  # shorter work says nothing
LINE_SECONDS = 5.0  # between two plain lines


def say(message: str) -> None:
    """A line for the person who watches, on standard error."""
    print(message, file=sys.stderr, flush=True)


def counted(count: int, noun: str) -> str:
    """``1 note``, ``2 notes``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class Task:
    """Counts up to ``total``; ``note`` is shown beside the count (a loss, a file's name)."""

    def __init__(self, description: str, total: int) -> None:
        self.description = description
        self.total = max(total, 1)
        self.done = 0
        self.note = ""
        self._started = self._last_line = time.monotonic()
        self._bar: tuple[Progress, TaskID] | None = None

    def advance(self, count: int = 1, note: str = "") -> None:
        self.update(self.done + count, note)

    def update(self, done: int, note: str = "") -> None:
        self.done = min(done, self.total)
        self.note = note or self.note
        now = time.monotonic()
        if now - self._started < QUIET_SECONDS:
            return
        if sys.stderr.isatty():
            self._draw()
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            self._line()

    def close(self, complete: bool = True) -> None:
        """Take the bar off the screen; ``complete``: the last plain line says 100 %."""
        if self._bar is not None:
            self._bar[0].stop()
        elif complete and self._last_line > self._started:
            self.done = self.total
            self._line()

    def _line(self) -> None:
        share = 100 * self.done // self.total
        note = f"  {self.note}" if self.note else ""
        elapsed = time.monotonic() - self._started
        say(f"  {self.description}: {share}% ({self.done}/{self.total}, {elapsed:.0f} s){note}")

    def _draw(self) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            bar = Progress(
                TextColumn("  {task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            bar.start()
            self._bar = (bar, bar.add_task(self.description, total=self.total, note=""))
        bar, shown = self._bar
        bar.update(shown, completed=self.done, note=self.note)


@contextmanager
def task(description: str, total: int) -> Iterator[Task]:
    """Show progress of ``total`` units of work; nothing is shown for work under two seconds."""
    shown = Task(description, total)
    complete = False
    try:
        yield shown
        complete = True
    finally:
        shown.close(complete)


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Iterate over ``items`` and show how far it is."""
    with task(description, total) as shown:
        for item in items:
            yield item
            shown.advance()

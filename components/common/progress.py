"""Progress of long work: bars on a terminal, plain lines elsewhere (CI, pods).

A thread looks at what is being done, innermost first: once nothing was said for a while, it says so. It
writes under a lock that a fork waits for, and ends with the outermost work.

On a terminal no silence lasts over two seconds. Elsewhere lines stay, in a log that somebody pays for: all
work together says at most one line of progress in 15 seconds (``RETORT_LINE_SECONDS`` sets another number).
What is no progress but a result or a fault is logged at once, by each module's logger; ``RETORT_LOG_LEVEL``
(debug, info, warning, error) is the least level that is said, ``--log-level`` of the command line before it.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from components.common.environment import environment

if TYPE_CHECKING:
    from rich.console import Console
    from rich.logging import RichHandler
    from rich.progress import Progress, TaskID

T = TypeVar("T")

QUIET_SECONDS = 2.0  # shorter work says nothing
LINE_SECONDS = 15.0  # between two plain lines of progress, whatever work they are about
SETTING = "RETORT_LINE_SECONDS"  # another number of them
TICK_SECONDS = 0.5  # between two looks, and two pictures of the spinner
SPINNER = "|/-\\"
LEVEL = "RETORT_LOG_LEVEL"  # lines below it are not said
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
PLAIN = "%(asctime)s %(levelname)s %(message)s"

log = logging.getLogger(__name__)


class _Work(Protocol):
    """Something that takes long; ``quiet``: seconds of silence after which it is named first, without a
    terminal; ``named``: whether it was."""

    quiet: float
    named: bool

    def line(self) -> str: ...


class _Watch:
    """What is being done, innermost last; when something was last said; the thread that looks at both."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.forget()

    def forget(self) -> None:
        self.stack: list[_Work] = []
        self.last = time.perf_counter()
        self.lined = -math.inf  # when a line of progress was said
        self.spinning = False
        self.bars = 0
        self._end = threading.Event()
        self._frames = itertools.cycle(SPINNER)

    def begin(self, work: _Work) -> None:
        with self.lock:
            self.stack.append(work)
            if len(self.stack) > 1:
                return
            self._end = threading.Event()
            self.last = time.perf_counter()
            threading.Thread(target=self._look, args=(self._end,), name="progress", daemon=True).start()

    def end(self, work: _Work) -> None:
        with self.lock:
            self.erase()
            if work in self.stack:
                self.stack.remove(work)
            if not self.stack:
                self._end.set()

    def erase(self) -> None:
        """Take the spinner off the screen."""
        if self.spinning:
            self.spinning = False
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _look(self, end: threading.Event) -> None:
        while not end.wait(TICK_SECONDS):
            with self.lock:
                if not end.is_set() and self.stack and not self.bars:
                    self.look()

    def look(self) -> None:
        """Say what is being done, if it is time to."""
        work = self.stack[-1]
        now = time.perf_counter()
        silent = now - self.last
        if on_terminal():
            if silent >= QUIET_SECONDS:
                self.spinning = True
                text = f"{next(self._frames)} {work.line().strip()}"
                sys.stderr.write(f"\r\x1b[K  {text[: shutil.get_terminal_size().columns - 3]}")
                sys.stderr.flush()
        elif silent >= (line_seconds() if work.named else work.quiet) and self.due(now):
            self.line(work)

    def due(self, now: float) -> bool:
        """Whether the last line of progress is long enough ago."""
        return now - self.lined >= line_seconds()

    def line(self, work: _Work) -> None:
        work.named = True
        self.lined = time.perf_counter()
        log.info(work.line())


_watch = _Watch()


def _after_fork() -> None:
    _watch.lock.release()
    _watch.forget()  # its thread does not live here


os.register_at_fork(
    before=_watch.lock.acquire, after_in_parent=_watch.lock.release, after_in_child=_after_fork
)


def on_terminal() -> bool:
    """Whether a person watches standard error on a terminal that can draw."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def line_seconds() -> float:
    """Seconds between two lines of progress where there is no terminal."""
    try:
        return max(0.0, float(os.environ[SETTING]))
    except (KeyError, ValueError):
        return LINE_SECONDS


def log_if_due(message: str) -> bool:
    """A line of what comes again and again, such as an epoch's result: each one on a terminal, elsewhere one
    in 15 seconds, lines of progress counted.

    Returns:
        Whether it was said.
    """
    with _watch.lock:
        now = time.perf_counter()
        if not (on_terminal() or _watch.due(now)):
            return False
        _watch.lined = now
        log.info(message)
        return True


class LineHandler(logging.Handler):
    """Lines for the person who watches, on standard error: by rich on a terminal, plain ones elsewhere.

    A line takes the place of the spinner, and stands above the bars. Its lock is that of the watch, which
    writes on the same screen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(PLAIN, datefmt="%Y-%m-%d %H:%M:%S"))

    def createLock(self) -> None:  # noqa: N802 - logging's name
        self.lock = _watch.lock

    def emit(self, record: logging.LogRecord) -> None:
        _watch.erase()
        try:
            if on_terminal():
                _rich_handler().emit(record)
            else:
                print(self.format(record), file=sys.stderr, flush=True)
        except Exception:  # noqa: BLE001 - a line that cannot be written stops no work
            self.handleError(record)
        _watch.last = time.perf_counter()


@functools.cache
def _console() -> Console:
    """The terminal: one for lines and bars, so that lines stand above the bars."""
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True)


@functools.cache
def _rich_handler() -> RichHandler:
    from rich.highlighter import NullHighlighter
    from rich.logging import RichHandler
    from rich.text import Text

    class Lines(RichHandler):
        """The message as it is, after its level where that is more than info: no table, so no padding."""

        def render(self, *, record: Any, traceback: Any, message_renderable: Any) -> Any:
            if record.levelno < logging.WARNING:
                return message_renderable
            level = record.levelname
            return Text.assemble((level, f"logging.level.{level.lower()}"), " ", message_renderable)

    return Lines(console=_console(), markup=False, highlighter=NullHighlighter())


def begin_logging() -> None:
    """Give the loggers of ``components`` and ``pipelines`` their handler, and the level ``RETORT_LOG_LEVEL``.

    Only these: other libraries log as loudly as they did.
    """
    wanted = (os.environ.get(LEVEL) or "info").upper()
    level = wanted if wanted in LEVELS else "INFO"
    handler = LineHandler()
    for name in ("components", "pipelines"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False  # a root logger that a library has set up would say each line once more
        logger.setLevel(level)
    if wanted not in LEVELS:
        log.warning(f"{LEVEL}: '{wanted.lower()}' is none of {', '.join(LEVELS).lower()}; info is taken")


@contextmanager
def logging_from(level: str) -> Iterator[None]:
    """Say no less than ``level`` inside the block, in this process and in those that it starts."""
    try:
        with environment({LEVEL: level}):
            begin_logging()
            yield
    finally:
        begin_logging()


class Work:
    """Work without a count: what it is, and how long it has taken."""

    def __init__(self, name: str, what: str, quiet: float) -> None:
        self.name, self.what = name, what
        self.quiet = quiet
        self.named = False
        self._started = time.perf_counter()

    def line(self) -> str:
        return f"  {self.name}: {self.what} ({time.perf_counter() - self._started:.0f} s)"

    def turn(self, what: str) -> None:
        """Go on with something else."""
        with _watch.lock:
            self.what, self.named, self._started = what, False, time.perf_counter()


@contextmanager
def doing(name: str, what: str = "at work", quiet: float = QUIET_SECONDS) -> Iterator[None]:
    """Name work that takes long: by a spinner on a terminal, now and then by a line elsewhere.

    Args:
        name: whose work it is, such as a step's.
        what: what it begins with; ``at`` goes on from there.
    """
    work = Work(name, what, quiet)
    _watch.begin(work)
    try:
        yield
    finally:
        _watch.end(work)


def at(what: str) -> None:
    """Name what the innermost work of ``doing``, a step's, goes on with from here."""
    with _watch.lock:
        for work in reversed(_watch.stack):
            if isinstance(work, Work):
                work.turn(what)
                return


def counted(count: int, one: str, several: str = "") -> str:
    """``1 note``, ``2 notes``; with a verb, or another plural: ``counted(n, "class is", "classes are")``."""
    return f"{count:,} {one if count == 1 else several or f'{one}s'}"


class Task:
    """Counts up to ``total``; ``note`` is shown beside the count (a loss, a file's name)."""

    def __init__(self, description: str, total: int) -> None:
        self.description = description
        self.total = max(total, 1)
        self.done = 0
        self.note = ""
        self.quiet = QUIET_SECONDS
        self.named = False
        self._started = time.perf_counter()
        self._bar: tuple[Progress, TaskID] | None = None

    def advance(self, count: int = 1, note: str = "") -> None:
        self.update(self.done + count, note)

    def update(self, done: int, note: str = "") -> None:
        self.done = min(done, self.total)
        self.note = note or self.note
        now = time.perf_counter()
        if now - self._started < QUIET_SECONDS:
            return
        if on_terminal():
            self._draw()
            return
        with _watch.lock:
            if _watch.due(now):
                _watch.line(self)

    def close(self, complete: bool = True) -> None:
        """Take the bar off the screen; ``complete``: the last plain line says 100 %, if one is due."""
        if self._bar is not None:
            self._bar[0].stop()
            with _watch.lock:
                _watch.bars -= 1
                _watch.last = time.perf_counter()
        elif complete and self.named:
            self.done = self.total
            with _watch.lock:
                if _watch.due(time.perf_counter()):
                    _watch.line(self)

    def line(self) -> str:
        share = 100 * self.done // self.total
        note = f"  {self.note}" if self.note else ""
        elapsed = time.perf_counter() - self._started
        return f"  {self.description}: {share}% ({self.done}/{self.total}, {elapsed:.0f} s){note}"

    def _draw(self) -> None:
        if self._bar is None:
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                SpinnerColumn,
                TextColumn,
                TimeRemainingColumn,
            )

            with _watch.lock:
                _watch.erase()
                _watch.bars += 1
            bar = Progress(
                SpinnerColumn(),
                TextColumn("  {task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=_console(),
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
    _watch.begin(shown)
    try:
        yield shown
        complete = True
    finally:
        _watch.end(shown)
        shown.close(complete)


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Iterate over ``items`` and show how far it is."""
    with task(description, total) as shown:
        for item in items:
            yield item
            shown.advance()


begin_logging()

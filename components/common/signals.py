"""SIGINT and SIGTERM as exceptions, remembered: some libraries turn what a handler raised into another."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from components.common.errors import Terminated

_caught: list[int] = []
_holding = False


def catch() -> None:
    """Let both signals end the work in order. A SIGINT that the parent process ignores stays ignored."""
    signal.signal(signal.SIGTERM, _raise)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _raise)


def _raise(number: int, frame: FrameType | None) -> None:
    _caught.append(number)
    if not _holding:
        raise _exception(number)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Hold both signals back, until ``raise_pending``, for some seconds of work that must not be torn.

    An exception in its midst may leave a lock of the logging module taken, on which a thread then waits for
    ever.
    """
    global _holding
    _holding = True
    try:
        yield
    finally:
        _holding = False


def raise_pending() -> None:
    """Raise what was caught, if it was held back, or a library swallowed it."""
    if _caught:
        raise _exception(_caught[-1])


def _exception(number: int) -> BaseException:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


def stopped_by(error: BaseException) -> BaseException | None:
    """The signal behind an error, as its exception; None when the work failed by itself.

    DuckDB, for one, ends a query in which a signal arrives with a RuntimeError of its own.
    """
    if isinstance(error, KeyboardInterrupt | Terminated):
        return error
    return _exception(_caught[-1]) if _caught else None

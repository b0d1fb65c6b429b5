"""SIGINT and SIGTERM as exceptions, remembered: some libraries turn what a handler raised into another."""

from __future__ import annotations

import signal
from types import FrameType

from components.common.errors import Terminated

_caught: list[int] = []


def catch() -> None:
    """Let both signals end the work in order. A SIGINT that the parent process ignores stays ignored."""
    signal.signal(signal.SIGTERM, _raise)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _raise)


def _raise(number: int, frame: FrameType | None) -> None:
    _caught.append(number)
    raise _exception(number)


def _exception(number: int) -> BaseException:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


def stopped_by(error: BaseException) -> BaseException | None:
    """The signal behind an error, as its exception; None when the work failed by itself.

    DuckDB, for one, ends a query in which a signal arrives with a RuntimeError of its own.
    """
    if isinstance(error, KeyboardInterrupt | Terminated):
        return error
    return _exception(_caught[-1]) if _caught else None

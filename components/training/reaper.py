"""Ends what a killed driver leaves behind: a process of its own, started beside a local Ray cluster.

Ray's servers die with the driver, but the raylet's children outlive it for a minute. Who is whose child can
be seen only while the parents live, so descendants are noted as they come, by descriptors of the processes
themselves: a number that another process has by now is never signalled. Run as a script, with the standard
library alone.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOOK_SECONDS = 1.0
GRACE_SECONDS = 1.0  # for those that end by themselves
END_SECONDS = 5.0
IN_ORDER = b"."  # what the driver says when it has stopped Ray by itself


@contextmanager
def beside() -> Iterator[None]:
    """Have a reaper watch this process; nothing happens where the system has no descriptors of processes."""
    if not hasattr(os, "pidfd_open"):
        yield
        return
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid())]
    # a session of its own: neither Ctrl-C nor what kills the driver's group reaches it
    watching = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    assert watching.stdin is not None
    try:
        yield
    finally:
        with suppress(OSError):
            watching.stdin.write(IN_ORDER)
            watching.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            watching.wait(END_SECONDS)


def watch(driver: int) -> None:
    """Note the driver's descendants until it says that all is over; kill them if it ends before."""
    noted: dict[tuple[int, str], int] = {}
    try:
        end = os.pidfd_open(driver)
    except ProcessLookupError:
        return
    if os.getppid() != driver:
        return
    told = sys.stdin.fileno()
    watched = [end, told]
    while end in watched:
        _note(driver, noted)
        ready, _, _ = select.select(watched, [], [], LOOK_SECONDS)
        if told in ready:
            if os.read(told, 1) == IN_ORDER:
                return
            watched.remove(told)  # closed without a word: the end of a killed process begins with its files
        if end in ready:
            watched.remove(end)
    time.sleep(GRACE_SECONDS)
    for descriptor in noted.values():
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)


def _note(driver: int, noted: dict[tuple[int, str], int]) -> None:
    """Open a descriptor of each descendant that is new, and close those of processes that are gone."""
    found = descendants(driver)
    for key in [key for key in noted if key not in found]:
        ended, _, _ = select.select([noted[key]], [], [], 0)
        if ended:  # else only its parent is gone
            os.close(noted.pop(key))
    for pid, started in found - noted.keys():
        if pid == os.getpid():
            continue
        with suppress(OSError):
            descriptor = os.pidfd_open(pid)
            if _stat(pid)[1] == started:
                noted[pid, started] = descriptor
            else:  # another process by now
                os.close(descriptor)


def descendants(ancestor: int) -> set[tuple[int, str]]:
    """Number and start time of each process below ``ancestor``."""
    children: dict[int, list[tuple[int, str]]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError, IndexError):
                parent, started = _stat(int(name))
                children.setdefault(parent, []).append((int(name), started))
    found: set[tuple[int, str]] = set()
    todo = [ancestor]
    while todo:
        below = children.get(todo.pop(), [])
        found.update(below)
        todo += [pid for pid, _ in below]
    return found


def _stat(pid: int) -> tuple[int, str]:
    """Parent, and start in clock ticks since boot; the name, in brackets before them, may hold anything."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[1]), fields[19].decode()


if __name__ == "__main__":
    watch(int(sys.argv[1]))

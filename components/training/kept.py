"""What a training on one machine keeps elsewhere, so that a new pod goes on: checkpoints, soft labels.

A cluster of several machines has ``ray.storage`` for that, and cannot work without it. A pod that trains by
itself writes to its own disk, at the disk's speed, and a copy goes to the place of
``components.common.shared`` beside the work: no store that is away stops a training.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from components.common import shared
from components.common.storage import remove

log = logging.getLogger(__name__)

EVERY_SECONDS = 15.0  # between two looks for a new checkpoint
SHARE = 10  # times as long as a copy took, until the next one begins


class SharedExchange:
    """``context.Exchange`` of a worker that no other node waits for: files are kept if that can be done."""

    def publish(self, path: Path) -> None:
        shared.keep(path)

    def fetch(self, path: Path) -> bool:
        return shared.bring(path)


@contextmanager
def checkpoints(folder: Path, state: str, rescued: str) -> Iterator[None]:
    """Go on from the last checkpoint that another pod kept of the run in ``folder``, and keep new ones.

    Args:
        state: the file in a checkpoint's folder.
        rescued: what the copy of the last one is called, in ``folder``.
    """
    if shared.place() is None:
        yield
        return
    if not any(folder.glob("checkpoint_*")):
        folder.mkdir(parents=True, exist_ok=True)
        if shared.bring(folder / rescued) and not zipfile.is_zipfile(folder / rescued):
            remove(folder / rescued)
        elif (folder / rescued).exists():
            log.info(f"going on from the last checkpoint that was kept in {shared.where(folder)}")
    copy = _Copy(folder, state, rescued)
    copy.start()
    try:
        yield
    except BaseException:
        copy.end(send=True)
        raise
    copy.end(send=False)  # what was learnt is here


class _Copy(threading.Thread):
    def __init__(self, folder: Path, state: str, rescued: str) -> None:
        super().__init__(name="checkpoints", daemon=True)
        self._folder, self._state, self._rescued = folder, state, rescued
        self._ending = threading.Event()
        self._last: tuple[str, int] | None = None

    def run(self) -> None:
        pause = EVERY_SECONDS
        while not self._ending.wait(pause):
            started = time.monotonic()
            self._send()
            pause = max(EVERY_SECONDS, SHARE * (time.monotonic() - started))

    def end(self, send: bool) -> None:
        self._ending.set()
        self.join()
        if send:
            self._send()

    def _send(self) -> None:
        """Send the newest whole checkpoint, by a link: Ray removes it as soon as there is another."""
        link = self._folder / f".{self._rescued}.copy"
        for file in sorted(self._folder.glob(f"checkpoint_*/{self._state}"), reverse=True):
            remove(link)
            try:
                os.link(file, link)
                found = (file.parent.name, link.stat().st_mtime_ns)
            except OSError:
                continue
            if not zipfile.is_zipfile(link):  # its end was not written yet
                continue
            if found != self._last and shared.keep(link, self._folder / self._rescued):
                self._last = found
            break
        remove(link)

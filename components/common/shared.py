"""What outlives a pod: state that steps on several machines keep in one place, ``$RETORT_SHARED``.

A pod's disk ends with the pod. Where ``RETORT_SHARED`` is s3://bucket/prefix, or a folder that all pods
mount, each step keeps there what a later one can use, under names that say what decided the content: whoever
writes such a name writes the same, so nobody waits for a lock. Nothing of it is needed: a place that is away,
slow, full or forbidden costs time and one warning, never a step's outcome. Without the variable nothing is
shared.
"""

from __future__ import annotations

import functools
import logging
import os
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from components.common.errors import RetortError
from components.common.object_store import MissingError, Storage, open_storage
from components.common.storage import atomic_path, human_bytes, need_disk, state_dir

log = logging.getLogger(__name__)

T = TypeVar("T")
VARIABLE = "RETORT_SHARED"
STATE = "state"  # below the place: files as they lie below the state folder
SECONDS = 60.0  # that a step waits for the place, in one go
PAUSE_SECONDS = 60.0  # after it failed, in which nobody asks again
MOST_BYTES = 16 << 30  # of what is kept at once: beyond, making it again may be the quicker way
SECONDS_A_BYTE = 1 / 5e6  # that sending and fetching may take: 5 MB/s is a slow store


class Shared:
    """The place, and how it has answered so far."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._pause_until = 0.0
        self._warned = False

    @functools.cached_property
    def storage(self) -> Storage:
        """Raises RetortError when the URI is none."""
        return open_storage(self.uri, parameter="kubeflow.state", patient=False)

    def attempt(
        self, work: Callable[[Storage], T], seconds: float = SECONDS, insist: bool = False
    ) -> T | None:
        """Do ``work`` with the place; None when it cannot be done now, which is said once.

        Args:
            seconds: to wait for it.
            insist: ask although it failed a moment ago: there is no later time.
        """
        if time.monotonic() < self._pause_until and not insist:
            return None
        done: list[T] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                done.append(work(self.storage))
            except BaseException as error:  # noqa: BLE001 - judged by the thread that waits
                failed.append(error)

        # in a thread of its own: a look-up of a name, or a hung mount, knows no time limit
        thread = threading.Thread(target=run, name="shared", daemon=True)
        thread.start()
        thread.join(seconds)
        if done:
            return done[0]
        error = (
            failed[0] if failed else RetortError(f"kubeflow.state: {self.uri}: no answer in {seconds:g} s")
        )
        if not isinstance(error, (RetortError, OSError)):
            raise error
        self._pause_until = time.monotonic() + PAUSE_SECONDS
        if not self._warned:
            self._warned = True
            log.warning(f"{' '.join(str(error).split())}; this step goes on without it")
        return None


def place() -> Shared | None:
    """Where state is shared; None: it is not."""
    uri = os.environ.get(VARIABLE, "")
    return _shared(uri) if uri else None


@functools.cache
def _shared(uri: str) -> Shared:
    return Shared(uri)


def keep(path: Path, known_as: Path | None = None) -> bool:
    """Let later pods have a file or a folder below the state folder; a folder travels as one archive.

    Args:
        known_as: where they will look for it; None: at ``path``.

    Returns:
        Whether it is kept.
    """
    shared = place()
    if shared is None:
        return False
    name, size = _name(known_as or path), _size(path)
    if size > MOST_BYTES:
        log.info(f"{path}: {human_bytes(size)} are kept on this machine only")
        return False

    def send(storage: Storage) -> bool:
        if path.is_file():
            storage.put(path, name)
            return True
        with tempfile.TemporaryDirectory(prefix="kept-", dir=state_dir()) as folder:
            archive = Path(folder) / "kept.tar"
            need_disk(archive.parent, size, "an archive of what is kept")
            with tarfile.open(archive, "w") as tar:
                for file in sorted(path.rglob("*")):
                    tar.add(file, file.relative_to(path).as_posix(), recursive=False)
            storage.put(archive, f"{name}.tar")
        return True

    return bool(shared.attempt(send, SECONDS + size * SECONDS_A_BYTE))


def bring(path: Path, folder: bool = False) -> bool:
    """Bring a file or folder below the state folder that a pod kept; whether it is here now."""
    shared = place()
    if path.exists() or shared is None:
        return path.exists()

    def fetch(storage: Storage) -> bool:
        try:
            if not folder:
                storage.get(_name(path), path)
                return True
            with tempfile.TemporaryDirectory(prefix="kept-", dir=state_dir()) as place:
                archive = Path(place) / "kept.tar"
                storage.get(f"{_name(path)}.tar", archive)
                with atomic_path(path) as partial, tarfile.open(archive, "r:") as tar:
                    partial.mkdir()
                    tar.extractall(partial, filter="data")
        except MissingError:
            return False
        except tarfile.TarError as error:
            log.warning(f"{shared.uri}: {_name(path)}: not what was kept ({error}); it is made again")
            return False
        return True

    shared.attempt(fetch, SECONDS + MOST_BYTES * SECONDS_A_BYTE)
    return path.exists()


def drop(path: Path) -> None:
    """Forget a file or folder that a pod kept."""
    if (shared := place()) is not None:
        name = _name(path)

        def discard(storage: Storage) -> None:
            storage.discard(name)
            storage.discard(f"{name}.tar")

        shared.attempt(discard)


def where(path: Path) -> str:
    """What to call a file below the state folder to a person: where it is kept for all."""
    shared = place()
    return str(path) if shared is None else f"{shared.uri}/{_name(path)}"


def _name(path: Path) -> str:
    return f"{STATE}/{path.resolve().relative_to(state_dir().resolve()).as_posix()}"


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def put_text(storage: Storage, text: str, name: str) -> None:
    """Keep a short text under a name."""
    _with_text(text, lambda path: storage.put(path, name))


def create_text(storage: Storage, text: str, name: str) -> bool:
    """The same, if the name is free; False: it is not."""
    return _with_text(text, lambda path: storage.create(path, name))


def _with_text(text: str, work: Callable[[Path], T]) -> T:
    with tempfile.TemporaryDirectory(prefix="shared-") as folder:
        path = Path(folder) / "text"
        path.write_text(text, encoding="utf-8")
        return work(path)


def read_text(storage: Storage, name: str) -> str:
    """A short text. Raises MissingError when there is none."""
    with tempfile.TemporaryDirectory(prefix="shared-") as folder:
        path = Path(folder) / "text"
        storage.get(name, path)
        return path.read_text(encoding="utf-8")

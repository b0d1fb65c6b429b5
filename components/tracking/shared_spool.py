"""The spool of a pod, beyond the pod: a copy in the place that all pods share, until MLflow has it.

A step's entry is copied there while the step runs. When its pod is gone, the next step that reaches MLflow,
or ``retort sync``, takes the copy over and sends it.
"""

from __future__ import annotations

import os
import tempfile
import threading
from contextlib import suppress
from pathlib import Path, PurePosixPath

from components.common import shared
from components.common.object_store import MissingError, Storage
from components.common.storage import state_dir
from components.tracking.spool import Entry

FOLDER = "spool"
ALIVE, TAKEN = "alive", "taken"
EVENTS, CURSOR = "events.jsonl", "cursor.json"  # of an entry
BEAT_SECONDS = 20.0
DEAD_SECONDS = 180.0  # after its last sign of life an entry is anybody's
TAKEN_SECONDS = 600.0  # after which whoever took an entry has failed
END_SECONDS = 20.0  # for the last copy: Kubernetes kills after 30


class Copy(threading.Thread):
    """Copies an entry beside the work, every so many seconds."""

    def __init__(self, place: shared.Shared, entry: Entry) -> None:
        super().__init__(name="spool", daemon=True)
        self._place, self._entry = place, entry
        self._sent: dict[Path, tuple[int, int]] = {}
        self._ending = threading.Event()

    def run(self) -> None:
        self._place.attempt(self._beat)
        while not self._ending.wait(BEAT_SECONDS):
            self._place.attempt(self._beat)

    def end(self) -> None:
        """The step is over: its copy is whole, and anybody's, or gone, as the entry is."""
        self._ending.set()
        self.join(END_SECONDS)
        if self._entry.folder.exists():
            self._place.attempt(self._last, END_SECONDS, insist=True)
        elif self._sent:
            forget(self._entry.folder.name)

    def _last(self, storage: Storage) -> None:
        self._files(storage)
        storage.discard(_name(self._entry.folder.name, ALIVE))

    def _beat(self, storage: Storage) -> None:
        shared.put_text(storage, "", _name(self._entry.folder.name, ALIVE))
        self._files(storage)

    def _files(self, storage: Storage) -> None:
        folder = self._entry.folder
        with suppress(FileNotFoundError):  # it was sent to MLflow just now
            # read before the events: one that is ahead of them would leave some out
            cursor = (folder / CURSOR).read_text(encoding="utf-8") if (folder / CURSOR).exists() else ""
            artifacts = [path for path in (folder / "artifacts").rglob("*") if path.is_file()]
            for path in (*sorted(artifacts), self._entry.file):
                status = path.stat()
                same = (status.st_size, status.st_mtime_ns)
                if self._sent.get(path) != same:
                    storage.put(path, _name(folder.name, path.relative_to(folder).as_posix()))
                    self._sent[path] = same
            if cursor:
                shared.put_text(storage, cursor, _name(folder.name, CURSOR))


def copying(entry: Entry) -> Copy | None:
    """Begin to copy an entry, where state is shared."""
    place = shared.place()
    if place is None:
        return None
    copy = Copy(place, entry)
    copy.start()
    return copy


def adopt(uri: str | None = None, most: int | None = None) -> int:
    """Take over copies whose pods are gone into the spool of this machine; returns how many.

    Args:
        uri: only those that were meant for this tracker; None: all.
        most: of them; None: all.
    """
    place = shared.place()
    if place is None:
        return 0

    def take(storage: Storage) -> int:
        count = 0
        ids = {PurePosixPath(name).parts[1] for name in storage.list(FOLDER)}
        for name in sorted(ids):
            if (state_dir("spool") / name).exists() or (most is not None and count >= most):
                continue
            if _take(storage, name, uri):
                count += 1
        return count

    return place.attempt(take) or 0


def forget(name: str) -> None:
    """Remove the copy of an entry: MLflow has it."""
    if (place := shared.place()) is not None:
        place.attempt(lambda storage: storage.remove(f"{FOLDER}/{name}"))


def _take(storage: Storage, name: str, uri: str | None) -> bool:
    with tempfile.TemporaryDirectory(prefix="taken-", dir=state_dir()) as made:
        partial = Path(made) / name
        try:
            storage.get(_name(name, EVENTS), partial / EVENTS)
            start = next(iter(Entry(partial).events()), {})
            if start.get("kind") != "start" or uri not in (None, start["uri"]):
                return False
            age = storage.age(_name(name, ALIVE))
            if (age is not None and age < DEAD_SECONDS) or not _mine(storage, name):
                return False
            for file in storage.list(f"{FOLDER}/{name}"):
                below = PurePosixPath(file).relative_to(f"{FOLDER}/{name}")
                if below.name not in (ALIVE, TAKEN):
                    storage.get(file, partial / below)
            os.replace(partial, state_dir("spool") / name)
        except MissingError:  # another has sent it meanwhile
            return False
    return True


def _mine(storage: Storage, name: str) -> bool:
    """Whether nobody else is sending this entry."""
    claim = _name(name, TAKEN)
    if shared.create_text(storage, os.uname().nodename, claim):
        return True
    age = storage.age(claim)
    if age is not None and age < TAKEN_SECONDS:
        return False
    shared.put_text(storage, os.uname().nodename, claim)
    return True


def _name(entry: str, file: str) -> str:
    return f"{FOLDER}/{entry}/{file}"

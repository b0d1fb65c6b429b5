"""The spool: what steps recorded, on this disk, until MLflow has it. Knows no MLflow."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.common.storage import remove, state_dir


class Entry:
    """One step in the spool: its events, copies of its artifacts, and how far they were replayed."""

    def __init__(self, folder: Path) -> None:
        from filelock import FileLock

        self.folder = folder
        self.file = folder / "events.jsonl"
        # the thread that a server kept waiting gives it back when it gets through after all
        self._lock = FileLock(folder / "lock", thread_local=False)
        self._writing = threading.Lock()  # a line that is read while it is written would count as cut

    def make(self) -> None:
        """Make the folder and hold it: what a living process holds, nobody else replays."""
        self.folder.mkdir(parents=True)
        self._lock.acquire(timeout=0)

    def release(self) -> None:
        self._lock.release()

    @contextmanager
    def held(self) -> Iterator[bool]:
        """True inside the block if the process that wrote this is gone, so that we may replay it."""
        from filelock import Timeout

        try:
            self._lock.acquire(timeout=0)
        except (Timeout, OSError):
            yield False
            return
        try:
            yield self.file.exists()
        finally:
            self._lock.release()

    def append(self, kind: str, **values: Any) -> None:
        event = {"kind": kind, "t": int(time.time() * 1000), **values}
        with self._writing, self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def close(self) -> None:
        """End what was never ended, because its process was killed."""
        events = self.events()
        if not any(event["kind"] == "finish" for event in events):
            with self.file.open("a", encoding="utf-8") as file:
                file.write("\n")  # the last line may have been cut
            self.append("finish", t=max(event["t"] for event in events), status="KILLED", reused={})

    def copy(self, path: Path) -> str:
        """Copy an artifact into the spool; returns its place there."""
        folder = self.folder / "artifacts"
        folder.mkdir(exist_ok=True)
        place = folder / str(len(list(folder.iterdir())))
        place.mkdir()
        shutil.copyfile(path, place / path.name)
        return str((place / path.name).relative_to(self.folder))

    def events(self) -> list[dict[str, Any]]:
        """All events; a line that was cut short when its process was killed counts as nothing."""
        events = []
        with self._writing:
            text = self.file.read_text(encoding="utf-8")
        for line in text.splitlines():
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                events.append({"kind": "cut", "t": 0})
        return events

    def remove(self) -> None:
        self._lock.release()
        remove(self.folder)


def leftovers(uri: str | None = None) -> list[Entry]:
    """Entries in the spool, oldest first; with ``uri`` only those that were meant for it."""
    found = []
    for folder in state_dir("spool").absolute().iterdir():
        entry = Entry(folder)
        if not entry.file.exists():
            continue
        first = next(iter(entry.events()), {})
        if first.get("kind") == "start" and uri in (None, first["uri"]):
            found.append((first["t"], folder.name, entry))
    return [entry for _, _, entry in sorted(found, key=lambda item: item[:2])]

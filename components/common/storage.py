"""Files: atomic writes, hashes, the folder of what must survive, the lock, room on the disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from components.common.errors import RetortError

_HOST = hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:8]


def state_dir(*parts: str) -> Path:
    """Folder below ``.retort/`` (or ``$RETORT_STATE``), made if missing.

    It holds what must survive a failed or repeated step: checkpoints, label caches, downloads, the spool.
    """
    path = Path(os.environ.get("RETORT_STATE", ".retort")).joinpath(*parts)
    path.mkdir(parents=True, exist_ok=True)
    return path


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a value as canonical JSON: the same for the same content, whatever the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to (file or folder), renamed to ``path`` on success, else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # by host, too: pods that share a folder have the same process ids
    partial = path.with_name(f".{path.name}.partial-{_HOST}-{os.getpid()}")
    remove(partial)
    try:
        yield partial
        if partial.is_file():
            with partial.open("rb") as file:  # a rename may reach the disk before the content does
                os.fsync(file.fileno())
        replace(partial, path)
    finally:
        remove(partial)


def replace(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``; a folder that stands there is moved aside first, then removed."""
    if target.is_dir() and not target.is_symlink():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        os.replace(target, old / target.name)
        os.replace(source, target)
        shutil.rmtree(old)
    else:
        os.replace(source, target)


def remove(path: Path) -> None:
    """Remove a file, link or folder; nothing happens when it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON that git and people can diff: sorted as given, two spaces, a newline at the end."""
    write_text(path, as_written(value))


def as_written(value: Any) -> str:
    """JSON as ``write_json`` writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"


def read_json(path: Path) -> Any:
    """Raises RetortError naming the file when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RetortError(f"{path}: no such file; run the step that writes it first") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RetortError(f"{path}: not valid JSON ({error})") from None


def read_own_json(path: Path) -> dict[str, Any]:
    """A JSON object that we keep for ourselves; empty when it is missing or damaged: it can be remade."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def need(path: Path, made_by: str) -> Path:
    """``path`` if it exists, else a RetortError that names the step which makes it."""
    if not path.exists():
        raise RetortError(f"{path}: no such file; run 'retort {made_by}' first (or 'dvc repro')")
    return path


def disk_full(error: BaseException) -> bool:
    """Whether an error, or what lies behind it, says that a disk is full.

    SQLite, DuckDB and the writers of tensors raise errors of their own, with the system's words in them.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(link).lower() for words in ("no space left on device", "disk is full")):
            return True
        link = link.__cause__ or link.__context__
    return False


def human_bytes(count: float) -> str:
    """Bytes as a person says them, in powers of 1,000."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def state_bytes() -> int | None:
    """Bytes that the state folder may hold in all (``$RETORT_STATE_BYTES``); None: as many as its disk."""
    given = os.environ.get("RETORT_STATE_BYTES", "")
    return int(given) if given.isdigit() else None


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written to a folder: by its disk, and in a pod by the volume's limit.

    Kubernetes ends a pod whose emptyDir has grown beyond its size; the file system knows nothing of that.
    """
    free = shutil.disk_usage(folder).free
    limit, state = state_bytes(), state_dir().resolve()
    if limit is None or not folder.resolve().is_relative_to(state):
        return free
    used = 0
    for path in state.rglob("*"):
        with suppress(OSError):
            status = path.lstat()
            used += status.st_blocks * 512
    return max(0, min(free, limit - used))


def need_disk(folder: Path, wanted: int, what: str) -> None:
    """Raise RetortError when the disk of ``folder`` has less than ``wanted`` bytes free for ``what``."""
    folder.mkdir(parents=True, exist_ok=True)
    free = free_bytes(folder)
    if free < wanted:
        raise RetortError(
            f"{folder}: {what} needs {human_bytes(wanted)}, the disk has {human_bytes(free)} free; "
            "free some space ('retort clean' removes what can be remade) and run again"
        )


@contextmanager
def project_lock(command: str) -> Iterator[None]:
    """Hold ``.retort/lock``: a second run in the same folder is refused with the holder's name."""
    from filelock import FileLock, Timeout

    path = state_dir() / "lock"
    holder = path.with_name("lock.holder")
    try:
        lock = FileLock(path)
        lock.acquire(timeout=0)
    except Timeout:
        who = holder.read_text(encoding="utf-8").strip() if holder.exists() else "another process"
        raise RetortError(
            f"{path}: {who} is running in this folder; wait for it, or stop it, and run again"
        ) from None
    try:
        holder.write_text(f"'retort {command}' (process {os.getpid()})\n", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()

"""``ray.storage``, the one place that all nodes reach, and each node's own cache of what lies there.

What workers need goes to ``<storage>/blobs/<sha256>``, under the hash of its content: it is sent once, and
what a node has already is not fetched again. ``publish`` replaces the paths of a specification by references,
``localize`` replaces these by paths of the node that it runs on.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from components.common import object_store
from components.common.errors import RetortError
from components.common.object_store import Storage as Storage
from components.common.object_store import split
from components.common.storage import (
    atomic_path,
    human_bytes,
    need_disk,
    sha256_file,
    sha256_json,
    state_dir,
)
from components.dataset import s3
from components.dataset.params import S3

T = TypeVar("T")
BLOBS = "blobs"
CHECKPOINTS = "checkpoints"
STATE = "state"


def remember(uri: str, settings: S3) -> None:
    """Note by which endpoint an s3:// storage is reached, if ``data.s3`` says one."""
    if uri.startswith("s3://") and (settings.endpoint_url or settings.region):
        s3.remember_store(split(uri)[0], settings)


def open_storage(uri: str, settings: S3 | None = None) -> Storage:
    """The place that ``ray.storage`` names, as the driver sees it.

    Args:
        settings: endpoint and region of an s3:// place; None: those that its bucket was read with (as
            ``data.s3`` said), else boto3's own.

    Raises:
        RetortError: when it is neither an s3:// URI nor an absolute path, or the endpoint is no URL.
    """
    if settings is None and uri.startswith("s3://"):
        settings = s3.store(split(uri)[0])
    return object_store.open_storage(
        uri, *((settings.endpoint_url, settings.region) if settings is not None else (None, None))
    )


# --- what goes there, and comes from there ---------------------------------------------------------------


@dataclass(frozen=True)
class Ref:
    """A file or folder in a storage. ``files``: name below it, sha256 and bytes of each, sorted by name."""

    files: tuple[tuple[str, str, int], ...]
    folder: bool

    @property
    def key(self) -> str:
        return sha256_json([self.folder, *self.files])

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return sum(size for _, _, size in self.files)


@dataclass(frozen=True)
class Own:
    """A folder that each node has for itself, below its own state: caches that are made, not sent."""

    name: str


def put(storage: Storage, path: Path) -> Ref:
    """Send a file, or all files of a folder, unless they are there already.

    Raises:
        RetortError: when it cannot be read, or the storage not be reached.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    entries = []
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else path.name
        digest = sha256_file(file)
        if not storage.exists(f"{BLOBS}/{digest}"):
            storage.put(file, f"{BLOBS}/{digest}")
        entries.append((name, digest, file.stat().st_size))
    return Ref(tuple(entries), path.is_dir())


def localize(storage: Storage, ref: Ref) -> Path:
    """Where a file or folder lies on this node; it is fetched if it does not, or is not what it was.

    Processes of one node wait for the first of them, and share what it fetched.

    Raises:
        RetortError: when it cannot be fetched, is another one by now, or there is no room for it.
    """
    place = node_cache("inputs") / ref.key
    with FileLock(f"{place}.lock"):
        damaged = [entry for entry in ref.files if not _is(place / entry[0], entry)]
        if damaged:
            _fetch(storage, ref, place)
    return place if ref.folder else place / ref.files[0][0]


def _fetch(storage: Storage, ref: Ref, place: Path) -> None:
    need_disk(place.parent, ref.size, "a node's copy of the inputs (RETORT_NODE_CACHE)")
    with atomic_path(place) as partial:
        partial.mkdir()
        for entry in ref.files:
            name, digest, size = entry
            target = partial / name
            storage.get(f"{BLOBS}/{digest}", target)
            if not _is(target, entry):
                raise RetortError(
                    f"ray.storage: {storage.uri}/{BLOBS}/{digest}: not what was put there ({name}, "
                    f"{human_bytes(size)}); remove it, and run the same command: it is put there again"
                )


def _is(path: Path, entry: tuple[str, str, int]) -> bool:
    """Whether the file has the size and content of an entry."""
    try:
        return path.stat().st_size == entry[2] and sha256_file(path) == entry[1]
    except FileNotFoundError:
        return False


def node_cache(*parts: str) -> Path:
    """This node's own folder, made if missing: ``$RETORT_NODE_CACHE``, else one below the temporary folder.

    It may be removed at any time at which nothing trains; what is in it is fetched again.

    Raises:
        RetortError: when it belongs to somebody else.
    """
    given = os.environ.get("RETORT_NODE_CACHE")
    root = Path(given) if given else Path(tempfile.gettempdir()) / f"retort-{os.getuid()}"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not given and root.stat().st_uid != os.getuid():  # another one's files would be trained on
        raise RetortError(f"{root}: belongs to somebody else; set RETORT_NODE_CACHE to a folder of your own")
    path = root.joinpath(*parts)
    path.mkdir(parents=True, exist_ok=True)
    return path


@dataclass(frozen=True)
class StateExchange:
    """Files below the state folder, such as soft labels, for nodes that share no disk; ``context.Exchange``.

    Their names say what decided them, so that a file which is there is the right one.
    """

    storage: Storage

    def _name(self, path: Path) -> str:
        return f"{STATE}/{path.resolve().relative_to(state_dir().resolve()).as_posix()}"

    def publish(self, path: Path) -> None:
        """Let the others have a file, by its place below the state folder."""
        self.storage.put(path, self._name(path))

    def fetch(self, path: Path) -> bool:
        """Bring a file that a node has published; whether there is one."""
        name = self._name(path)
        if not self.storage.exists(name):
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        self.storage.get(name, path)
        return True


def publish(storage: Storage, value: Any) -> Any:
    """The same value with each path in it replaced: by a Ref, or by Own for folders below ``.retort``.

    Looks into dataclasses, tuples, lists and dicts. What a path names is sent to the storage.
    """
    return _mapped(value, Path, lambda path: _published(storage, path))


def _published(storage: Storage, path: Path) -> Ref | Own:
    state = state_dir().resolve()
    whole = path.resolve()
    if state in whole.parents and not whole.is_file():
        return Own(whole.relative_to(state).as_posix())
    if not whole.exists():
        raise RetortError(f"{path}: no such file; run the step that writes it first")
    return put(storage, whole)


def localized(storage: Storage, value: Any) -> Any:
    """What ``publish`` made, with paths of this node."""
    here = _mapped(value, Ref, lambda ref: localize(storage, ref))
    return _mapped(here, Own, lambda own: state_dir(own.name).resolve())


def _mapped(value: Any, kind: type[T], change: Callable[[T], Any]) -> Any:
    """``value`` with everything of a kind in it changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, (Ref, Own)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        changed = {name: _mapped(inner, kind, change) for name, inner in fields.items()}
        if all(changed[name] is inner for name, inner in fields.items()):
            return value
        return dataclasses.replace(value, **changed)
    if type(value) in (tuple, list):
        parts = [_mapped(inner, kind, change) for inner in value]
        return value if all(a is b for a, b in zip(parts, value, strict=True)) else type(value)(parts)
    if type(value) is dict:
        return {name: _mapped(inner, kind, change) for name, inner in value.items()}
    return value

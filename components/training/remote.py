"""``ray.storage``, the one place that all nodes reach, and each node's own cache of what lies there.

What workers need goes to ``<storage>/blobs/<sha256>``, under the hash of its content: it is sent once, and
what a node has already is not fetched again. ``publish`` replaces the paths of a specification by references,
``localize`` replaces these by paths of the node that it runs on.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

from filelock import FileLock

from components.common.errors import RetortError
from components.common.storage import (
    atomic_path,
    disk_full,
    human_bytes,
    need_disk,
    remove,
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
SHARED = "data.s3.endpoint_url (or AWS_ENDPOINT_URL)"


class Storage(Protocol):
    """Files by name (``a/b/c``) in a place that every node reaches. Frozen plain data, without keys.

    Every method raises RetortError, in one line, when the place cannot be reached or refuses.
    """

    @property
    def uri(self) -> str: ...

    def put(self, path: Path, name: str) -> None:
        """Keep a file under a name; it appears whole or not at all."""

    def get(self, name: str, target: Path) -> None:
        """Fetch a file to ``target``, whole or not at all. Raises RetortError when there is none."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """A part of a file. Raises RetortError when there is none."""

    def exists(self, name: str) -> bool: ...

    def list(self, prefix: str) -> Iterator[str]:
        """The names that begin with the folder ``prefix``, sorted."""

    def remove(self, prefix: str) -> None:
        """Remove all that lies below the folder ``prefix``; nothing happens when it is not there."""

    def filesystem(self) -> tuple[str, Any]:
        """For Ray Train: the path of the place, and its pyarrow filesystem (None: the local one)."""


@dataclass(frozen=True)
class FolderStorage:
    """A folder of a shared file system, mounted at the same path on every node."""

    uri: str

    def _path(self, name: str) -> Path:
        return Path(self.uri) / name

    def put(self, path: Path, name: str) -> None:
        target = self._path(name)
        with _said(self.uri), atomic_path(target) as partial:
            shutil.copyfile(path, partial)

    def get(self, name: str, target: Path) -> None:
        with _said(self.uri), atomic_path(target) as partial:
            try:
                shutil.copyfile(self._path(name), partial)
            except FileNotFoundError:
                raise _missing(self.uri, name) from None

    def read(self, name: str, offset: int, size: int) -> bytes:
        with _said(self.uri):
            try:
                with self._path(name).open("rb") as file:
                    file.seek(offset)
                    return file.read(size)
            except FileNotFoundError:
                raise _missing(self.uri, name) from None

    def exists(self, name: str) -> bool:
        with _said(self.uri):
            return self._path(name).is_file()

    def list(self, prefix: str) -> Iterator[str]:
        folder = self._path(prefix)
        with _said(self.uri):
            found = [path.relative_to(self.uri).as_posix() for path in folder.rglob("*") if path.is_file()]
        yield from sorted(name for name in found if not PurePosixPath(name).name.startswith("."))

    def remove(self, prefix: str) -> None:
        with _said(self.uri):
            remove(self._path(prefix))

    def filesystem(self) -> tuple[str, Any]:
        return self.uri, None


@dataclass(frozen=True)
class S3Storage:
    """Objects below a prefix of a bucket. Keys come from boto3's standard chain, on each node its own.

    ``endpoint_url`` and ``region`` are those that the driver resolved: nodes need no settings of theirs.
    """

    uri: str
    endpoint_url: str | None = None
    region: str | None = None

    def _key(self, name: str) -> tuple[str, str]:
        bucket, prefix = s3.split(self.uri)
        return bucket, f"{prefix.strip('/')}/{name}".strip("/")

    @property
    def _client(self) -> Any:
        return s3.client(self.endpoint_url, self.region)

    def put(self, path: Path, name: str) -> None:
        self._ask(name, lambda: self._client.upload_file(os.fspath(path), *self._key(name)))

    def get(self, name: str, target: Path) -> None:
        with atomic_path(target) as partial:
            self._ask(name, lambda: self._client.download_file(*self._key(name), os.fspath(partial)))

    def read(self, name: str, offset: int, size: int) -> bytes:
        bucket, key = self._key(name)
        part = f"bytes={offset}-{offset + size - 1}"

        def body() -> bytes:
            from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

            for attempt in range(s3.DROPS):
                try:
                    return self._client.get_object(Bucket=bucket, Key=key, Range=part)["Body"].read()
                # in the middle of a body, where boto3 does not try again
                except (ResponseStreamingError, IncompleteReadError, ReadTimeoutError) as error:
                    if attempt == s3.DROPS - 1:
                        raise RetortError(
                            f"ray.storage: {self.uri}/{name}: the connection dropped {s3.DROPS} times "
                            f"({error}); run again: it goes on from there"
                        ) from None
            raise AssertionError("not reached")

        return self._ask(name, body)

    def exists(self, name: str) -> bool:
        bucket, key = self._key(name)

        def look() -> bool:
            found = self._client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
            return any(entry["Key"] == key for entry in found.get("Contents", []))

        return self._ask(name, look)

    def list(self, prefix: str) -> Iterator[str]:
        bucket, key = self._key(prefix)
        start = len(self._key("")[1]) + 1 if self._key("")[1] else 0

        def pages() -> list[str]:
            found: list[str] = []
            paginator = self._client.get_paginator("list_objects_v2")
            for page in paginator.paginate(Bucket=bucket, Prefix=f"{key}/" if key else ""):
                found += [entry["Key"] for entry in page.get("Contents", [])]
            return found

        yield from (name[start:] for name in self._ask(prefix, pages) if not name.endswith("/"))

    def remove(self, prefix: str) -> None:
        bucket, key = self._key(prefix)

        def delete() -> None:
            paginator = self._client.get_paginator("list_objects_v2")
            for page in paginator.paginate(Bucket=bucket, Prefix=f"{key}/"):
                keys = [{"Key": entry["Key"]} for entry in page.get("Contents", [])]
                if keys:
                    self._client.delete_objects(Bucket=bucket, Delete={"Objects": keys, "Quiet": True})

        self._ask(prefix, delete)

    def filesystem(self) -> tuple[str, Any]:
        from pyarrow import fs

        options: dict[str, Any] = {} if self.region is None else {"region": self.region}
        if self.endpoint_url is not None:
            scheme, _, place = self.endpoint_url.rpartition("://")
            options |= {"endpoint_override": place.rstrip("/"), "scheme": scheme or "https"}
        bucket, prefix = s3.split(self.uri)
        return f"{bucket}/{prefix}".strip("/"), fs.S3FileSystem(**options)

    def _ask(self, name: str, question: Callable[[], T]) -> T:
        """Ask the store; boto3 has tried several times by then. Its refusals become one line."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        bucket = s3.split(self.uri)[0]
        try:
            return question()
        except NoCredentialsError:
            raise RetortError(
                f"ray.storage: {self.uri}: no keys found on {os.uname().nodename}; every node needs "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role"
            ) from None
        except (ClientError, Boto3Error, BotoCoreError, OSError) as error:
            if isinstance(error, OSError) and disk_full(error):
                raise
            said = str(error)
            code = error.response.get("Error", {}).get("Code", "") if isinstance(error, ClientError) else ""
            if code in ("NoSuchKey", "404") or "(404)" in said:
                raise _missing(self.uri, name) from None
            if code == "NoSuchBucket" or "(NoSuchBucket)" in said:
                raise RetortError(
                    f"ray.storage: {self.uri}: no such bucket as '{bucket}'; make it, or correct the URI"
                ) from None
            refused = ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "Forbidden")
            for reason in refused:
                if code == reason or f"({reason})" in said:
                    raise RetortError(
                        f"ray.storage: {self.uri}: the store refuses {os.uname().nodename} ({reason}); "
                        "check the keys there, and their rights to read, write, list and delete"
                    ) from None
            where = self.endpoint_url or "AWS"
            raise RetortError(
                f"ray.storage: {self.uri}: the store at {where} cannot be reached from "
                f"{os.uname().nodename} ({said}); check {SHARED}, and run again: it goes on from there"
            ) from None


class _said:  # noqa: N801
    """What the file system refuses, as one line that names the place."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise RetortError(
                f"ray.storage: {self._uri}: {error.strerror or error} on {os.uname().nodename}"
                f"{'' if error.filename is None else f' ({error.filename})'}; it must be a folder that every "
                "node can write to, with room for checkpoints"
            ) from error


def _missing(uri: str, name: str) -> RetortError:
    return RetortError(
        f"ray.storage: {uri}: {name} is not there; run the same command again: it is put there"
    )


def remember(uri: str, settings: S3) -> None:
    """Note by which endpoint an s3:// storage is reached, if ``data.s3`` says one."""
    if uri.startswith("s3://") and (settings.endpoint_url or settings.region):
        s3.remember_store(s3.split(uri)[0], settings)


def open_storage(uri: str, settings: S3 | None = None) -> Storage:
    """The place that ``ray.storage`` names, as the driver sees it.

    Args:
        settings: endpoint and region of an s3:// place; None: those that its bucket was read with (as
            ``data.s3`` said), else boto3's own.

    Raises:
        RetortError: when it is neither an s3:// URI nor an absolute path, or the endpoint is no URL.
    """
    if uri.startswith("s3://"):
        bucket = s3.split(uri)[0]
        known = settings or s3.store(bucket)
        found = s3.client(known.endpoint_url, known.region).meta
        # AWS's own hosts differ by region and bucket: its libraries find them better by themselves
        endpoint = None if found.endpoint_url.endswith(".amazonaws.com") else found.endpoint_url
        return S3Storage(uri.rstrip("/"), endpoint, found.region_name)
    if "://" in uri or not Path(uri).is_absolute():
        raise RetortError(
            f"ray.storage: '{uri}': expected s3://bucket/prefix, or the absolute path of a folder that every "
            "node mounts there"
        )
    return FolderStorage(uri.rstrip("/") or "/")


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

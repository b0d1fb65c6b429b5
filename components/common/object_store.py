"""Files by name in a place that many machines reach: a folder that all mount, or a prefix of a bucket.

Keys of a store come from boto3's standard chain alone (environment, shared files, instance role).
"""

from __future__ import annotations

import mimetypes
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, unquote

from components.common.errors import RetortError
from components.common.storage import atomic_path, disk_full, remove

T = TypeVar("T")
CONNECTIONS = 16
ATTEMPTS = 6  # of a request, with growing pauses between; boto3 counts them
CONNECT_SECONDS, SILENT_SECONDS = 10, 60  # that a request waits
HASTY_ATTEMPTS = 3
DROPS = 4  # of a connection in the middle of one object's content
FULL = ("507", "QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded")
SHARED = "data.s3.endpoint_url (or AWS_ENDPOINT_URL)"
_clients: dict[tuple[str | None, str | None, bool], Any] = {}
_making = threading.Lock()


def _after_fork() -> None:
    _clients.clear()  # connections that the process has too from which this one was forked: both would talk
    _making.release()


os.register_at_fork(before=_making.acquire, after_in_parent=_making.release, after_in_child=_after_fork)


def split(uri: str) -> tuple[str, str]:
    """Bucket and decoded key of an s3:// URI.

    Raises:
        RetortError: when it is another scheme or has no bucket.
    """
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise RetortError(f"{uri}: only s3://bucket/key can be read")
    return bucket, unquote(key)


def join(bucket: str, key: str) -> str:
    """The URI of a key; what is no plain character of a path is percent-encoded."""
    return f"s3://{bucket}/{quote(key, safe='/ !$&()*+,;=:@-._~')}"


def client(endpoint_url: str | None, region: str | None, patient: bool = True) -> Any:
    """boto3's client of a store, one a process; each request is tried several times.

    Args:
        patient: False: it gives up within some seconds, where the work goes on without the store.

    Raises:
        RetortError: when the endpoint is no URL.
    """
    key = (endpoint_url, region, patient)
    with _making:  # boto3's default session is not safe to share while clients are made
        if key not in _clients:
            import boto3
            from botocore.config import Config

            config = Config(
                max_pool_connections=CONNECTIONS,
                retries={"max_attempts": ATTEMPTS if patient else HASTY_ATTEMPTS, "mode": "standard"},
                connect_timeout=CONNECT_SECONDS if patient else 3,
                read_timeout=SILENT_SECONDS if patient else 15,
            )
            session = boto3.session.Session()
            try:
                _clients[key] = session.client("s3", endpoint_url=key[0], region_name=key[1], config=config)
            except ValueError as error:
                raise RetortError(
                    f"data.s3: {error}; endpoint_url is a URL such as http://store.example:9000"
                ) from None
        return _clients[key]


class MissingError(RetortError):
    """There is no such file in a storage."""


class Storage(Protocol):
    """Files by name (``a/b/c``) in a place that every node reaches. Frozen plain data, without keys.

    Every method raises RetortError, in one line, when the place cannot be reached or refuses.
    """

    @property
    def uri(self) -> str: ...

    def put(self, path: Path, name: str) -> None:
        """Keep a file under a name; it appears whole or not at all."""

    def get(self, name: str, target: Path) -> None:
        """Fetch a file to ``target``, whole or not at all. Raises MissingError when there is none."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """A part of a file. Raises MissingError when there is none."""

    def exists(self, name: str) -> bool: ...

    def list(self, prefix: str) -> Iterator[str]:
        """The names that begin with the folder ``prefix``, sorted."""

    def remove(self, prefix: str) -> None:
        """Remove all that lies below the folder ``prefix``; nothing happens when it is not there."""

    def discard(self, name: str) -> None:
        """Remove one file; nothing happens when it is not there."""

    def create(self, path: Path, name: str) -> bool:
        """Keep a file under a name that is free; False: it is not."""

    def age(self, name: str) -> float | None:
        """Seconds since a file was put there, by the clock of the place; None: there is none."""

    def filesystem(self) -> tuple[str, Any]:
        """For Ray Train: the path of the place, and its pyarrow filesystem (None: the local one)."""


@dataclass(frozen=True)
class FolderStorage:
    """A folder of a shared file system, mounted at the same path on every node."""

    uri: str
    parameter: str = "ray.storage"  # which one names it: what messages begin with

    def _path(self, name: str) -> Path:
        return Path(self.uri) / name

    def put(self, path: Path, name: str) -> None:
        target = self._path(name)
        with _said(self), atomic_path(target) as partial:
            shutil.copyfile(path, partial)

    def get(self, name: str, target: Path) -> None:
        with _said(self), atomic_path(target) as partial:
            try:
                shutil.copyfile(self._path(name), partial)
            except FileNotFoundError:
                raise _missing(self, name) from None

    def read(self, name: str, offset: int, size: int) -> bytes:
        with _said(self):
            try:
                with self._path(name).open("rb") as file:
                    file.seek(offset)
                    return file.read(size)
            except FileNotFoundError:
                raise _missing(self, name) from None

    def exists(self, name: str) -> bool:
        with _said(self):
            return self._path(name).is_file()

    def list(self, prefix: str) -> Iterator[str]:
        folder = self._path(prefix)
        with _said(self):
            found = [path.relative_to(self.uri).as_posix() for path in folder.rglob("*") if path.is_file()]
        yield from sorted(name for name in found if not PurePosixPath(name).name.startswith("."))

    def remove(self, prefix: str) -> None:
        with _said(self):
            remove(self._path(prefix))

    def discard(self, name: str) -> None:
        with _said(self):
            self._path(name).unlink(missing_ok=True)

    def create(self, path: Path, name: str) -> bool:
        target = self._path(name)
        with _said(self):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with target.open("xb") as file:
                    file.write(path.read_bytes())
            except FileExistsError:
                return False
        return True

    def age(self, name: str) -> float | None:
        with _said(self):
            try:
                then = self._path(name).stat().st_mtime
            except FileNotFoundError:
                return None
            with tempfile.NamedTemporaryFile(prefix=".clock-", dir=self.uri) as clock:
                return os.fstat(clock.fileno()).st_mtime - then

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
    parameter: str = "ray.storage"
    patient: bool = True  # whether its client tries for minutes

    def _key(self, name: str) -> tuple[str, str]:
        bucket, prefix = split(self.uri)
        return bucket, f"{prefix.strip('/')}/{name}".strip("/")

    @property
    def _client(self) -> Any:
        return client(self.endpoint_url, self.region, self.patient)

    def put(self, path: Path, name: str) -> None:
        # a browser shows a page that is called one
        about = {"ContentType": mimetypes.guess_type(name)[0] or "application/octet-stream"}
        self._ask(name, lambda: self._client.upload_file(os.fspath(path), *self._key(name), ExtraArgs=about))

    def get(self, name: str, target: Path) -> None:
        with atomic_path(target) as partial:
            self._ask(name, lambda: self._client.download_file(*self._key(name), os.fspath(partial)))

    def read(self, name: str, offset: int, size: int) -> bytes:
        bucket, key = self._key(name)
        part = f"bytes={offset}-{offset + size - 1}"

        def body() -> bytes:
            from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

            for attempt in range(DROPS):
                try:
                    return self._client.get_object(Bucket=bucket, Key=key, Range=part)["Body"].read()
                # in the middle of a body, where boto3 does not try again
                except (ResponseStreamingError, IncompleteReadError, ReadTimeoutError) as error:
                    if attempt == DROPS - 1:
                        raise RetortError(
                            f"{self.parameter}: {self.uri}/{name}: the connection dropped {DROPS} times "
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

    def discard(self, name: str) -> None:
        bucket, key = self._key(name)
        self._ask(name, lambda: self._client.delete_object(Bucket=bucket, Key=key))

    def create(self, path: Path, name: str) -> bool:
        from botocore.exceptions import ClientError

        bucket, key = self._key(name)
        content = path.read_bytes()

        def put() -> bool:
            try:
                self._client.put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
            except ClientError as error:
                if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (409, 412):
                    return False
                raise
            return True

        return self._ask(name, put)

    def age(self, name: str) -> float | None:
        bucket, key = self._key(name)

        def look() -> float:
            found = self._client.head_object(Bucket=bucket, Key=key)
            now = parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"])
            return float((now - found["LastModified"]).total_seconds())

        try:
            return self._ask(name, look)
        except MissingError:
            return None

    def filesystem(self) -> tuple[str, Any]:
        from pyarrow import fs

        options: dict[str, Any] = {
            # as boto3's client here has them: by default three seconds of silence end a request
            "connect_timeout": CONNECT_SECONDS,
            "request_timeout": SILENT_SECONDS,
            "retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        }
        if self.region is not None:
            options["region"] = self.region
        if self.endpoint_url is not None:
            scheme, _, place = self.endpoint_url.rpartition("://")
            options |= {"endpoint_override": place.rstrip("/"), "scheme": scheme or "https"}
        bucket, prefix = split(self.uri)
        return f"{bucket}/{prefix}".strip("/"), fs.S3FileSystem(**options)

    def _ask(self, name: str, question: Callable[[], T]) -> T:
        """Ask the store; boto3 has tried several times by then. Its refusals become one line."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        bucket = split(self.uri)[0]
        try:
            return question()
        except NoCredentialsError:
            raise RetortError(
                f"{self.parameter}: {self.uri}: no keys found on {os.uname().nodename}; every node needs "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role"
            ) from None
        except (ClientError, Boto3Error, BotoCoreError, OSError) as error:
            if isinstance(error, OSError) and disk_full(error):
                raise
            said = str(error)
            code = error.response.get("Error", {}).get("Code", "") if isinstance(error, ClientError) else ""
            if code in ("NoSuchKey", "404") or "(404)" in said:
                raise _missing(self, name) from None
            if code == "NoSuchBucket" or "(NoSuchBucket)" in said:
                raise RetortError(
                    f"{self.parameter}: {self.uri}: no such bucket as '{bucket}'; make it, or correct the URI"
                ) from None
            if code in FULL or any(f"({reason})" in said for reason in FULL):
                raise RetortError(
                    f"{self.parameter}: {self.uri}: the store has no room left ({code or said}); free some "
                    "there, or raise the quota"
                ) from None
            refused = ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "Forbidden")
            for reason in refused:
                if code == reason or f"({reason})" in said:
                    raise RetortError(
                        f"{self.parameter}: {self.uri}: the store refuses {os.uname().nodename} ({reason}); "
                        "check the keys there, and their rights to read, write, list and delete"
                    ) from None
            where = self.endpoint_url or "AWS"
            raise RetortError(
                f"{self.parameter}: {self.uri}: the store at {where} cannot be reached from "
                f"{os.uname().nodename} ({said}); check {SHARED}, and run again: it goes on from there"
            ) from None


class _said:  # noqa: N801
    """What the file system refuses, as one line that names the place."""

    def __init__(self, storage: FolderStorage) -> None:
        self._storage = storage

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise RetortError(
                f"{self._storage.parameter}: {self._storage.uri}: {error.strerror or error} on "
                f"{os.uname().nodename}"
                f"{'' if error.filename is None else f' ({error.filename})'}; it must be a folder that every "
                "node can write to, with room for checkpoints"
            ) from error


def _missing(storage: FolderStorage | S3Storage, name: str) -> MissingError:
    return MissingError(
        f"{storage.parameter}: {storage.uri}: {name} is not there; run the same command again: it is put "
        "there"
    )


def open_storage(
    uri: str,
    endpoint_url: str | None = None,
    region: str | None = None,
    parameter: str = "ray.storage",
    patient: bool = True,
) -> Storage:
    """The place that a parameter names, as this machine sees it.

    Args:
        endpoint_url, region: of an s3:// place; None: what boto3's standard chain says.
        parameter: what messages call it.
        patient: whether to try for minutes when it does not answer.

    Raises:
        RetortError: when it is neither an s3:// URI nor an absolute path, or the endpoint is no URL.
    """
    if uri.startswith("s3://"):
        split(uri)
        found = client(endpoint_url, region).meta
        # AWS's own hosts differ by region and bucket: its libraries find them better by themselves
        endpoint = None if found.endpoint_url.endswith(".amazonaws.com") else found.endpoint_url
        return S3Storage(uri.rstrip("/"), endpoint, found.region_name, parameter, patient)
    if "://" in uri or not Path(uri).is_absolute():
        raise RetortError(
            f"{parameter}: '{uri}': expected s3://bucket/prefix, or the absolute path of a folder that every "
            "node mounts there"
        )
    return FolderStorage(uri.rstrip("/") or "/", parameter)

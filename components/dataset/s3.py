"""Images in an S3-compatible store: listed page by page, fetched in parallel, kept by ETag.

Keys come from boto3's standard chain alone (environment, shared files, instance role).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from components.common.errors import ImageError, RetortError
from components.common.object_store import DROPS, client, join, split
from components.common.storage import atomic_path, state_bytes, state_dir, write_json
from components.dataset.params import S3

log = logging.getLogger(__name__)

T = TypeVar("T")
IMAGES_SHARE = 0.5  # of a pod's disk
SLACK = 0.05  # of a limit
LISTED, LISTED_EACH = 10_000, 20  # objects that are looked through at most: some, and some for each wanted


@dataclass(frozen=True)
class Item:
    """One object of a listing; ``uri`` has its key percent-encoded where a URI needs it."""

    uri: str
    key: str
    size: int
    etag: str


def _stores_file() -> Path:
    return state_dir("cache", "s3") / "stores.json"


def stores() -> dict[str, dict[str, Any]]:
    """The settings that were noted, by bucket."""
    path = _stores_file()
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def remember_store(bucket: str, settings: S3) -> None:
    """Note which store holds a bucket, so that every later step and process finds its images there."""
    remember_stores({bucket: settings.model_dump()})


def remember_stores(more: dict[str, dict[str, Any]]) -> None:
    """Note several, as ``stores`` gave them elsewhere."""
    known = stores()
    if {**known, **more} != known:
        write_json(_stores_file(), {**known, **more})


def store(bucket: str) -> S3:
    """The settings of the store that holds a bucket, if they were noted; else those of the standard chain."""
    return S3.model_validate(stores().get(bucket, {}))


def _client(bucket: str) -> Any:
    known = store(bucket)
    return client(known.endpoint_url, known.region)


def listing(uri: str, after: str = "") -> Iterator[Item]:
    """All objects below ``s3://bucket/prefix`` in the order of their keys, a page of 1,000 at a time.

    Args:
        after: the key behind which to begin.

    Raises:
        RetortError: naming the bucket, when it is missing, forbidden or cannot be reached.
    """
    bucket, prefix = split(uri)
    if prefix and not prefix.endswith("/"):
        prefix += "/"

    def pages() -> Iterator[Any]:
        where = {"Bucket": bucket, "Prefix": prefix, **({"StartAfter": after} if after else {})}
        return iter(_client(bucket).get_paginator("list_objects_v2").paginate(**where))

    iterator = _asked(bucket, pages)
    while True:
        page = _asked(bucket, lambda: next(iterator, None))
        if page is None:
            return
        for found in page.get("Contents", []):
            if not found["Key"].endswith("/"):
                yield Item(join(bucket, found["Key"]), found["Key"], found["Size"], found["ETag"].strip('"'))


def etags(uris: Sequence[str]) -> dict[str, str]:
    """The ETag of each object that a listing of what they have in common shows; none where it is forbidden.

    A request tells a thousand of them. Where a thousand tell next to none of those that were asked for, the
    rest is left out.
    """
    by_bucket: dict[str, dict[str, str]] = {}
    for uri in uris:
        bucket, key = split(uri)
        by_bucket.setdefault(bucket, {})[key] = uri
    found: dict[str, str] = {}
    for bucket, wanted in by_bucket.items():
        common = os.path.commonprefix(list(wanted)).rpartition("/")[0]  # noqa: RUF071 - of letters
        first, last = min(wanted), max(wanted)
        most = LISTED + LISTED_EACH * len(wanted)
        try:
            # a portion of a sorted manifest stands together in the listing, too
            for item in islice(listing(join(bucket, common), first[:-1]), most):
                if item.key > last:
                    break
                if item.key in wanted:
                    found[wanted[item.key]] = item.etag
        except RetortError as error:
            log.info(f"{error}; what is known of its images is found when they are fetched")
    return found


def read(uri: str) -> bytes:
    """The object's content: out of the cache when it is there, else fetched into it.

    Raises:
        ImageError: when there is no such object.
        RetortError: when the store cannot be reached or refuses.
    """
    place = cached(uri)
    try:
        content = place.read_bytes()
    except FileNotFoundError:  # not fetched yet, or another process needed its room a moment ago
        return _fetched(uri)
    if _limit(split(uri)[0]) is not None:
        with suppress(OSError):
            os.utime(place)  # used just now; what the file system notes by itself is a day behind
    return content


def cached(uri: str) -> Path:
    """Where the content of an object lies once it was fetched."""
    name = hashlib.sha256(uri.encode()).hexdigest()
    return state_dir("cache", "s3", name[:2]) / name


def fetch(uri: str, etag: str | None = None) -> None:
    """Fetch an object into the cache, unless it is there with this ETag already."""
    place = cached(uri)
    tag = place.with_suffix(".etag")
    if not (etag and place.exists() and tag.exists() and tag.read_text(encoding="utf-8") == etag):
        _fetched(uri)


def _fetched(uri: str) -> bytes:
    """An object's content, which is in the cache from now on."""
    place = cached(uri)
    tag = place.with_suffix(".etag")
    bucket, key = split(uri)

    def whole() -> tuple[bytes, str]:
        answer = _client(bucket).get_object(Bucket=bucket, Key=key)
        return answer["Body"].read(), answer["ETag"].strip('"')

    content, found = _asked(bucket, whole, uri)
    tag.unlink(missing_ok=True)  # a tag never stands beside another content
    with atomic_path(place) as partial:
        partial.write_bytes(content)
    with atomic_path(tag) as partial:
        partial.write_text(found, encoding="utf-8")
    limit = _limit(bucket)
    if limit is not None:
        _make_room(len(content), limit)
    return content


def _limit(bucket: str) -> float | None:
    """Bytes of objects that may be kept on this machine; None: all of them."""
    given = store(bucket).cache_gb
    whole = state_bytes()
    limits = [1e9 * given] if given is not None else []
    limits += [IMAGES_SHARE * whole] if whole is not None else []
    return min(limits, default=None)


_since_look: dict[Path, float] = {}  # bytes that this process fetched into a cache since it looked through it
_looking = threading.Lock()


def _make_room(bytes_more: int, limit: float) -> None:
    """Remove the objects that were not used for longest, once what is kept may be beyond the limit.

    A process looks when it begins, and each time that it has fetched a twentieth of the limit; a tenth is
    freed at once. Several processes together may be beyond it by a twentieth each.
    """
    root = state_dir("cache", "s3")
    with _looking:
        _since_look[root] = _since_look.get(root, limit) + bytes_more
        if _since_look[root] < SLACK * limit:
            return
        _since_look[root] = 0.0
        found = []
        for file in root.glob("??/*"):
            with suppress(FileNotFoundError):
                status = file.stat()
                found.append((status.st_mtime, status.st_size, file))
        kept = sum(size for _, size, _ in found)
        if kept <= (1 - SLACK) * limit:
            return
        for _, size, file in sorted(found):
            file.unlink(missing_ok=True)
            kept -= size
            if kept <= (1 - 2 * SLACK) * limit:
                return


def _asked(bucket: str, question: Callable[[], T], uri: str = "") -> T:
    """Ask the store; its refusals become one line with the way out."""
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        IncompleteReadError,
        NoCredentialsError,
        ReadTimeoutError,
        ResponseStreamingError,
    )

    for attempt in range(1, DROPS + 1):
        try:
            return question()
        except NoCredentialsError:
            raise RetortError(
                f"s3://{bucket}: no keys found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from None
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code in ("NoSuchKey", "404") and uri:
                raise ImageError("image.unreadable", f"{uri}: no such object") from None
            if code == "NoSuchBucket":
                raise RetortError(f"s3://{bucket}: no such bucket; check data.source") from None
            if code in ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "Forbidden"):
                raise RetortError(
                    f"{uri or f's3://{bucket}'}: the store refuses ({code}); check the keys and their rights"
                ) from None
            raise RetortError(f"{uri or f's3://{bucket}'}: {error}") from None
        # in the middle of a body, where boto3 does not try again
        except (ResponseStreamingError, IncompleteReadError, ReadTimeoutError) as error:
            if attempt == DROPS:
                raise RetortError(
                    f"{uri or f's3://{bucket}'}: the connection dropped {DROPS} times ({error}); run again, "
                    "it goes on from what was fetched"
                ) from None
        except (BotoCoreError, OSError) as error:
            where = stores().get(bucket, {}).get("endpoint_url") or os.environ.get("AWS_ENDPOINT_URL", "AWS")
            raise RetortError(
                f"s3://{bucket}: cannot be reached at {where} ({error}); check data.s3.endpoint_url and run "
                "again, it goes on from what was fetched"
            ) from None
    raise AssertionError

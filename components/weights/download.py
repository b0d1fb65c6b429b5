"""Downloads that go on where they stopped, and are what they were the first time."""

from __future__ import annotations

import hashlib
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from components.common import shared
from components.common.errors import RetortError
from components.common.progress import task
from components.common.storage import (
    need_disk,
    read_json,
    remove,
    replace,
    sha256_file,
    state_dir,
    write_json,
)

ATTEMPTS = 6
PAUSE_SECONDS = 0.5  # before the second attempt, then twice as long each time
TIMEOUT_SECONDS = 30
PORTION = 1 << 20
RECORD = "record.json"
LOCAL = ("127.0.0.1", "::1", "localhost")


@dataclass
class Download:
    """Where one download lies: its content, its part so far, and what is known of it."""

    folder: Path
    name: str

    @property
    def content(self) -> Path:
        return self.folder / self.name

    @property
    def part(self) -> Path:
        return self.folder / f"{self.name}.part"

    @property
    def record(self) -> Path:
        return self.folder / RECORD

    def known(self) -> dict[str, Any]:
        return read_json(self.record) if self.record.exists() else {}

    def note(self, **values: Any) -> None:
        write_json(self.record, {**self.known(), **values})


class _Dropped(Exception):  # noqa: N818 - no error as long as there are attempts left
    """The connection ended before the content did."""


def fetch(label: str, url: str, expected: str | None) -> tuple[Path, str, str]:
    """The file at ``url``: out of ``.retort/downloads``, or fetched into it.

    Args:
        label: the address as messages and records have it, without secrets; names the place on disk.
        url: where it is fetched from.
        expected: sha256 that it must have; None: what it had the first time, if it was fetched before.

    Returns:
        Path, sha256, and when it was fetched.

    Raises:
        RetortError: when it cannot be fetched, or is not what it must be.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        host = None
    if not host:
        raise RetortError(f"weights: {label}: no address of a file; expected https://host/path")
    if parts.scheme == "http" and host not in LOCAL and not expected and label.startswith("http"):
        raise RetortError(
            f"weights: {label}: anybody on the way may change what comes over http; use https, or give "
            "weights_sha256"
        )
    place = record_of(label)
    if shared.bring(place.record):
        shared.bring(place.content)
    known = place.known()
    wanted = expected or known.get("sha256")
    if place.content.is_file():
        digest = sha256_file(place.content)
        if digest == wanted:
            return place.content, digest, known.get("fetched", "earlier")
        remove(place.content)  # damaged on the disk, or no longer the one that is asked for
    resume(place, label, url)
    digest = sha256_file(place.part)
    if wanted and digest != wanted:
        remove(place.part)
        source = (
            "weights_sha256 asks for"
            if expected
            else f"{shared.where(place.record)} recorded at the first download"
        )
        raise RetortError(
            f"weights: {label}: what came has sha256 {digest[:12]}..., {source} {wanted[:12]}...; "
            + ("check both" if expected else "remove that file if the change is known to be right")
        )
    replace(place.part, place.content)
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    place.note(source=label, sha256=digest, bytes=place.content.stat().st_size, fetched=when)
    shared.keep(place.content)
    shared.keep(place.record)
    return place.content, digest, when


def kept(label: str) -> Path | None:
    """The file that ``fetch`` keeps of a download, if it is there; nothing is fetched.

    Args:
        label: as for ``fetch``.
    """
    place = record_of(label)
    return place.content if place.content.is_file() else None


def forget(content: Path) -> None:
    """Remove what ``fetch`` gave, and the record that later downloads are held to."""
    for path in (content, content.with_name(RECORD)):
        remove(path)
        shared.drop(path)


def record_of(label: str) -> Download:
    """Where the download that messages call ``label`` lies, and what is known of it."""
    name = PurePosixPath(unquote(urlsplit(label).path)).name or "weights"
    key = hashlib.sha256(label.encode()).hexdigest()[:16]
    return Download(state_dir("downloads", key), name.replace("\0", ""))


def resume(place: Download, label: str, url: str, headers: Mapping[str, str] | None = None) -> None:
    """Fetch into the part file, from where an earlier attempt or run stopped.

    Args:
        headers: for the server at ``url``; where it leads on to another one, that one does not get them.

    Raises:
        RetortError: when it cannot be fetched.
    """
    why = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        before = place.part.stat().st_size if place.part.exists() else 0
        try:
            _go_on(place, label, url, headers or {})
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the part is longer than what is there now
                remove(place.part)
                continue
            if error.code not in (408, 429) and error.code < 500:
                raise RetortError(f"weights: {label}: {_refused(error)}") from None
            why = f"the server says {error.code} {error.reason}"
        except (_Dropped, http.client.HTTPException, OSError) as error:
            why = str(getattr(error, "reason", None) or error) or type(error).__name__
            if place.part.exists() and place.part.stat().st_size > before:
                why += f" after {place.part.stat().st_size:,} bytes"
        else:
            return
    raise RetortError(
        f"weights: {label}: cannot be fetched in {ATTEMPTS} attempts: {why}; run again, it goes on from there"
    )


def _refused(error: urllib.error.HTTPError) -> str:
    if error.code in (401, 403):
        return f"the server refuses ({error.code}); check the keys or the address"
    if error.code == 404:
        return "there is no such file (404); check the address"
    reason = str(error.reason).partition("\n")[0]
    return f"the server says {error.code} {reason}"


def _go_on(place: Download, label: str, url: str, headers: Mapping[str, str]) -> None:
    have = place.part.stat().st_size if place.part.exists() else 0
    tag = place.known().get("part_etag", "")
    request = urllib.request.Request(url, headers={"User-Agent": "retort", "Accept-Encoding": "identity"})  # noqa: S310
    for name, value in headers.items():
        request.add_unredirected_header(name, value)
    if have and tag:  # without a tag nobody can say that the rest belongs to the same file
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", tag)
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310 - checked by fetch
        if url.startswith("https:") and not answer.url.startswith("https:"):
            raise RetortError(
                f"weights: {label}: the server leads on to plain http, where anybody on the way may change it"
            )
        span = answer.headers.get("Content-Range", "")
        resumed = answer.status == 206 and span.startswith(f"bytes {have}-")
        if answer.status == 206 and not resumed:
            remove(place.part)
            raise _Dropped("the server sent another part than it was asked for")
        start = have if resumed else 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length and length.isdigit() else None
        place.note(part_etag=_strong(answer.headers.get("ETag")))
        if total is not None:
            need_disk(place.folder, total - start, f"downloading {label}")
        with place.part.open("ab" if resumed else "wb") as part:
            _copy(answer, part, label, start, total)
    if total is not None and place.part.stat().st_size != total:
        raise _Dropped(f"the connection ended after {place.part.stat().st_size:,} of {total:,} bytes")


def _strong(tag: str | None) -> str:
    """An ETag that vouches for every byte; empty where there is none, or only a weak one."""
    return "" if tag is None or tag.startswith("W/") else tag


def _copy(answer: Any, part: IO[bytes], label: str, start: int, total: int | None) -> None:
    with task(f"downloading {label.rpartition('/')[2]} (MB)", (total or 0) // 1_000_000) as shown:
        done = start
        while portion := answer.read(PORTION):
            part.write(portion)
            done += len(portion)
            shown.update(done // 1_000_000)

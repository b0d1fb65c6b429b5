"""What goes to the cluster and comes from there, by way of ``ray.storage``; signs of life go that way, too.

Below ``kuberay/<job>/``: ``work.json`` (function, parameters, inputs), ``beat`` (changed as long as the
pipeline's pod lives) and ``result.json`` (how the step ended, and its folder). Files lie in ``blobs/``.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.common.errors import ConfigError, FindingsError, RetortError
from components.common.storage import remove, replace, sha256_json, write_json
from components.training import remote

log = logging.getLogger(__name__)

WORK, RESULT, BEAT = "work.json", "result.json", "beat"
SILENT = "silent"  # an end of the step: nobody was there any more who wanted it
BEATS = 12  # within the time that counts as silence
KINDS = {"FindingsError": FindingsError, "ConfigError": ConfigError}
IMAGES = "images.tar"


class SilentError(RetortError):
    """The job ended itself, since it heard nothing of the pipeline's pod."""


def folder(job: str) -> str:
    """Where a job's files lie in the storage."""
    return f"kuberay/{job}"


def packed(ref: remote.Ref) -> dict[str, Any]:
    """A reference as JSON."""
    return {"files": [list(entry) for entry in ref.files], "folder": ref.folder}


def unpacked(value: Mapping[str, Any]) -> remote.Ref:
    """The same, back again."""
    return remote.Ref(tuple((name, digest, size) for name, digest, size in value["files"]), value["folder"])


def put_json(storage: remote.Storage, name: str, value: Any) -> None:
    """Keep a small value in the storage."""
    with tempfile.TemporaryDirectory(prefix="retort-") as place:
        write_json(Path(place) / "value.json", value)
        storage.put(Path(place) / "value.json", name)


def read_json(storage: remote.Storage, name: str) -> Any:
    """A value that ``put_json`` kept; None when there is none."""
    if not storage.exists(name):
        return None
    with tempfile.TemporaryDirectory(prefix="retort-") as place:
        storage.get(name, Path(place) / "value.json")
        return json.loads((Path(place) / "value.json").read_text(encoding="utf-8"))


def put_images(storage: remote.Storage, root: Path) -> remote.Ref:
    """Send a folder of images as one archive: a request for each of them would take minutes."""
    with tempfile.TemporaryDirectory(prefix="retort-") as place:
        archive = Path(place) / IMAGES
        with tarfile.open(archive, "w") as tar:
            for path in sorted(root.rglob("*")):
                if path.is_file():
                    # the same images give the same bytes, so that they are sent once
                    member = tarfile.TarInfo(path.relative_to(root).as_posix())
                    member.size, member.mode = path.stat().st_size, 0o444
                    with path.open("rb") as file:
                        tar.addfile(member, file)
        return remote.put(storage, archive)


def key(work: Mapping[str, Any]) -> str:
    """The hash of what a job does: one that does something else is not gone on with."""
    return sha256_json(work)[:16]


def bring(storage: remote.Storage, result: Mapping[str, Any], out: Path) -> None:
    """Put the step's folder, as the cluster left it, in the place of ``out``."""
    if result["out"] is None:
        return
    ref = unpacked(result["out"])
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".retort-", dir=out.parent) as place:
        whole = Path(place) / "out"
        whole.mkdir()
        for name, digest, _ in ref.files:
            (whole / name).parent.mkdir(parents=True, exist_ok=True)
            storage.get(f"{remote.BLOBS}/{digest}", whole / name)
        remove(out)
        replace(whole, out)


def error_of(result: Mapping[str, Any]) -> RetortError:
    """The failure that ended the step in the cluster, as the step itself would have raised it here."""
    kind = SilentError if result["kind"] == SILENT else KINDS.get(result["kind"], RetortError)
    error = kind(result["message"])
    error.rule = result["rule"]
    error.status = result["status"]
    return error


@contextmanager
def beating(storage: remote.Storage, job: str, silence: float) -> Iterator[None]:
    """Give signs of life as long as the block runs, ``BEATS`` times in ``silence`` seconds.

    Each is another text than the one before: who reads them need not know what time it is here.
    """
    end, token = threading.Event(), secrets.token_hex(8)

    def beat() -> None:
        said = False
        for number in range(1 << 60):
            try:
                put_text(storage, f"{folder(job)}/{BEAT}", f"{token} {number}")
                said = False
            except RetortError as error:
                if not said:
                    log.warning(f"no sign of life could be given: {error}")
                said = True
            if end.wait(silence / BEATS):
                return

    thread = threading.Thread(target=beat, name="beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()


def put_text(storage: remote.Storage, name: str, text: str) -> None:
    """Keep a line in the storage."""
    handle, path = tempfile.mkstemp(prefix="retort-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        storage.put(Path(path), name)
    finally:
        remove(Path(path))


def read_text(storage: remote.Storage, name: str) -> str:
    """A line out of the storage; empty when there is none.

    Raises:
        RetortError: the storage cannot be reached.
    """
    if not storage.exists(name):
        return ""
    handle, path = tempfile.mkstemp(prefix="retort-")
    os.close(handle)
    try:
        storage.get(name, Path(path))
        return Path(path).read_text(encoding="utf-8")
    finally:
        remove(Path(path))

"""Weights from the Hugging Face hub: ``hf:owner/name[/file][@revision]``, and ``timm:model[.tag]``.

Files lie in the hub's own cache (``HF_HOME``), which other programs share. On the way there they lie in
``.retort/downloads``: after a connection broke off, or the process was killed, the next one goes on where it
stopped, which huggingface_hub itself does not (it names the files of half a download anew each time).
``HF_TOKEN`` opens private and gated repositories, ``HF_ENDPOINT`` names a
mirror, ``HF_HUB_OFFLINE=1`` keeps to the cache. A branch such as ``main`` moves: the commit that was taken
the first time is recorded in ``.retort/downloads``, and taken from then on.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from components.common.errors import RetortError
from components.common.progress import at
from components.common.storage import disk_full, remove, sha256_file
from components.weights import download

FORM = "hf:owner/name, hf:owner/name/file or hf:owner/name/file@revision"
FILES = ("model.safetensors", "pytorch_model.bin")  # where a spec names none: the first that is there


@dataclass(frozen=True)
class Place:
    """Files of a repository at a revision (a branch, tag or commit); the first of ``files`` that is there."""

    repository: str
    files: tuple[str, ...]
    revision: str


def of_hub(spec: str) -> Place:
    """The place that ``hf:owner/name[/file][@revision]`` names.

    Raises:
        RetortError: it is of another form.
    """
    path, _, revision = spec.partition(":")[2].partition("@")
    parts = path.split("/", 2)
    if len(parts) < 2 or not all(part and part not in (".", "..") for part in path.split("/")):
        raise RetortError(f"weights: {spec}: names no repository of the hub; expected {FORM}")
    return Place("/".join(parts[:2]), (parts[2],) if len(parts) > 2 else FILES, revision or "main")


def of_timm(spec: str) -> Place:
    """The repository that timm itself takes the weights of ``timm:model[.tag]`` from.

    Raises:
        RetortError: timm knows no such model or tag, or has its weights elsewhere.
    """
    import timm

    name = spec.partition(":")[2]
    model = name.partition(".")[0]
    try:
        config = timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # a tag that this model does not have
        config = None
    if config is None:
        known = timm.list_pretrained(f"{model}.*")
        near = f"it has {', '.join(known[:8])}" if known else "is the name right?"
        raise RetortError(f"weights: {spec}: timm {timm.__version__} has no such weights; {near}")
    if not config.hf_hub_id:
        where = f"; set weights to {config.url}" if config.url else ""
        raise RetortError(f"weights: {spec}: timm has these weights not on the hub{where}")
    files = (config.hf_hub_filename,) if config.hf_hub_filename else FILES
    repository, _, revision = config.hf_hub_id.partition("@")
    return Place(repository, files, revision or "main")


def fetch(spec: str, place: Place, expected: str | None) -> tuple[Path, str, str]:
    """The file at ``place``: out of the hub's cache, or fetched into it.

    Args:
        expected: sha256 that it must have; None: what it had the first time, if it was fetched before.

    Returns:
        Path, sha256, and what was taken in words.

    Raises:
        RetortError: when it cannot be had, or is not what it must be.
    """
    record = download.record_of(spec)
    known = record.known()
    if "commit" in known and expected in (None, known["sha256"]):
        place = replace(place, files=(known["file"],), revision=known["commit"])
    path = _first_there(spec, place)
    digest = sha256_file(path)
    _check_content(spec, path, digest)
    wanted = expected or known.get("sha256")
    if wanted and digest != wanted:
        source = "weights_sha256 asks for" if expected else f"{record.record} recorded"
        raise RetortError(
            f"weights: {spec}: {path.name} has sha256 {digest[:12]}..., {source} {wanted[:12]}...; check both"
        )
    commit, file = _inside(path)
    record.note(source=spec, sha256=digest, bytes=path.stat().st_size, commit=commit, file=file)
    return path, digest, f"{file} of {place.repository} at commit {commit[:12]}, from the Hugging Face hub"


def kept(spec: str, place: Place) -> Path | None:
    """The file that ``fetch`` took, if it is still in the hub's cache; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    known = download.record_of(spec).known()
    if "commit" not in known:
        return None
    found = try_to_load_from_cache(place.repository, known["file"], revision=known["commit"])
    return Path(found) if isinstance(found, str) else None


def _first_there(spec: str, place: Place) -> Path:
    """The first of the place's files that the repository has, fetched if the cache lacks it."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it warns of is said here, in one line
    endpoint = os.environ.get("HF_ENDPOINT")  # huggingface_hub itself reads it once, when it is imported
    absent: Exception | None = None
    for file in place.files:
        at(f"fetching {file} of {place.repository}")
        try:
            there = hf_hub_download(
                place.repository, file, revision=place.revision, endpoint=endpoint, dry_run=True
            )
            if not there.is_cached:
                _fetch_content(spec, place, file, there.commit_hash, Path(there.local_path))
            return Path(hf_hub_download(place.repository, file, revision=place.revision, endpoint=endpoint))
        except RetortError:
            raise
        except LocalEntryNotFoundError as error:
            absent = error
            if not constants.is_offline_mode():
                break
        except EntryNotFoundError as error:
            absent = error
        except Exception as error:
            if disk_full(error):
                raise
            raise RetortError(f"weights: {spec}: {_why(error, place)}") from None
    assert absent is not None
    raise RetortError(f"weights: {spec}: {_why(absent, place)}") from None


def _fetch_content(spec: str, place: Place, file: str, commit: str, path: Path) -> None:
    """Put the content of a file into the hub's cache, under the hash that the hub gives for it.

    Args:
        path: where the cache will have the file: ``.../snapshots/<commit>/<file>``.

    Raises:
        RetortError: it cannot be fetched, or what came is not what the hub names.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    endpoint = os.environ.get("HF_ENDPOINT")
    url = hf_hub_url(place.repository, file, revision=commit, endpoint=endpoint)
    tag = get_hf_file_metadata(url, endpoint=endpoint).etag
    if tag is None:  # huggingface_hub says what is wrong with such a server
        return
    part = replace(download.record_of(spec), name=tag)
    for other in part.folder.glob("*.part"):
        if other != part.part:  # of another commit
            remove(other)
    token = {name: value for name, value in build_hf_headers().items() if name.lower() == "authorization"}
    download.resume(part, f"{spec}: {_address(place)}", url, token)
    if not _is_content_of(part.part, tag):
        remove(part.part)
        raise RetortError(f"weights: {spec}: what came is not the {file} that the hub names; run again")
    snapshots = len(path.parts) - 1 - path.parts[::-1].index("snapshots")
    blob = Path(*path.parts[:snapshots], "blobs", tag)
    blob.parent.mkdir(parents=True, exist_ok=True)
    staged = blob.with_name(f"{tag}.{os.getpid()}.incomplete")  # the cache may be on another disk
    shutil.move(part.part, staged)
    staged.replace(blob)


def _address(place: Place) -> str:
    """Where a repository lies, without a password."""
    from huggingface_hub import constants

    endpoint = re.sub(r"//[^/@]*@", "//", os.environ.get("HF_ENDPOINT") or constants.ENDPOINT)
    return f"{endpoint}/{place.repository}"


def _why(error: Exception, place: Place) -> str:
    """One line: what is wrong, and the way out."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    repository = _address(place)
    endpoint = repository.removesuffix(f"/{place.repository}")
    if isinstance(error, errors.LocalEntryNotFoundError):
        if constants.is_offline_mode():
            return (
                f"not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to fetch it; unset "
                "that once, or name a file"
            )
        cause = error.__cause__
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is None or status not in (401, 403):
            return (
                f"{endpoint} cannot be used ({_first_line(cause or error)}); run again with a network, a "
                "proxy (HTTPS_PROXY) or a mirror (HF_ENDPOINT), or name a file"
            )
    if isinstance(error, errors.GatedRepoError):
        return f"{repository} is gated; accept its terms there, and set HF_TOKEN to a token of that account"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision '{place.revision}' (404); see its 'Files and versions'"
    if isinstance(error, errors.EntryNotFoundError):
        return (
            f"{repository} has no {' and no '.join(place.files)} at revision '{place.revision}' (404); name "
            f"another file: hf:{place.repository}/FILE"
        )
    if status in (401, 403) or isinstance(error, errors.RepositoryNotFoundError):
        token = (
            "the token in HF_TOKEN does not open it" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set"
        )
        return f"{repository}: no such repository, or a private one, and {token} ({status}); check both"
    return f"{repository}: {_first_line(error)}; run again"


def _first_line(error: BaseException) -> str:
    """The first line of an error, short, without the token."""
    token = os.environ.get("HF_TOKEN")
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return (text.replace(token, "...") if token else text)[:160]


def _is_content_of(path: Path, tag: str, digest: str | None = None) -> bool:
    """Whether a file is what the hub gave ``tag`` for: sha256 of large files, git's own hash of small ones.

    Args:
        digest: its sha256, where that is known.
    """
    if re.fullmatch("[0-9a-f]{64}", tag):
        return tag == (digest or sha256_file(path))
    if re.fullmatch("[0-9a-f]{40}", tag):
        content = path.read_bytes()
        return tag == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324 - git's
    return True  # no hash: of a mirror's own kind


def _check_content(spec: str, path: Path, digest: str) -> None:
    """Compare a file with the hash that the hub gave for it, which is its name in the cache.

    Where a disk has no links, only sizes are compared.

    Raises:
        RetortError: it is damaged; it was removed, so that it is fetched again.
    """
    blob = path.resolve()
    if not _is_content_of(blob, blob.name, digest):
        remove(blob)
        remove(path)
        raise RetortError(
            f"weights: {spec}: {path.name} in the cache was damaged (the hub names another hash), and was "
            "removed; run again, it is fetched anew"
        )


def _inside(path: Path) -> tuple[str, str]:
    """Commit and name of a file in the hub's cache: ``.../snapshots/<commit>/<file>``."""
    parts: Any = path.parts
    i = len(parts) - 1 - parts[::-1].index("snapshots")
    return parts[i + 1], "/".join(parts[i + 2 :])

"""A step's link in the chain of proofs: what it read and left, by whose code, and what it was told.

It stands in the step's ``run.json``, beside the links of the steps before it, so that each folder of a step
tells its whole history wherever it is carried.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from components.common import shared
from components.common.storage import (
    as_written,
    read_own_json,
    sha256_file,
    sha256_json,
    state_dir,
    write_json,
)

SCHEMA_VERSION = 1
FILE, LINK, BEFORE = "run.json", "link", "before"
DIGEST = "digest"  # in the file: sha256 of all else that it says
CODE = Path(__file__).parents[1]
LOCK = "requirements.lock"
IMAGE = "RETORT_IMAGE"  # by which a pod knows the image that it was started from
DEPTH = 3  # folders above a file in which its step's run.json is looked for


class Link(BaseModel):
    """What one step did.

    Attributes:
        folder: the step's own, as reports call it; it tells apart two uses of one step.
        read, left: sha256 of each file, by the name that reports call it by.
        parameters: the sections that the step reads, as they were.
        commit, dirty: of the working directory, and whether tracked files differed from it.
        code, code_commit: sha256 of the package's files; the commit that they were checked out or built from.
        lock: sha256 of requirements.lock; empty where there is none beside the code.
        packages: sha256 of the names and versions of what is installed.
        image: of the container, with its digest if it was named by it; empty outside of one.
        started, finished: by this machine's clock, ISO 8601, UTC.
    """

    model_config = ConfigDict(extra="ignore")

    schema_version: int = SCHEMA_VERSION
    step: str
    folder: str
    read: dict[str, str] = {}
    left: dict[str, str] = {}
    parameters: dict[str, Any] = {}
    commit: str = ""
    dirty: bool = False
    code: str = ""
    code_commit: str = ""
    lock: str = ""
    packages: str = ""
    image: str = ""
    started: str = ""
    finished: str = ""


def now() -> str:
    """The time as links say it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def code_hash(folder: Path = CODE) -> str:
    """Hex sha256 of all that our package consists of: names and contents."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".py", ".json"):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def lock_file() -> Path | None:
    """The lock that this program's packages were installed from; None: it does not lie beside the code."""
    path = CODE.parent / LOCK
    return path if path.is_file() else None


@functools.cache
def code_commit() -> str:
    """The commit that our package is of: its image's, or its checkout's; empty for an installed one."""
    if built := os.environ.get("RETORT_COMMIT", ""):
        return built

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(CODE.parent), *words], capture_output=True, text=True, timeout=5
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:  # a package that is installed inside of somebody's repository is no part of that
        tracked = git("ls-files", "--error-unmatch", str(Path(__file__)))
        return git("rev-parse", "HEAD") if tracked else ""
    except (OSError, subprocess.TimeoutExpired):
        return ""


@functools.cache
def packages() -> tuple[str, ...]:
    """What is installed, ``name==version``, sorted; read off the names of folders, in milliseconds."""
    places = {*site.getsitepackages(), sysconfig.get_path("purelib"), *sys.path}
    found = set()
    for place in places:
        for entry in Path(place).glob("*.dist-info") if place else ():
            name, _, version = entry.name.removesuffix(".dist-info").rpartition("-")
            if name:
                found.add(f"{name.lower().replace('_', '-').replace('.', '-')}=={version}")
    return tuple(sorted(found))


def surroundings() -> dict[str, str]:
    """What the code runs in, by the fields of a link."""
    lock = lock_file()
    return {
        "code": code_hash(),
        "code_commit": code_commit(),
        "lock": sha256_file(lock) if lock else "",
        "packages": hashlib.sha256("\n".join(packages()).encode()).hexdigest(),
        "image": os.environ.get(IMAGE, ""),
    }


def links_of(folder: Path) -> dict[str, Link]:
    """The links in a step's folder, by the steps' folders, its own last; none where it left none."""
    content = read_own_json(folder / FILE)
    found = {}
    for one in [*dict(content.get(BEFORE) or {}).values(), content.get(LINK)]:
        try:
            link = Link.model_validate(one)
        except ValidationError:
            continue
        found[link.folder] = link
    return found


def before(inputs: Mapping[Path, str], read: Mapping[str, str], out: Path) -> dict[str, Link]:
    """The links of all steps that files come from, directly or not, by the steps' folders.

    Args:
        inputs: the files, and their sha256.
        read: the sha256 by what reports call the files.
        out: the folder of the step that reads them; its neighbours are looked at, too.
    """
    found: dict[str, Link] = {}
    for path in inputs:
        for folder in path.parents[:DEPTH]:
            if (folder / FILE).is_file():
                _add(found, links_of(folder))
                break
    near = [*out.parent.glob(f"*/{FILE}"), *out.parent.parent.glob(f"*/{FILE}")]
    for name, digest in read.items():
        if _made(found.values(), name, digest):
            continue
        # a file that lies in no step's folder, such as data/clean.parquet
        for path in near:
            links = links_of(path.parent)
            if _made(list(links.values())[-1:], name, digest):
                _add(found, links)
                break
        else:
            _add(found, _kept(digest))
    return found


def _add(found: dict[str, Link], links: Mapping[str, Link]) -> None:
    for folder, link in links.items():
        found.setdefault(folder, link)


def _made(links: Iterable[Link], name: str, digest: str) -> bool:
    return any(link.left.get(name) == digest for link in links)


def keep(link: Link, before: Mapping[str, Link], files: Iterable[str]) -> None:
    """Let later pods know who left ``files`` (sha256), which travel without their step's folder."""
    if shared.place() is None:
        return
    content = content_of(link, before)
    for digest in files:
        path = _place(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path / FILE, content)
        shared.keep(path / FILE)


def _kept(digest: str) -> dict[str, Link]:
    if shared.place() is None:
        return {}
    folder = _place(digest)
    return links_of(folder) if shared.bring(folder / FILE) else {}


def _place(digest: str) -> Path:
    return state_dir() / "links" / digest


def content_of(link: Link, before: Mapping[str, Link], **more: Any) -> dict[str, Any]:
    """What ``run.json`` holds of them, and ``more``."""
    content = {
        **more,
        LINK: link.model_dump(mode="json"),
        BEFORE: {folder: one.model_dump(mode="json") for folder, one in before.items()},
    }
    return {**content, DIGEST: sha256_json(content)}


def damaged(path: Path) -> str:
    """Why a ``run.json`` is not as its step wrote it, to the byte; empty: it is, or has no link at all."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError) as error:
        return f"not valid JSON ({error})"
    if not isinstance(content, dict):
        return "not an object"
    digest = content.pop(DIGEST, None)
    if digest is None and LINK not in content and BEFORE not in content:
        return ""  # an earlier version's
    if digest != sha256_json(content) or text != as_written({**content, DIGEST: digest}):
        return "changed since its step wrote it: its digest is of another content"
    return ""

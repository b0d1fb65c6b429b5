"""A person's own files that params.yaml names, where DVC looks at them: links to them in ``named/STAGE``.

``dvc.yaml`` is fixed, and a key may name another file tomorrow, or none; DVC compares a parameter's text, not
the file behind it. So each stage whose parameters may name files depends on a folder of links, which its
command renews: what changes behind a link is a changed dependency.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from components.common.errors import RetortError
from components.common.storage import write_text

if TYPE_CHECKING:
    from pipelines.params import Params
    from pipelines.steps import Pipeline, Stage

FOLDER = Path("named")
README = "README"  # keeps the folder in git, where folders without a file do not exist
ABOUT = """\
Links to files that params.yaml names, so that DVC sees when they change. 'retort {command}' renews them;
one whose file is gone may be removed. They belong in git.
"""
MOST = 1000  # files of one folder: weights are a few; DVC would hash each
LETTERS = 200  # of a link's name; file systems take 255 bytes


def make(folder: Path, pipeline: Pipeline) -> list[str]:
    """Make the folders in the project ``folder``; returns what was made, as seen from there."""
    made = []
    for stage in pipeline.stages:
        if stage.step.files:
            name = FOLDER / stage.name / README
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(folder / name, ABOUT.format(command=stage.step.command))
            made.append(os.fspath(name))
    return made


def link(stage: Stage, params: Params) -> None:
    """Renew the links of a stage, where this folder keeps some.

    Raises:
        RetortError: when the folder cannot be written.
    """
    folder = FOLDER / stage.name
    if not folder.is_dir():
        return
    wanted = {
        _name(key, path): path
        for key in stage.step.files
        for path in _files(_value(params, key), inside=key != "data.source")
    }
    try:
        for old in folder.iterdir():
            if not old.is_symlink():
                continue
            if old.name not in wanted or os.fspath(old.readlink()) != _target(wanted[old.name]):
                old.unlink()
        for name, path in wanted.items():
            if not (folder / name).is_symlink():
                (folder / name).symlink_to(_target(path))
    except OSError as error:
        raise RetortError(
            f"{folder}: the links by which DVC sees your files cannot be written ({error.strerror}); "
            "make the folder writable, or take it out of dvc.yaml and remove it"
        ) from None


def _value(params: Params, key: str) -> Any:
    section, _, name = key.partition(".")
    return params.model_dump(mode="json", by_alias=True)[section][name]


def _files(value: Any, inside: bool) -> Iterator[Path]:
    """The files on this machine behind a value: a path, or a mapping of paths.

    Args:
        inside: of a folder, those in it. Images are not linked one by one.
    """
    for text in value.values() if isinstance(value, dict) else [value]:
        if not text or "://" in text:
            continue
        path = Path(text).expanduser()
        if path.is_file():
            yield path
        elif inside and path.is_dir():
            found = [each for each in _first(path) if each.is_file()]
            yield from found if len(found) <= MOST else ()


def _first(folder: Path) -> Iterator[Path]:
    """What lies in a folder, and one too many where that is more than is looked at."""
    for number, path in enumerate(folder.rglob("*")):
        if number > MOST:
            return
        yield path


def _target(path: Path) -> str:
    """Where the link leads: within the project as seen from the link, so that it is right in a clone, too."""
    place, project = Path(os.path.normpath(path.absolute())), Path.cwd()
    if place.is_relative_to(project):
        return os.path.relpath(place, project / FOLDER / "stage")
    return os.fspath(place)


def _name(key: str, path: Path) -> str:
    """Tells which key names which file: the same content under another name is another dependency."""
    name = quote(f"{key}={path}", safe="=")
    if len(name) <= LETTERS:
        return name
    return f"{name[:LETTERS]}.{hashlib.sha256(name.encode()).hexdigest()[:16]}"

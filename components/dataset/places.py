"""Whether the images of a list are where ``data.root`` says; where not, which folder would have them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from components.common.errors import ImageError
from components.common.object_store import CONNECTIONS
from components.dataset import s3
from components.dataset.manifest import image_path
from components.dataset.params import Data
from components.dataset.sources.found import Found
from components.step import StepContext

TRIED = 64  # images of a list, spread over it
MANY = 0.5  # share that is missing beyond which data.root, or the list, must be wrong
NEARBY = 500  # folders below and beside data.root that are tried as data.root


def check_lists(run: StepContext, data: Data, found: Found) -> None:
    """Try to open some images of each list, before all are read.

    A finding ``ingest.images`` of level error, when most of them are missing, names ``data.root``, a path in
    full, and the folder below which they do exist, where one is near.
    """
    lists = data.source if isinstance(data.source, dict) else {"": str(data.source)}
    by_split: dict[str | None, list[str]] = {}
    for row in found.rows:
        by_split.setdefault(row.split, []).append(row.path)
    for paths in by_split.values():
        tried = (
            [paths[place * len(paths) // TRIED] for place in range(TRIED)] if len(paths) > TRIED else paths
        )
        missing = list(_missing(data.root, tried))
        if len(missing) <= MANY * len(tried):
            continue
        local = [path for path in missing if "://" not in path]
        first = image_path(data.root, missing[0])
        run.add_finding(
            "ingest.images", "error", "data.root" if local else first,
            f"{len(missing)} of {len(tried)} images that were tried are not there, such as {first}.",
            measured=len(missing), limit=int(MANY * len(tried)),
            advice=_way_out(data.root, [Path(name) for name in lists.values()], local)
            if local else "Check the keys in the list.",
        )  # fmt: skip
        run.stop_on_errors()


def _missing(root: str, paths: Sequence[str]) -> Iterator[str]:
    def there(path: str) -> bool:
        if "://" not in path:
            return _there(root, path)
        try:
            s3.read(path)
        except ImageError:
            return False
        return True

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for path, found in zip(paths, pool.map(there, paths), strict=True):
            if not found:
                yield path


def _there(root: str | Path, path: str) -> bool:
    try:
        return os.path.exists(image_path(root, path))  # noqa: PTH110 - names need not be UTF-8
    except ValueError:  # a null byte in the name
        return False


def _way_out(root: str, lists: Sequence[Path], missing: Sequence[str]) -> str:
    counts = {place: sum(_there(place, path) for path in missing) for place in _candidates(root, lists)}
    best = max(counts, key=lambda place: counts[place], default=None)
    if best is not None and counts[best] > MANY * len(missing):
        return f"They are below {best}: set data.root to {best}."
    if any(_there(root, path.replace("\\", "/")) for path in missing):
        return "The list has '\\' where folders stand apart; write '/'."
    shorter = [path.split("/", 1)[1] for path in missing if "/" in path]
    if sum(_there(root, path) for path in shorter) > MANY * len(missing):
        begin = missing[0].split("/", 1)[0]
        return f"They are below data.root ({root}) without '{begin}/': take that out of the list."
    return f"Set data.root (now {root}) to the folder in which the paths of {lists[0]} begin."


def _candidates(root: str, lists: Sequence[Path]) -> Iterator[Path]:
    """Folders that may be meant: those above data.root and the lists, then those below and beside them."""
    here = Path(os.path.relpath(root)) if not Path(root).is_absolute() else Path(root)
    seen = {here.resolve()}
    starts = (here, *(file.parent for file in lists))
    above = [place for start in starts for place in _upwards(start)]
    below = islice((place for start in (*starts, Path(), here.parent) for place in _downwards(start)), NEARBY)
    for place in (*above, Path(), *below):
        if (real := place.resolve()) not in seen:
            seen.add(real)
            yield place


def _upwards(start: Path) -> Iterator[Path]:
    """The folder and three above it, as a person would write them."""
    for up in (start, *(start.resolve().parents[:3])):
        yield Path(os.path.relpath(up)) if up.resolve().is_relative_to(Path.cwd()) else up


def _downwards(start: Path) -> Iterator[Path]:
    """The folders in this one, and those in them."""

    def inside(folder: Path) -> list[Path]:
        try:
            return sorted(place for place in folder.iterdir() if place.is_dir() and place.name[0] != ".")
        except OSError:
            return []

    first = inside(start)
    yield from first
    for folder in first:
        yield from inside(folder)

"""A folder of images: ``class/image.jpg`` or ``split/class/image.jpg``."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from components.common.errors import RetortError
from components.dataset.images import EXTENSIONS
from components.dataset.params import Data, IngestParams
from components.dataset.sources.found import Found, Reader, Rejected, encode
from components.dataset.sources.layout import Others, kind, lay_out

DEEPEST = 40  # folders below each other; deeper than any data set, short of what links can fake


def read(params: IngestParams) -> Found:
    """The folder ``data.source``, which is ``data.root`` or lies in it."""
    return read_folder(params.data, Path(str(params.data.source)))


def read_folder(data: Data, folder: Path) -> Found:
    """Rows of the images in a folder."""
    root, place = os.path.abspath(data.root), os.path.abspath(folder)  # noqa: PTH100 - links stay links
    if os.path.commonpath([root, place]) != root:
        raise RetortError(
            f"data.source: {folder} is not data.root ({data.root}) nor below it; set data.root to {folder}"
        )
    before = "" if root == place else os.path.relpath(place, root) + "/"
    found = Found()
    below = []
    no_images: Others = Counter()
    for name in walk(os.fsencode(place), found.rejected):
        if os.path.splitext(name)[1].lower() in {extension.encode() for extension in EXTENSIONS}:  # noqa: PTH122
            below.append(name)
        else:
            no_images[kind(encode(name))] += 1
    if not below:
        raise RetortError(
            f"{folder}: no image in this folder ({', '.join(EXTENSIONS)}); put them in as class/image.jpg"
        )
    before_bytes = os.fsencode(before)
    lay_out(data, found, [(encode(before_bytes + name), encode(name)) for name in below], no_images)
    return found


def walk(top: bytes, lost: Rejected) -> Iterator[bytes]:
    """Names of all ordinary files below ``top``, sorted; links are followed, but never in a circle.

    What leads to no file goes into ``lost``, with the reason. Hidden files and folders, and those that
    archivers add, are left out. A folder that may not be read is an error: silence would lose a class.
    """

    def below(folder: bytes, ancestors: tuple[tuple[int, int], ...]) -> Iterator[bytes]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise RetortError(f"{os.fsdecode(folder)!r}: {error.strerror}; it cannot be listed") from None
        for entry in entries:
            if entry.name.startswith(b".") or entry.name == b"__MACOSX":
                continue
            if entry.is_file(follow_symlinks=False):
                yield entry.path[len(top) + 1 :]
                continue
            try:
                status = entry.stat()
            except OSError as error:  # a link into the void, or to itself
                lost.append((encode(entry.path[len(top) + 1 :]), str(error.strerror).lower()))
                continue
            identity = (status.st_dev, status.st_ino)
            if stat.S_ISREG(status.st_mode):
                yield entry.path[len(top) + 1 :]
            elif not stat.S_ISDIR(status.st_mode):
                lost.append((encode(entry.path[len(top) + 1 :]), "not an ordinary file"))
            elif identity in above or identity in ancestors:
                lost.append((encode(entry.path[len(top) + 1 :]), "a link back to a folder above it"))
            elif len(ancestors) == DEEPEST:
                lost.append((encode(entry.path[len(top) + 1 :]), f"more than {DEEPEST} folders deep"))
            else:
                yield from below(entry.path, (*ancestors, identity))

    def of(folder: Path) -> tuple[int, int]:
        status = folder.stat()
        return status.st_dev, status.st_ino

    place = Path(os.fsdecode(top)).resolve()
    above = {of(folder) for folder in place.parents}  # apart from ancestors, whose number is the depth
    return below(top, (of(place),))


READER = Reader(lambda source: isinstance(source, str) and Path(source).is_dir(), read)

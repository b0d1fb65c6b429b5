"""Images that a person names on a command line: files, folders, manifests; read one after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq

from components.common.errors import ImageError, RetortError
from components.dataset import images, manifest
from components.dataset.images import EXTENSIONS
from components.dataset.sources.found import encode

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image


@dataclass
class Named:
    """``files`` in order, then the rows of ``manifests``, with paths below ``root``; ``count`` in all."""

    root: str
    files: list[Path] = field(default_factory=list)
    manifests: list[Path] = field(default_factory=list)
    count: int = 0

    def decoded(self) -> Iterator[tuple[str, Image | str]]:
        """Each image's path, and the whole image in RGB; or the reason why it has none.

        A path is written as a manifest writes it: percent-encoded where it is no UTF-8.
        Memory does not grow with the number of images.
        """
        for path in self.files:
            yield encode(os.fsencode(path)), _decoded(path.read_bytes)
        for place in self.manifests:
            with manifest.whole(place), pq.ParquetFile(place) as rows:
                for batch in rows.iter_batches(batch_size=4096, columns=["path", "bytes", "sha256"]):
                    names = batch["path"].to_pylist()
                    found = images.Images(self.root, names, images.pins(batch))
                    for number, name in enumerate(names):
                        yield name, _decoded(partial(found.content, number))

    def read(self, size: int) -> Iterator[tuple[str, NDArray[np.uint8] | str]]:
        """The same with the central square, uint8 [size, size, 3], in place of the whole image."""
        for name, image in self.decoded():
            yield name, image if isinstance(image, str) else images.central_square(image, size)


def _decoded(read: Callable[[], bytes]) -> Image | str:
    try:
        return images.decode(read())
    except ImageError as error:
        return str(error).splitlines()[0]
    except OSError as error:  # its text would hold the name as the system has it
        return (error.strerror or str(error)).lower()


def find(places: Sequence[Path], root: str) -> Named:
    """What the places hold: files, the images in folders (sorted within each), the rows of manifests.

    Args:
        root: the folder that the paths of manifests are relative to, ``data.root``.

    Raises:
        RetortError: when a place does not exist, is no manifest of ours, or holds no image.
    """
    found = Named(root)
    for place in places:
        if place.is_dir():
            matching = (file for file in place.rglob("*") if file.suffix.lower() in EXTENSIONS)
            inside = sorted(file for file in matching if file.is_file())
            if not inside:
                raise RetortError(f"{place}: no image in there ({', '.join(EXTENSIONS)})")
            found.files += inside
        elif place.suffix == ".parquet":
            found.count += manifest.check(place).num_rows
            found.manifests.append(place)
        elif place.is_file():
            found.files.append(place)
        else:
            raise RetortError(f"{place}: no such file or folder")
    found.files = list(dict.fromkeys(found.files))
    found.count += len(found.files)
    return found

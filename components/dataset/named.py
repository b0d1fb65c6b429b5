"""Images that a person names on a command line: files, folders, manifests; read one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq

from components.common.errors import RetortError
from components.dataset import images, manifest
from components.dataset.images import EXTENSIONS, ImageError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass
class Named:
    """``files`` in order, then the rows of ``manifests``, with paths below ``root``; ``count`` in all."""

    root: str
    files: list[Path] = field(default_factory=list)
    manifests: list[Path] = field(default_factory=list)
    count: int = 0

    def read(self, size: int) -> Iterator[tuple[str, NDArray[np.uint8] | str]]:
        """Each image's path, and its pixels uint8 [size, size, 3]; or the reason why it has none.

        Memory does not grow with the number of images.
        """
        for path in self.files:
            try:
                yield str(path), images.central_square(images.decode(path.read_bytes()), size)
            except (ImageError, OSError) as error:
                yield str(path), str(error).splitlines()[0]
        for place in self.manifests:
            with pq.ParquetFile(place) as rows:
                for batch in rows.iter_batches(batch_size=4096, columns=["path"]):
                    for name in batch.column(0).to_pylist():
                        try:
                            yield name, images.load_rgb(self.root, name, size)
                        except ImageError as error:
                            yield name, str(error).splitlines()[0]


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

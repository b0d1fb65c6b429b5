"""Fashion-MNIST for benchmarks that plant faults: Debian's package ``dataset-fashion-mnist`` (MIT licence).

Without it, nor the folder that ``RETORT_FASHION_MNIST`` names, those benchmarks are left out and say so.
"""

from __future__ import annotations

import gzip
import os
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(os.environ.get("RETORT_FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
TRAIN = 60_000


def there(what: str) -> bool:
    """Whether the images are there; if not, it is said that ``what`` is left out."""
    found = (FOLDER / "train-images-idx3-ubyte.gz").exists()
    if not found:
        how = "install Debian's dataset-fashion-mnist, or set RETORT_FASHION_MNIST"
        print(f"{what}: left out, {FOLDER} is not there; {how}", file=sys.stderr)
    return found


def read() -> tuple[np.ndarray, np.ndarray]:
    """All 70,000 images, uint8 [n, 28, 28], and their labels int64; the ``TRAIN`` training images first."""

    def content(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((FOLDER / name).read_bytes()), np.uint8, offset=header)

    parts = ("train", "t10k")
    pixels = [content(f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28) for part in parts]
    labels = [content(f"{part}-labels-idx1-ubyte.gz", 8) for part in parts]
    return np.concatenate(pixels), np.concatenate(labels).astype(np.int64)

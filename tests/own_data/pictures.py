"""Small pictures of things that are easy to tell apart: crops of two photographs, and handwritten digits.

All of them come with scikit-learn. ``picture("pagoda", 3)`` is the same picture in each run, and no other
number gives it; so data are made of the first numbers, and what is predicted of numbers from ``UNSEEN`` on.
"""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pillow_heif import register_heif_opener
from sklearn.datasets import load_digits, load_sample_image

SIDE = 64
UNSEEN = 40
SHIFT, CUT = 22, 56  # pixels between the corners of two crops, and their side: no two are nearly the same

# subject -> photograph, and the box in it (left, top, right, bottom) that crops are taken from
PLACES = {
    "pagoda": ("china.jpg", (100, 120, 325, 330)),
    "dahlia": ("flower.jpg", (195, 110, 420, 335)),
}
SUBJECTS = ("pagoda", "dahlia", "digit")


@cache
def _photograph(name: str) -> Image.Image:
    return Image.fromarray(load_sample_image(name))


@cache
def _corners(box: tuple[int, int, int, int]) -> list[tuple[int, int]]:
    left, top, right, bottom = box
    places = [(x, y) for y in range(top, bottom - CUT, SHIFT) for x in range(left, right - CUT, SHIFT)]
    order = np.random.default_rng(0).permutation(len(places))
    return [places[place] for place in order.tolist()]


def picture(subject: str, number: int) -> Image.Image:
    """The ``number``-th picture of a subject, 64 x 64, RGB."""
    if subject == "digit":
        digits = load_digits()
        pixels = digits.images[digits.target == 0][number] * 255 / 16
        small = Image.fromarray(pixels.astype(np.uint8))
    else:
        name, box = PLACES[subject]
        x, y = _corners(box)[number]
        small = _photograph(name).crop((x, y, x + CUT, y + CUT))
    return small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")


def encoded(image: Image.Image, extension: str = "png", **options: Any) -> bytes:
    register_heif_opener()
    buffer = io.BytesIO()
    kinds = {"jpg": "JPEG", "tif": "TIFF", "heic": "HEIF"}
    image.save(buffer, format=kinds.get(extension, extension.upper()), **options)
    return buffer.getvalue()


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path

"""The embedded data set: scikit-learn's handwritten digits as PNG files, and glyphs drawn with fonts.

The digits are real. What a user's data may suffer from is made on purpose, so that every audit has
something true to find: three classes are thinned on the training side (what is taken away becomes the
unlabelled pool), one of them is flooded with synthetic glyphs, one is topped up to the size of the
others, and one full class gets glyphs that nobody can read.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from components.common.errors import RetortError
from components.common.storage import atomic_path, need_disk, remove
from components.dataset.params import Splits
from components.dataset.splits import split_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDE = 32  # pixels; the digits themselves are 8 x 8
KEPT = 20  # real training images of a thinned class, of some 107
FLOODED, TOPPED_UP, THINNED, GARBLED = "2", "7", "6", "3"
GLYPHS = {FLOODED: 480, TOPPED_UP: 85, GARBLED: 60}
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
)
MARK = ".retort-digits"  # stands in a folder that this module may rewrite


def write(root: Path, splits: Splits, seed: int) -> None:
    """Write the data set below ``root``: ``<class>/real``, ``<class>/synthetic`` and ``unlabeled``.

    The same splits and seed give the same files, byte for byte; files that are right already stay as
    they are, so that caches keyed by time hold.

    Raises:
        RetortError: when ``root`` holds other files: they might be a person's own.
    """
    if root.exists() and any(root.iterdir()) and not (root / MARK).exists():
        raise RetortError(
            f"{root}: data.source is 'digits', but this folder (data.root) holds other files; "
            "set data.source to the folder, or data.root to an empty one"
        )
    need_disk(root, 20_000_000, "the data set")
    (root / MARK).touch()
    wanted = dict(files(splits, seed))
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.name != MARK and path.relative_to(root).as_posix() not in wanted:
            remove(path)
    for name, content in wanted.items():
        path = root / name
        if not path.exists() or path.read_bytes() != content:
            with atomic_path(path) as partial:
                partial.write_bytes(content)


def files(splits: Splits, seed: int) -> Iterator[tuple[str, bytes]]:
    """(path below root, PNG) of every image."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    training: dict[str, list[tuple[str, str, bytes]]] = {}  # by class: content hash, file name, content
    for number, (pixels, target) in enumerate(zip(digits.images, digits.target, strict=True)):
        content = _png(_enlarged(pixels / 16))
        digest = hashlib.sha256(content).hexdigest()
        name = f"{number:04d}.png"
        if split_of(digest, splits) == "train":
            training.setdefault(str(target), []).append((digest, name, content))
        else:
            yield f"{target}/real/{name}", content
    for target, items in sorted(training.items()):
        kept = KEPT if target in (FLOODED, TOPPED_UP, THINNED) else len(items)
        for place, (_, name, content) in enumerate(sorted(items)):
            yield (f"{target}/real/{name}" if place < kept else f"unlabeled/{name}"), content
    for target, count in GLYPHS.items():
        random = np.random.default_rng([seed, int(target)])
        for number in range(count):
            draw = garbled if target == GARBLED else glyph
            yield f"{target}/synthetic/{number:04d}.png", _png(draw(target, random))


def _enlarged(ink: NDArray[np.float64]) -> Image.Image:
    """Dark on light, bicubic to SIDE x SIDE; ``ink`` is 8 x 8, 0 to 1."""
    grey = Image.fromarray(np.round(255 * (1 - np.clip(ink, 0, 1))).astype(np.uint8))
    return grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _drawn(text: str, random: np.random.Generator, turn: float) -> Image.Image:
    """``text`` white on black, cut out tightly: one of the fonts, turned by up to ``turn`` degrees."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(folder / f"{FONTS[random.integers(len(FONTS))]}.ttf", 96)
    image = Image.new("L", (192, 192))
    thickness = int(random.integers(0, 5))
    ImageDraw.Draw(image).text((96, 96), text, fill=255, font=font, anchor="mm", stroke_width=thickness)
    image = image.rotate(random.uniform(-turn, turn), Image.Resampling.BICUBIC)
    return image.crop(image.getbbox())


def glyph(text: str, random: np.random.Generator) -> Image.Image:
    """A readable glyph, in the manner of the digits: as high as the image, scanned at 8 x 8, enlarged."""
    image = _drawn(text, random, turn=12)
    height = random.uniform(58, 64)
    width = min(height * image.width / image.height * random.uniform(0.85, 1.15), 60)
    image = image.resize((round(width), round(height)), Image.Resampling.BICUBIC)
    paper = Image.new("L", (64, 64))
    shift = random.normal(0, 2)
    paper.paste(image, (round((64 - width) / 2 + shift), round((64 - height) / 2)))
    paper = paper.filter(ImageFilter.GaussianBlur(random.uniform(0, 3)))
    ink = np.asarray(paper.resize((8, 8), Image.Resampling.BOX), dtype=np.float64) / 255
    ink = ink * random.uniform(0.95, 1.25) + random.normal(0, 0.04, ink.shape) * (ink > 0.02)
    return _enlarged(np.round(np.clip(ink, 0, 1) * 16) / 16)


def garbled(text: str, random: np.random.Generator) -> Image.Image:
    """A glyph that nobody can read: turned anywhere, bent by waves, half covered, drowned in noise."""
    image = _drawn(text, random, turn=180).resize((64, 64), Image.Resampling.BICUBIC)
    values = np.asarray(image, dtype=np.float64) / 255
    rows, columns = np.mgrid[0:64, 0:64]
    phase = random.uniform(0, 2 * np.pi, 2)
    bent = values[
        (rows + 14 * np.sin(columns / 7 + phase[0])).astype(int) % 64,
        (columns + 14 * np.sin(rows / 6 + phase[1])).astype(int) % 64,
    ]
    top, left = random.integers(0, 32, 2)
    bent[top : top + 28, left : left + 28] = random.uniform(0, 1)
    ink = bent.reshape(8, 8, 8, 8).mean(axis=(1, 3)) + random.normal(0, 0.22, (8, 8))
    return _enlarged(np.round(np.clip(ink, 0, 1) * 16) / 16)

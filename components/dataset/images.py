"""Reading and decoding images: the one way that every step uses, so that all of them see the same pixels."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
import PIL
from PIL import Image, ImageOps

from components.common.errors import ChangedError, ImageError
from components.dataset.manifest import image_path

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

T_co = TypeVar("T_co", covariant=True)

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif",
    ".heic", ".heif", ".hif", ".avif", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
# images by their name, but of formats that are not decoded here: they are counted aloud
NOT_READ = (
    ".raw", ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf",
    ".pef", ".srw", ".x3f", ".3fr", ".iiq", ".jxl", ".jp2", ".j2k", ".jpf", ".jpx", ".jls", ".jxr", ".wdp",
    ".psd", ".psb", ".xcf", ".svg", ".ai", ".eps", ".exr", ".hdr", ".dcm", ".tga", ".ico", ".pcx", ".dds",
    ".qoi", ".bpg",
)  # fmt: skip
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # by content, whatever the name says
MAX_PIXELS = 89_478_485  # 1 GiB as float32 RGB: Pillow's own limit before it warns
MAX_BYTES = 1 << 29
DRAFT = 1.5  # of a canvas's side, at least, is what a JPEG is decoded at: enough for antialiasing to average
VERSION = 1  # of what is computed here: caches of pixels made by another number are not used
PNG_END = b"IEND\xaeB`\x82"  # type and checksum of the chunk that ends every PNG

# decode() judges the size by itself, from the header
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# what is wrong with an image is said in a finding, which names the file
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def decoder() -> str:
    """What turns files into pixels, as keys of caches name it: this module, and Pillow."""
    return f"{VERSION}, Pillow {PIL.__version__}"


class Pin(NamedTuple):
    """What the manifest says of an image's content; None: nothing."""

    bytes: int | None
    sha256: str | None


def pins(table: pa.Table | pa.RecordBatch) -> list[Pin]:
    """The pin of each row of a manifest, from its columns ``bytes`` and ``sha256``."""
    return [Pin(*row) for row in zip(table["bytes"].to_pylist(), table["sha256"].to_pylist(), strict=True)]


class Column(Protocol[T_co]):
    """What a manifest says of its rows, by their number: a list, or what is looked up row by row."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> T_co: ...


@dataclass(frozen=True)
class Images:
    """The images of some rows of a manifest, by their number: the one way in which steps read them.

    Attributes:
        root: the folder below which they lie, ``data.root``.
        pins: what each must be.

    Every method raises ImageError where an image is missing or cannot be decoded, ChangedError (one of them)
    where it is no longer the manifest's, and RetortError where a store cannot be reached.
    """

    root: str | Path
    paths: Column[str]
    pins: Column[Pin]

    def content(self, number: int) -> bytes:
        """The file."""
        return read_bytes(self.root, self.paths[number], self.pins[number])

    def whole(self, number: int) -> Image.Image:
        """The whole image in RGB."""
        return decode(self.content(number))

    def square(self, number: int, size: int) -> NDArray[np.uint8]:
        """Its central square, uint8 [size, size, 3]."""
        return central_square(self.whole(number), size)

    def squares(self, size: int, batch: int) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
        """Central squares of all, uint8 [n, size, size, 3], ``batch`` at a time, with their place."""
        for start in range(0, len(self.paths), batch):
            place = slice(start, min(start + batch, len(self.paths)))
            yield place, np.stack([self.square(number, size) for number in range(place.start, place.stop)])


def read_bytes(root: str | Path, path: str, pin: Pin | None = None) -> bytes:
    """The content of a manifest's ``path``: a file below ``root``, or an s3:// object through the cache.

    Args:
        pin: what it must be; a step that uses the labels and splits of the manifest needs its very images.

    Raises:
        ImageError: when it is missing, no ordinary file, outside ``root``, or larger than MAX_BYTES.
        ChangedError: when it is not what ``pin`` says.
        RetortError: when the store cannot be reached.
    """
    content = _content(root, path)
    if pin is not None:
        need_same(path, content, pin)
    return content


def need_same(path: str, content: bytes, pin: Pin) -> None:
    """Raise ChangedError when the content of the manifest's ``path`` is not what its pin says."""
    if pin.bytes is not None and len(content) != pin.bytes:
        raise ChangedError(f"{path} has {len(content):,} bytes instead of {pin.bytes:,}")
    if pin.sha256 is not None and hashlib.sha256(content).hexdigest() != pin.sha256:
        raise ChangedError(f"{path} has another content")


def _content(root: str | Path, path: str) -> bytes:
    if "://" in path:
        from components.dataset import s3

        return s3.read(path)
    place = image_path(root, path)
    if leaves_root(path):
        raise ImageError("image.unreadable", f"{path}: lies outside data.root")
    try:
        with open(os.open(place, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("image.unreadable", f"{path}: not an ordinary file")
            if status.st_size > MAX_BYTES:
                raise ImageError("image.bomb", f"{path}: {status.st_size:,} bytes")
            return file.read()
    except OSError as error:
        raise ImageError("image.unreadable", f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # a null byte in the name
        raise ImageError("image.unreadable", f"{path!r}: {error}") from None


def leaves_root(path: str) -> bool:
    """Whether a path of the manifest points outside ``data.root``: absolute, or upwards through ``..``."""
    return path.startswith("/") or os.path.normpath(path).split("/", 1)[0] == ".."


def open_header(content: bytes) -> Image.Image:
    """The image with nothing but its header read, so that its size can be judged before memory is taken.

    Raises:
        ImageError: ``image.unreadable`` or, above MAX_PIXELS, ``image.bomb``.
    """
    if not content:
        raise ImageError("image.unreadable", "the file is empty")
    try:
        image = Image.open(io.BytesIO(content), formats=_formats(content))
    except Image.DecompressionBombError:
        raise ImageError("image.bomb", f"more than {MAX_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise ImageError("image.unreadable", "not an image of a known format") from None
    except Exception as error:  # noqa: BLE001 - a hostile header may raise anything; it is one bad image
        raise ImageError("image.unreadable", f"{type(error).__name__}: {error}") from None
    # Pillow asks for no end of a PNG once it has all rows
    if image.format == "PNG" and content.rfind(PNG_END) < 0:
        raise ImageError("image.unreadable", "the end of the file is missing")
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError("image.bomb", f"{width} x {height} pixels, the limit is {MAX_PIXELS:,} in all")
    return image


def _formats(content: bytes) -> tuple[str, ...]:
    """Which decoders may look at the content: for AVIF or HEIC, whose boxes look alike, one of the two."""
    if content[4:8] != b"ftyp":
        return FORMATS
    box = content[8 : min(int.from_bytes(content[:4], "big"), 256)]
    brands = {box[start : start + 4] for start in range(0, len(box), 4)}
    if brands & {b"avif", b"avis"}:
        return ("AVIF",)
    _register_heif()
    return ("HEIF",)


@cache
def _register_heif() -> None:
    """Teach Pillow to read HEIC, once a process, and only where there is one.

    Raises:
        ImageError: pillow-heif was left out, as who must not ship its wheels' GPL codec may.
    """
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        said = "HEIC takes the package pillow-heif, which is not installed"
        raise ImageError("image.unreadable", said) from None

    # rotation and mirroring are applied by the decoder; side images (depth, gain maps) are not of interest
    register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)


def decode(content: bytes) -> Image.Image:
    """The whole image as RGB: first (of HEIC: main) frame, rotation applied, alpha over white, 8 bits.

    Raises:
        ImageError: ``image.unreadable`` (also when only the end is missing) or ``image.bomb``.
    """
    return to_rgb(open_header(content))


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode what ``open_header`` gave; see ``decode``."""
    try:
        image.load()
        if image.width * image.height > MAX_PIXELS:  # a header of HEIC may say less than is there
            raise ImageError("image.bomb", f"{image.width} x {image.height} pixels")
        return _rgb(_rotated(image))
    except ImageError:
        raise
    except Exception as error:  # noqa: BLE001 - decoders raise anything; it is one bad image
        raise ImageError("image.unreadable", f"{type(error).__name__}: {error}") from None


def _rotated(image: Image.Image) -> Image.Image:
    # tag 274 is Orientation; the rest of a damaged EXIF block is not our business
    if image.getexif().get(274, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        values: NDArray[Any] = np.asarray(image)
        return Image.fromarray((np.clip(values, 0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        scale = 255.0 if values.max() <= 1.0 else 1.0
        return Image.fromarray(np.clip(values * scale, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def load_rgb(root: str | Path, path: str, size: int, pin: Pin | None = None) -> NDArray[np.uint8]:
    """The preprocessing of every step: central square, bicubic with antialiasing.

    The same as resizing the shorter side to ``size`` and cropping the centre, at a cost that does not
    grow with the longer side.

    Returns:
        uint8 ``[size, size, 3]``. Afterwards: pixels / 255, minus mean, over standard deviation.

    Raises:
        ImageError: see ``read_bytes`` and ``decode``.
    """
    return central_square(decode(read_bytes(root, path, pin)), size)


def central_square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The central square of an RGB image, resized to uint8 ``[size, size, 3]``."""
    width, height = image.size
    short = min(width, height)
    left, top = (width - short) / 2, (height - short) / 2
    box = (left, top, left + short, top + short)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def canvas(
    image: Image.Image, side: int, box: tuple[float, float, float, float] | None = None
) -> NDArray[np.uint8]:
    """The whole RGB image, squeezed into uint8 ``[side, side, 3]``: bicubic with antialiasing.

    A crop of it in relative coordinates is that crop of the image, once it is brought to its own aspect.

    Args:
        box: where the image lies (left, top, right, bottom); None: it is all there is.
    """
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=box))


def load_canvas(
    root: str | Path, path: str, side: int, pin: Pin | None = None
) -> tuple[NDArray[np.uint8], float]:
    """The canvas of an image and its aspect, width over height; see ``decode_canvas``.

    Raises:
        ImageError: see ``read_bytes`` and ``decode``.
    """
    return decode_canvas(read_bytes(root, path, pin), side)


def decode_canvas(content: bytes, side: int) -> tuple[NDArray[np.uint8], float]:
    """The canvas of an image file's content and its aspect, width over height; see ``canvas``.

    A JPEG is decoded at a half, a quarter or an eighth of its size where ``DRAFT`` times ``side`` is left:
    two to three times faster, and not a grey level away on average.

    Raises:
        ImageError: see ``decode``.
    """
    image = open_header(content)
    width, height = image.size
    least = int(DRAFT * side)
    smaller = image.draft(None, (least, least))  # None: no JPEG
    made = to_rgb(image)
    if smaller is None:
        return canvas(made, side), made.width / made.height
    # the last pixels of a smaller one lie partly outside: without its exact box, objects would move
    turned = image.getexif().get(274, 1)
    x, y = smaller[1][2:]
    if turned >= 5:
        width, height, x, y = height, width, y, x
    left = made.width - x if turned in (2, 3, 6, 7) else 0
    top = made.height - y if turned in (3, 4, 7, 8) else 0
    return canvas(made, side, (left, top, left + x, top + y)), width / height


def thumbnail(root: str | Path, path: str, size: int = 72) -> bytes:
    """A PNG of at most ``size`` x ``size`` pixels for contact sheets; a grey cross for a damaged image."""
    try:
        content = read_bytes(root, path)
    except ImageError:
        return _cross(size)
    return thumbnail_of(content, size)


def thumbnail_of(content: bytes, size: int = 72) -> bytes:
    """The same of an image file's content."""
    try:
        image = decode(content)
    except ImageError:
        return _cross(size)
    image.thumbnail((size, size), Image.Resampling.BICUBIC)
    return _png(image)


def _cross(size: int) -> bytes:
    from PIL import ImageDraw

    image = Image.new("RGB", (size, size), "#e8ecf0")
    draw = ImageDraw.Draw(image)
    draw.line((0, 0, size, size), fill="#8a94a0", width=2)
    draw.line((0, size, size, 0), fill="#8a94a0", width=2)
    return _png(image)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()

"""Every kind of image becomes the same RGB pixels for all steps; a bad one is named, never half read."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from components.common.errors import ChangedError, ImageError
from components.dataset import images
from components.dataset.images import Pin, decode, load_rgb, read_bytes, thumbnail
from tests.components.dataset.conftest import digit, encoded, put

pillow_heif.register_heif_opener()  # to write with


def colours(width: int = 40, height: int = 20) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), "red")
    image.paste((0, 0, 255), (width // 2, 0, width, height))
    return image


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16", "I", "F", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = "PNG" if mode not in ("F", "CMYK") else "TIFF"
    image = Image.new("I;16", (8, 8), 65535) if mode == "I;16" else Image.new("L", (8, 8), 255).convert(mode)
    if mode == "I":
        image = Image.fromarray(np.full((8, 8), 65535, np.int32))
        kind = "TIFF"
    decoded = decode(encoded(image, kind))
    assert decoded.mode == "RGB"
    assert decoded.getpixel((4, 4)) == (255, 255, 255)


def test_transparency_is_white() -> None:
    assert decode(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[274] = 6  # turn a quarter clockwise to see it upright
    image = decode(encoded(colours(), "JPEG", exif=exif, quality=95))
    assert image.size == (20, 40)
    assert image.getpixel((10, 5))[0] > 200, "what was left is on top"


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_photographs_of_telephones_are_read(kind: str) -> None:
    exif = Image.Exif()
    exif[274] = 6
    turn = exif.tobytes()
    image = decode(encoded(colours(80, 40), kind, quality=95))
    assert (image.mode, image.size) == ("RGB", (80, 40))
    assert np.abs(np.asarray(image, float) - np.asarray(colours(80, 40), float)).mean() < 6
    turned = decode(encoded(colours(80, 40), kind, exif=turn, quality=95))
    as_jpeg = decode(encoded(colours(80, 40), "JPEG", exif=turn, quality=95))
    assert turned.size == as_jpeg.size == (40, 80)
    assert np.abs(np.asarray(turned, float) - np.asarray(as_jpeg, float)).mean() < 6, "turned once, as a JPEG"
    clear = decode(encoded(Image.new("RGBA", (64, 64), (0, 0, 0, 0)), kind, quality=95))
    assert min(clear.getpixel((32, 32))) > 250, "alpha over white"


def test_the_main_image_of_a_heic_counts_and_ten_bits_become_eight() -> None:
    several = pillow_heif.from_pillow(Image.new("RGB", (64, 64), "red"))
    several.add_from_pillow(Image.new("RGB", (32, 32), "blue"))
    buffer = io.BytesIO()
    several.save(buffer, quality=95, primary_index=1)
    assert decode(buffer.getvalue()).size == (32, 32)
    deep = pillow_heif.from_bytes("RGB;16", (64, 64), np.full((64, 64, 3), 32768, np.uint16).tobytes())
    buffer = io.BytesIO()
    deep.save(buffer, quality=95)
    assert abs(decode(buffer.getvalue()).getpixel((32, 32))[0] - 128) < 4


def test_without_the_package_a_heic_is_unreadable_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(colours(80, 40), "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    images._register_heif.cache_clear()
    with pytest.raises(ImageError, match="pillow-heif, which is not installed"):
        decode(content)
    assert decode(encoded(colours(80, 40), "AVIF")).size == (80, 40)


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.95])
def test_a_truncated_photograph_of_a_telephone_is_unreadable(kind: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    content = encoded(noise, kind)
    with pytest.raises(ImageError) as raised:
        decode(content[: int(share * len(content))])
    assert raised.value.rule == "image.unreadable"


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_their_sizes_are_judged_before_they_are_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(colours(80, 40), kind)
    monkeypatch.setattr(images, "MAX_PIXELS", 80 * 40 - 1)
    with pytest.raises(ImageError) as raised:
        images.open_header(content)
    assert raised.value.rule == "image.bomb"


def test_an_avif_under_the_general_brand_is_told_from_a_heic() -> None:
    content = encoded(colours(80, 40), "AVIF", quality=95)
    assert decode(content.replace(b"ftypavif", b"ftypmif1", 1)).size == (80, 40)


def test_a_film_is_no_image() -> None:
    with pytest.raises(ImageError, match="not an image of a known format"):
        decode(b"\0\0\0\x18ftypqt  \0\0\0\0qt  mp42" + bytes(200))


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode(content).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.95, 0.9995])
def test_a_truncated_file_is_unreadable(kind: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    content = encoded(noise, kind)
    with pytest.raises(ImageError) as raised:
        decode(content[: int(share * len(content))])
    assert raised.value.rule == "image.unreadable"


def test_a_bomb_is_refused_by_its_header() -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    for side in (12_000, 60_000):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        with pytest.raises(ImageError) as raised:
            decode(content)
        assert raised.value.rule == "image.bomb"


def test_load_rgb_is_the_central_square(tmp_path: Path) -> None:
    put(tmp_path / "wide.png", encoded(colours(60, 20)))
    pixels = load_rgb(tmp_path, "wide.png", 10)
    assert pixels.shape == (10, 10, 3)
    assert pixels.dtype == np.uint8
    assert tuple(pixels[5, 1]) == (255, 0, 0)
    assert tuple(pixels[5, 8]) == (0, 0, 255)


def test_load_rgb_agrees_with_resizing_first(tmp_path: Path) -> None:
    put(tmp_path / "digit.png", encoded(digit(3, side=64)))
    expected = np.asarray(digit(3, side=64).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(load_rgb(tmp_path, "digit.png", 32), expected)


def scene(width: int, height: int) -> Image.Image:
    """A smooth picture whose four corners and halves differ."""
    coarse = np.random.default_rng(1).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def test_a_canvas_is_the_whole_picture_squeezed(tmp_path: Path) -> None:
    put(tmp_path / "wide.png", encoded(colours(60, 20)))
    pixels, aspect = images.load_canvas(tmp_path, "wide.png", 12)
    assert (pixels.shape, pixels.dtype, aspect) == ((12, 12, 3), np.uint8, 3.0)
    assert tuple(pixels[5, 0]) == (255, 0, 0), "its left end, which the central square lacks"
    assert tuple(pixels[5, 11]) == (0, 0, 255)
    put(tmp_path / "scene.png", encoded(scene(90, 70)))
    expected = np.asarray(scene(90, 70).resize((32, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(images.load_canvas(tmp_path, "scene.png", 32)[0], expected)


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize(("width", "height"), [(804, 597), (605, 1203), (513, 511)])
def test_a_jpeg_decoded_smaller_gives_the_same_canvas(
    tmp_path: Path, width: int, height: int, turned: int
) -> None:
    exif = Image.Exif()
    exif[274] = turned
    content = encoded(scene(width, height), "JPEG", exif=exif, quality=95)
    put(tmp_path / "large.jpg", content)
    whole = decode(content)
    pixels, aspect = images.load_canvas(tmp_path, "large.jpg", 64)
    assert aspect == whole.width / whole.height
    difference = np.abs(pixels.astype(int) - images.canvas(whole, 64))
    assert difference.mean() < 0.5
    assert difference.max() <= 4, "nothing is moved"


def test_a_large_jpeg_is_decoded_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "large.jpg", encoded(scene(1600, 1200), "JPEG"))
    put(tmp_path / "large.png", encoded(scene(1600, 1200), "PNG"))
    sizes = []
    made = images.canvas
    monkeypatch.setattr(
        images, "canvas", lambda image, side, box=None: sizes.append(image.size) or made(image, side, box)
    )
    for name, side in (("large.jpg", 64), ("large.jpg", 200), ("large.jpg", 900), ("large.png", 64)):
        images.load_canvas(tmp_path, name, side)
    assert sizes == [(200, 150), (400, 300), (1600, 1200), (1600, 1200)]


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_the_canvas_of_a_truncated_jpeg_is_an_error(tmp_path: Path, share: float) -> None:
    content = encoded(scene(800, 600), "JPEG")
    put(tmp_path / "cut.jpg", content[: int(share * len(content))])
    with pytest.raises(ImageError) as raised:
        images.load_canvas(tmp_path, "cut.jpg", 64)
    assert raised.value.rule == "image.unreadable"


@pytest.mark.parametrize(
    "path", ["missing.png", "/etc/hostname", "../outside.png", "a/../../outside.png", "a\0b"]
)
def test_what_is_missing_or_outside_is_named(tmp_path: Path, path: str) -> None:
    put(tmp_path / "outside.png", encoded(digit(0)))
    (tmp_path / "root" / "a").mkdir(parents=True)
    with pytest.raises(ImageError):
        read_bytes(tmp_path / "root", path)


def test_an_image_is_held_to_what_the_manifest_says(tmp_path: Path) -> None:
    content = encoded(digit(0))
    put(tmp_path / "a.png", content)
    pin = Pin(len(content), hashlib.sha256(content).hexdigest())
    assert read_bytes(tmp_path, "a.png", pin) == content
    assert read_bytes(tmp_path, "a.png", Pin(None, None)) == content, "nothing is known of it"
    changed = content[:-1] + b"!"
    for other, word in ((content + b"!", "instead of"), (changed, "another content")):
        put(tmp_path / "a.png", other)
        with pytest.raises(ChangedError, match=rf"image\.changed: a\.png .*{word}.*'retort ingest'") as told:
            read_bytes(tmp_path, "a.png", pin)
    assert str(pickle.loads(pickle.dumps(told.value))) == str(told.value)
    assert told.value.rule == "image.changed"


def test_only_some_changed_images_are_named() -> None:
    error = ChangedError(*(f"{i}.png is another" for i in range(8)))
    assert "2.png is another; and 5 more near them: not what" in str(error)


def test_a_pipe_is_no_image_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="not an ordinary file"):
        read_bytes(tmp_path, "pipe.png")


def test_a_thumbnail_of_a_damaged_image_is_a_cross(tmp_path: Path) -> None:
    put(tmp_path / "bad.png", b"no image")
    assert decode(thumbnail(tmp_path, "bad.png", 24)).size == (24, 24)

"""What is known about one image from reading it once: hashes, size, what is wrong with it. Cached."""

from __future__ import annotations

import hashlib
import math
import os
import sqlite3
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from components.common import shared
from components.common.environment import cores
from components.common.errors import ImageError
from components.common.object_store import CONNECTIONS
from components.common.progress import track
from components.common.shared_rows import SharedRows
from components.common.storage import state_dir
from components.dataset import images, quality, s3
from components.dataset.manifest import image_path

VERSION = 7  # of what is computed here: another number never reads the cache of this one
STORED_AT_ONCE = 2_000
AT_ONCE = 16  # images that a thread inspects before it reports
FLAT = 4.0  # standard deviation of grey values, 0..255, below which an image shows nothing


Pixels = bytes  # the class below has a field of that name


@dataclass(frozen=True)
class Inspection:
    """One image as read. Width and height are in pixels, after EXIF rotation; ``phash`` has 64 bits.

    ``rule`` and ``problem`` say why the image cannot be used; they are empty for a good one. ``look`` is
    its 16 x 16 grey pixels, one byte each, by which near-duplicates are confirmed; ``contrast`` their
    standard deviation, 0..255. ``quality``: what the checks of the quality audit measure, see there.
    """

    sha256: str | None = None
    bytes: int | None = None  # the file's size
    width: int | None = None
    height: int | None = None
    phash: int | None = None
    mode: str = ""
    frames: int = 1
    rotated: bool = False
    contrast: float = 0.0
    look: Pixels = b""
    quality: Pixels = b""
    rule: str = ""
    problem: str = ""


def inspect(content: bytes) -> Inspection:
    """Decode ``content`` fully and describe it. A bad image raises nothing: ``rule`` says it."""
    known: dict[str, Any] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    try:
        header = images.open_header(content)
        known.update(mode=header.mode, width=header.size[0], height=header.size[1])
        known["frames"] = int(getattr(header, "n_frames", 1))
        image = images.to_rgb(header)
        known["rotated"] = header.getexif().get(274, 1) != 1
    except ImageError as error:
        return Inspection(**known, rule=error.rule, problem=str(error))
    except Exception as error:  # noqa: BLE001 - counting frames or reading EXIF of a damaged file
        return Inspection(**known, rule="image.unreadable", problem=f"{type(error).__name__}: {error}")
    known["width"], known["height"] = image.size
    grey = _grey(image)
    small = _small(grey)
    look = small.resize((16, 16), Image.Resampling.LANCZOS).tobytes()
    return Inspection(
        **known,
        phash=perceptual_hash(small),
        contrast=_spread(look),
        look=look,
        quality=quality.measure(grey),
    )


def _spread(grey: Pixels) -> float:
    """Standard deviation of grey values, rounded; np.std costs as much as hashing the file."""
    values = np.frombuffer(grey, np.uint8).astype(np.float64)
    mean = sum(grey) / len(grey)
    return round(math.sqrt(max(0.0, float(values @ values) / len(grey) - mean * mean)), 2)


def _grey(image: Image.Image) -> Image.Image:
    """The image in grey; a large one is thinned out, which is fast."""
    width, height = image.size
    if min(width, height) >= 256:
        image = image.resize((width // 2, height // 2), Image.Resampling.NEAREST)
    return image.convert("L")  # before averages: those of one channel cost a quarter


def _small(grey: Image.Image) -> Image.Image:
    """32 x 32 pixels of it: blocks are averaged, which is fast too."""
    across, down = max(1, grey.width // 64), max(1, grey.height // 64)
    if across == down == 1:
        return grey.resize((32, 32), Image.Resampling.LANCZOS)
    return grey.reduce((across, down)).resize((32, 32), Image.Resampling.BICUBIC)


def perceptual_hash(grey: Image.Image) -> int:
    """The 64-bit pHash of 32 x 32 grey pixels, bit for bit that of the package ``imagehash``.

    Signs of the lowest 8 x 8 coefficients of the cosine transform against their median; the first
    coefficient is the most significant bit.
    """
    pixels = np.frombuffer(grey.tobytes(), np.uint8).reshape(32, 32)  # np.asarray takes a detour
    lowest = _COSINES @ pixels.astype(np.float64) @ _COSINES.T
    ranked = np.sort(lowest, axis=None)
    bits = np.packbits(lowest > (ranked[31] + ranked[32]) / 2)  # the median; np.median asks more first
    return int.from_bytes(bits.tobytes(), "big")


# rows 0 to 7 of the DCT-II of 32 points
_COSINES = np.cos(np.pi * np.arange(8)[:, None] * (2 * np.arange(32) + 1) / 64)


def inspect_all(
    root: str, paths: Sequence[str], etags: dict[str, str] | None = None, what: str = "reading images"
) -> list[Inspection]:
    """Inspect many images, in parallel, out of the cache where path, size and time (or ETag) are the same.

    Args:
        etags: the ETag of each s3:// path, as the listing gave it; others are looked up in the cache, and
            where state is shared in the store, so that nothing is fetched that another pod has described.

    Raises:
        RetortError: when a store cannot be reached. A bad image only has its ``rule`` set.
    """
    remote = any("://" in path for path in paths)
    threads = CONNECTIONS if remote else cores()
    real = os.path.realpath(root)
    others = _of_others(paths) if remote and shared.place() is not None else {}
    if others and not etags:
        etags = s3.etags([path for path in paths if "://" in path])
    keys = [_key(real, path, etags or {}) for path in paths]
    made: dict[int, Inspection] = {}
    fresh: list[tuple[Any, ...]] = []
    with (
        closing(_open_cache()) as cache,
        ThreadPoolExecutor(threads) as pool,
    ):
        for bucket in others.values():
            bucket.pull(cache)
        try:
            known = _lookup(cache, keys)
            todo = [index for index, key in enumerate(keys) if key is None or key not in known]
            work = partial(_inspect_one, root, etags or {})
            seen = _in_order(
                pool, work, [paths[index] for index in todo], 1 if remote else AT_ONCE, 4 * threads
            )
            for index, made[index] in zip(todo, track(seen, what, len(todo)), strict=True):
                # what was fetched just now has an ETag that it had not before
                key = keys[index] or _key(real, paths[index], etags or {})
                if key is not None:
                    fresh.append((key, *_values(made[index])))
                if len(fresh) >= STORED_AT_ONCE:
                    _store(cache, fresh, others)
                    fresh.clear()
        finally:
            pool.shutdown(cancel_futures=True)
            _store(cache, fresh, others)  # a run that was stopped goes on from here
    return [made[index] if index in made else known[key or ""] for index, key in enumerate(keys)]


def _of_others(paths: Sequence[str]) -> dict[str, SharedRows]:
    """What other pods know of images, by the bucket's URI: a file of a pod's own says nothing to another."""
    buckets = {
        path[: path.index("/", 5)] for path in paths if path.startswith("s3://") and path.count("/") > 2
    }
    return {
        bucket: SharedRows(f"images-{VERSION}/{bucket.removeprefix('s3://')}", "images", ["key", *_COLUMNS])
        for bucket in sorted(buckets)
    }


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[str], Inspection], items: list[str], at_once: int, ahead: int
) -> Iterator[Inspection]:
    """``pool.map`` for ``at_once`` items a task, ``ahead`` tasks handed in before their turn.

    So the pool never waits for whoever takes the results, and an error or Ctrl-C not for all items.
    """

    def several(start: int) -> list[Inspection]:
        return [work(item) for item in items[start : start + at_once]]

    handed: deque[Future[list[Inspection]]] = deque()
    for start in range(0, len(items), at_once):
        handed.append(pool.submit(several, start))
        if len(handed) > ahead:
            yield from handed.popleft().result()
    while handed:
        yield from handed.popleft().result()


def _inspect_one(root: str, etags: dict[str, str], path: str) -> Inspection:
    try:
        if path in etags:
            s3.fetch(path, etags[path])
        return inspect(images.read_bytes(root, path))
    except ImageError as error:
        return Inspection(rule=error.rule, problem=str(error))


def _key(root: str, path: str, etags: dict[str, str]) -> str | None:
    """What the cache knows an image by: path, size and time, or URI and ETag; None when it has neither."""
    if "://" in path:
        if path in etags:
            return f"{path}\0{etags[path]}"
        tag = s3.cached(path).with_suffix(".etag")
        return f"{path}\0{tag.read_text(encoding='utf-8')}" if tag.exists() else None
    try:
        place = image_path(root, path)
        status = os.stat(place)  # noqa: PTH116 - names need not be UTF-8
    except (OSError, ValueError):
        return None
    name = os.fsencode(place).decode("utf-8", "backslashreplace")
    return f"{name}\0{status.st_size}\0{status.st_mtime_ns}"


_COLUMNS = [field.name for field in fields(Inspection)]
_values = attrgetter(*_COLUMNS)  # dataclasses.astuple copies every value, at a price


def _open_cache() -> sqlite3.Connection:
    path: Path = state_dir("cache") / f"images-{VERSION}.sqlite"
    cache = sqlite3.connect(path, timeout=60)
    try:
        _make_table(cache)
    except sqlite3.DatabaseError:  # damaged: it is only a cache
        cache.close()
        path.unlink()
        cache = sqlite3.connect(path, timeout=60)
        _make_table(cache)
    return cache


def _make_table(cache: sqlite3.Connection) -> None:
    with cache:
        cache.execute(f"create table if not exists images (key text primary key, {', '.join(_COLUMNS)})")


def _lookup(cache: sqlite3.Connection, keys: Iterable[str | None]) -> dict[str, Inspection]:
    wanted = [key for key in keys if key is not None]
    found: dict[str, Inspection] = {}
    for start in range(0, len(wanted), 500):
        chunk = wanted[start : start + 500]
        marks = ",".join("?" * len(chunk))
        for key, *values in cache.execute(f"select * from images where key in ({marks})", chunk):  # noqa: S608
            row = dict(zip(_COLUMNS, values, strict=True))
            row["phash"] = None if row["phash"] is None else int(row["phash"], 16)
            row["rotated"] = bool(row["rotated"])
            found[key] = Inspection(**row)
    return found


def _store(
    cache: sqlite3.Connection, rows: list[tuple[Any, ...]], others: dict[str, SharedRows] | None = None
) -> None:
    place = 1 + _COLUMNS.index("phash")  # SQLite's integers are signed: the hash is kept as hexadecimal text
    marks = ",".join("?" * (1 + len(_COLUMNS)))
    stored = [
        (*row[:place], None if row[place] is None else f"{row[place]:016x}", *row[place + 1 :])
        for row in rows
    ]
    with cache:
        cache.executemany(
            f"insert or replace into images values ({marks})",  # noqa: S608 - question marks alone
            stored,
        )
    for bucket, theirs in (others or {}).items():
        theirs.push([row for row in stored if row[0].startswith(f"{bucket}/")])

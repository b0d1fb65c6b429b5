"""Features of images: a real backbone through ONNX Runtime, each image once; cached by content."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.common.environment import cores
from components.common.errors import ChangedError, ImageError, RetortError
from components.common.progress import task
from components.common.shared_rows import SharedRows
from components.common.storage import sha256_file, state_dir
from components.dataset.images import Images, Pin

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCH = 32  # of every call, the last one padded: an image's features do not depend on its neighbours
VERSION = 1  # of what is computed here: another number never reads the cache of this one
SIDE, CELLS, TURNS, CLIP = 32, 8, 8, 0.2  # of the histograms of gradients
PORTION = 1024  # images at once: between two writes to the cache, and in memory as votes for gradients


class Extractor:
    """``features.onnx``: ``images`` uint8 [N, size, size, 3] RGB -> ``features`` float32 [N, D].

    Raises:
        RetortError: when the file is missing, no ONNX, or has other inputs and outputs.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cores()
        options.log_severity_level = 3
        # idle threads must not spin: numpy's are at work between two batches
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
            self.size = int(self._session.get_modelmeta().custom_metadata_map["size"])
            self.sha256 = sha256_file(path)
            given = (
                [i.name for i in self._session.get_inputs()],
                [o.name for o in self._session.get_outputs()],
            )
            if given != (["images"], ["features"]):
                raise RetortError(f"{path}: expected images -> features, found {given[0]} -> {given[1]}")
        except RetortError:
            raise
        except Exception as error:  # noqa: BLE001 - ONNX Runtime has a class of its own for each failure
            said = (str(error).splitlines() or [""])[0][:160]
            raise RetortError(
                f"{path}: not a backbone of ours ({said}); run 'retort weights' again"
            ) from None

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Uint8 [n, size, size, 3], n at most BATCH -> float32 [n, D]."""
        padded = np.zeros((BATCH, *pixels.shape[1:]), np.uint8)
        padded[: len(pixels)] = pixels
        return self._session.run(["features"], {"images": padded})[0][: len(pixels)]


@dataclass(frozen=True)
class Features:
    """What is known of n images.

    Attributes:
        deep: float32 [n, D], of the backbone.
        small: uint8 [n, SIDE, SIDE], the images in grey.
        readable: bool [n].
    """

    deep: NDArray[np.float32]
    small: NDArray[np.uint8]
    readable: NDArray[np.bool_]


def small_grey(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Uint8 [n, S, S, 3] -> uint8 [n, SIDE, SIDE]."""
    from PIL import Image

    small = [
        Image.fromarray(image).convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in pixels
    ]
    return np.stack([np.asarray(image) for image in small])


def gradients(grey: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Histograms of oriented gradients (Dalal and Triggs, 2005): float32 [n, CELLS * CELLS * TURNS].

    What lines are where, which a backbone's last layer knows little about in small images.

    Args:
        grey: uint8 [n, SIDE, SIDE].
    """
    starts = range(0, max(len(grey), 1), PORTION)
    return np.concatenate([_gradients(grey[start : start + PORTION]) for start in starts])


def _gradients(grey: NDArray[np.uint8]) -> NDArray[np.float32]:
    down, right = np.gradient(grey.astype(np.float32) / 255, axis=(1, 2))
    turn = np.arctan2(down, right) % (2 * np.pi) * (TURNS / (2 * np.pi))
    size = np.hypot(down, right)
    lower = np.floor(turn).astype(np.int64) % TURNS
    between = turn - np.floor(turn)
    n = len(grey)
    votes = np.zeros((n, SIDE, SIDE, TURNS), np.float32)
    i, j, k = np.ogrid[:n, :SIDE, :SIDE]
    votes[i, j, k, lower] += size * (1 - between)
    votes[i, j, k, (lower + 1) % TURNS] += size * between
    cell = SIDE // CELLS
    blocks = votes.reshape(n, CELLS, cell, CELLS, cell, TURNS).sum(axis=(2, 4)).reshape(n, -1)
    blocks /= np.linalg.norm(blocks, axis=1, keepdims=True) + 1e-6
    return np.minimum(blocks, CLIP)


def shaken(grey: NDArray[np.uint8], copies: int, seed: int) -> NDArray[np.uint8]:
    """Small images a little turned, scaled, sheared and shifted, ``copies`` of each in turn; uint8."""
    from scipy.ndimage import affine_transform

    random = np.random.default_rng(seed)
    result = np.empty((len(grey) * copies, SIDE, SIDE), np.uint8)
    centre = np.full(2, (SIDE - 1) / 2)
    for place in range(len(result)):
        turn, shear = random.normal(0, 0.2), random.normal(0, 0.2)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        matrix = rotation @ np.array([[random.uniform(0.75, 1.25), 0], [shear, random.uniform(0.75, 1.25)]])
        offset = centre - matrix @ centre + random.normal(0, 2, 2)
        affine_transform(grey[place // copies], matrix, offset, order=1, mode="nearest", output=result[place])
    return result


def extract(backbone: Extractor, root: str, paths: Sequence[str], hashes: Sequence[str | None]) -> Features:
    """Features of images; those that cannot be read are zeros.

    Args:
        hashes: sha256 of each image's content, which the cache knows it by; None: it is read each time.

    Raises:
        RetortError: when a store cannot be reached.
        ChangedError: when an image's content is not that of its hash.
    """
    with closing(_open_cache(backbone)) as cache:
        others = SharedRows(f"features/{_name(backbone)}", "features", ("sha256", "vector"))
        others.pull(cache)
        known = _lookup(cache, hashes)
        todo = [i for i, digest in enumerate(hashes) if digest is None or digest not in known]
        fresh: dict[int, bytes] = {}
        images = Images(root, paths, [Pin(None, digest) for digest in hashes])
        with task("features of images", len(todo)) as shown:
            for start in range(0, len(todo), PORTION):
                portion = todo[start : start + PORTION]
                batches = _batches(backbone, images, portion)
                made = dict(one for batch in batches for one in batch)
                rows = [(hashes[i], content) for i, content in made.items() if hashes[i]]
                _store(cache, rows)
                others.push(rows)
                fresh.update(made)
                shown.advance(len(portion))
    blobs = [fresh.get(i) or known.get(digest or "") for i, digest in enumerate(hashes)]
    size = next((len(blob) for blob in blobs if blob), SIDE * SIDE + 2)
    joined = np.frombuffer(b"".join(blob or bytes(size) for blob in blobs), np.uint8).reshape(
        len(blobs), size
    )
    small = joined[:, : SIDE * SIDE].reshape(-1, SIDE, SIDE)
    deep = np.ascontiguousarray(joined[:, SIDE * SIDE :]).view(np.float16).astype(np.float32)
    return Features(deep, small, np.array([blob is not None for blob in blobs], bool))


def _batches(backbone: Extractor, images: Images, todo: Sequence[int]) -> Iterator[list[tuple[int, bytes]]]:
    """(position, features as bytes) of the images that can be read, a batch at a time."""

    def pixels(i: int) -> NDArray[np.uint8] | None:
        try:
            return images.square(i, backbone.size)
        except ChangedError:  # its features would be stored under the other content's hash
            raise
        except ImageError:
            return None  # validate names such images, or was told not to open them

    with ThreadPoolExecutor(cores()) as pool:
        for start in range(0, len(todo), BATCH):
            batch = todo[start : start + BATCH]
            read = [
                (i, image)
                for i, image in zip(batch, pool.map(pixels, batch), strict=True)
                if image is not None
            ]
            if read:
                pixels_read = np.stack([image for _, image in read])
                deep, small = backbone(pixels_read).astype(np.float16), small_grey(pixels_read)
                yield [
                    (i, grey.tobytes() + vector.tobytes())
                    for (i, _), grey, vector in zip(read, small, deep, strict=True)
                ]


def _name(backbone: Extractor) -> str:
    return f"{backbone.sha256[:32]}-{backbone.size}-{VERSION}"


def _open_cache(backbone: Extractor) -> sqlite3.Connection:
    path = state_dir("cache", "features") / f"{_name(backbone)}.sqlite"
    try:
        return _with_table(path)
    except sqlite3.DatabaseError:  # damaged: it is only a cache
        path.unlink()
        return _with_table(path)


def _with_table(path: Path) -> sqlite3.Connection:
    cache = sqlite3.connect(path, timeout=60)
    try:
        with cache:
            cache.execute("create table if not exists features (sha256 text primary key, vector blob)")
    except sqlite3.DatabaseError:
        cache.close()
        raise
    return cache


def _lookup(cache: sqlite3.Connection, hashes: Sequence[str | None]) -> dict[str, bytes]:
    wanted = [digest for digest in hashes if digest is not None]
    found: dict[str, bytes] = {}
    for start in range(0, len(wanted), 500):
        chunk = wanted[start : start + 500]
        marks = ",".join("?" * len(chunk))
        found.update(
            cache.execute(f"select sha256, vector from features where sha256 in ({marks})", chunk)  # noqa: S608
        )
    return found


def _store(cache: sqlite3.Connection, rows: list[tuple[Any, ...]]) -> None:
    with cache:
        cache.executemany("insert or replace into features values (?, ?)", rows)

"""Features of images: a real backbone through ONNX Runtime, each image once; cached by content."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.common.errors import RetortError
from components.common.progress import task
from components.common.storage import sha256_file, state_dir
from components.dataset import images

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCH = 32  # of every call, the last one padded: an image's features do not depend on its neighbours
PORTION = 1024  # images between two writes to the cache


class Backbone:
    """``features.onnx``: ``images`` uint8 [N, size, size, 3] RGB -> ``features`` float32 [N, D].

    Raises:
        RetortError: when the file is missing, no ONNX, or has other inputs and outputs.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
            self.size = int(self._session.get_modelmeta().custom_metadata_map["size"])
            self.sha256 = sha256_file(path)
            given = ([i.name for i in self._session.get_inputs()], [o.name for o in self._session.get_outputs()])
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


def extract(
    backbone: Backbone, root: str, paths: Sequence[str], hashes: Sequence[str | None]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Features of images, float32 [n, D], and which of them could be read, bool [n] (others are zeros).

    Args:
        hashes: sha256 of each image's content, which the cache knows it by; None: it is read each time.

    Raises:
        RetortError: when a store cannot be reached.
    """
    with closing(_open_cache(backbone)) as cache:
        known = _lookup(cache, hashes)
        todo = [i for i, digest in enumerate(hashes) if digest is None or digest not in known]
        fresh: dict[int, bytes] = {}
        with task("features of images", len(todo)) as shown:
            for start in range(0, len(todo), PORTION):
                portion = todo[start : start + PORTION]
                made = {
                    i: vector.astype(np.float16).tobytes()
                    for batch in _batches(backbone, root, paths, portion)
                    for i, vector in batch
                }
                _store(cache, [(hashes[i], content) for i, content in made.items() if hashes[i]])
                fresh.update(made)
                shown.advance(len(portion))
    blobs = [fresh.get(i) or known.get(digest or "") for i, digest in enumerate(hashes)]
    width = next((len(blob) // 2 for blob in blobs if blob), 1)
    readable = np.array([blob is not None for blob in blobs])
    empty = np.zeros(width, np.float16).tobytes()
    joined = b"".join(blob or empty for blob in blobs)
    return np.frombuffer(joined, np.float16).reshape(len(blobs), width).astype(np.float32), readable


def _batches(
    backbone: Backbone, root: str, paths: Sequence[str], todo: Sequence[int]
) -> Iterator[list[tuple[int, NDArray[np.float32]]]]:
    """(position, features float32 [D]) of the images that can be read, a batch at a time."""

    def pixels(i: int) -> NDArray[np.uint8] | None:
        try:
            return images.load_rgb(root, paths[i], backbone.size)
        except images.ImageError:  # validate names such images, or was told not to open them
            return None

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, len(todo), BATCH):
            batch = todo[start : start + BATCH]
            read = [(i, image) for i, image in zip(batch, pool.map(pixels, batch), strict=True) if image is not None]
            if read:
                vectors = backbone(np.stack([image for _, image in read]))
                yield [(i, vector) for (i, _), vector in zip(read, vectors, strict=True)]


def _open_cache(backbone: Backbone) -> sqlite3.Connection:
    path = state_dir("cache", "features") / f"{backbone.sha256[:32]}-{backbone.size}.sqlite"
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

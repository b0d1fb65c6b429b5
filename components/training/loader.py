"""Images for training: decoded once, augmented the same way for the same seed, epoch and row."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from components.common import progress
from components.common.errors import RetortError
from components.common.storage import atomic_path, human_bytes, need_disk, remove, sha256_json, state_dir
from components.dataset import images, manifest
from components.training import seals
from components.training.sampling import generator

CACHE_BYTES = 8_000_000_000  # decoded images beyond this are decoded when they are needed
PREFETCH = 2  # batches that each loader process keeps ready
PLAIN = -1  # the view that is not augmented
AUGMENTATION = 1  # of what ``augment`` computes: soft labels of another number are not used
CHUNK = 256  # images decoded between two signs of progress


@dataclass(frozen=True)
class Samples:
    """The rows of a manifest as images of one size.

    ``decoded`` is a file uint8 [rows, size, size, 3]; None: each image is decoded when it is asked for.
    """

    table: pa.Table  # columns path, label, split, source; bytes and sha256 where they are not decoded yet
    root: str
    size: int
    decoded: Path | None = None

    @property
    def labels(self) -> np.ndarray:
        """Int64 [rows]; -1 where there is none."""
        return self.table["label"].to_numpy().astype(np.int64)

    def rows(self, split: str) -> np.ndarray:
        """Row numbers int64 of one split."""
        return np.flatnonzero(pc.equal(self.table["split"], split).to_numpy(zero_copy_only=False))


def open_samples(path: Path, root: str, size: int, decoded: Path | None = None) -> Samples:
    """The samples of the manifest ``path``; ``decoded`` as ``decode_all`` made it."""
    pinned = [] if decoded is not None else ["bytes", "sha256"]  # decoded images are those of the manifest
    table = manifest.read(path, ["path", "label", "split", "source", *pinned])
    return Samples(table, root, size, decoded)


def decode_all(path: Path, root: str, size: int, limit: int = CACHE_BYTES) -> Path | None:
    """Decode every image of a manifest once, into a file that later steps and runs find again.

    Returns:
        The file, uint8 [rows, size, size, 3], or None when it would be larger than ``limit`` bytes.

    Raises:
        RetortError: when an image cannot be read or is another one by now, or the disk is too small.
    """
    table = manifest.read(path, ["path", "bytes", "sha256"])
    wanted = table.num_rows * size * size * 3
    if wanted > limit:
        progress.say(
            f"decoded images would take {human_bytes(wanted)}: more than {human_bytes(limit)}, "
            "so they are decoded as they are needed (train.num_workers spreads that over processes)"
        )
        return None
    paths = table["path"].to_pylist()
    key = sha256_json([manifest.fingerprint(path), size, _stamps(table, root), images.decoder()])
    target = state_dir("cache", "decoded") / f"{key[:32]}-{size}.npy"
    seal = target.with_suffix(".json")
    if target.exists():
        fault = seals.fault(seal, target.parent)
        if fault is None:
            return target.resolve()
        progress.say(f"{target.parent}: {fault}; the images are decoded again")
        remove(target)
    need_disk(target.parent, wanted, "decoded images")
    with atomic_path(target) as partial, progress.task("decoding images", len(paths)) as task:
        array = np.lib.format.open_memmap(
            partial, mode="w+", dtype=np.uint8, shape=(len(paths), size, size, 3)
        )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(paths), CHUNK):
                chunk = paths[start : start + CHUNK]
                pins = images.pins(table.slice(start, CHUNK))
                changed: list[str] = []
                made = pool.map(lambda name, pin: _or_changed(root, name, size, pin), chunk, pins)
                for offset, image in enumerate(made):
                    if isinstance(image, images.ChangedError):
                        changed += image.what
                    else:
                        array[start + offset] = image
                if changed:
                    raise images.ChangedError(*changed)
                task.advance(len(chunk))
        array.flush()
        del array
    seals.write(seal, [target], sampled=True)
    return target.resolve()


def _or_changed(root: str, name: str, size: int, pin: images.Pin) -> np.ndarray | images.ChangedError:
    """The pixels, or that they are another image's: others near it may be named beside it."""
    try:
        return _pixels(root, name, size, pin)
    except images.ChangedError as error:
        return error


def _pixels(root: str, name: str, size: int, pin: images.Pin) -> np.ndarray:
    """One image uint8 [size, size, 3]; a RetortError names it."""
    try:
        return images.load_rgb(root, name, size, pin)
    except images.ChangedError:
        raise
    except RetortError as error:
        if "://" not in name and not Path(root).is_dir():
            raise RetortError(
                f"{root}: no such folder; check data.root, and run 'retort ingest' again"
            ) from None
        named = str(error) if name in str(error) else f"{name}: {error}"
        raise RetortError(f"{named}; run 'retort validate' again: it sorts such images out") from None


def _stamps(table: pa.Table, root: str) -> list[list[object]]:
    """Size and time of files whose content the manifest does not pin by a hash."""
    unpinned = table.filter(pc.is_null(table["sha256"]))["path"].to_pylist()
    stamps: list[list[object]] = []
    for name in unpinned:
        place = manifest.image_path(root, name)
        if "://" not in place:
            try:
                stat = Path(place).stat()
            except OSError as error:
                raise RetortError(f"{place}: {error.strerror}; run 'retort ingest' again") from None
            stamps.append([name, stat.st_size, stat.st_mtime_ns])
    return stamps


def augment(pixels: Tensor, rows: np.ndarray, views: np.ndarray, kind: str, seed: int) -> Tensor:
    """Shift, scale, mirror and recolour images; the same seed, view and row give the same picture.

    Args:
        pixels: uint8 [B, 3, S, S].
        rows, views: int64 [B]; a view is the number of the epoch or crop, or PLAIN.
        kind: ``none``; ``light`` (shift up to 8 %, scale up to 10 %, contrast and brightness up to 20 %);
            ``flip`` (light, and mirrored half the time); ``deit`` (random crop of 35 to 100 % of the area,
            mirror, colour up to 40 %, and one time in four a random box erased).

    Returns:
        uint8 [B, 3, S, S]: 8 bits, as the pixels are when the model is used.
    """
    if kind == "none" or (views == PLAIN).all():
        return pixels
    theta = np.tile(np.array([[1.0, 0, 0], [0, 1.0, 0]]), (len(rows), 1, 1))
    gain, offset = np.ones((len(rows), 3)), np.zeros((len(rows), 3))
    boxes: list[tuple[int, int, int, int, int]] = []
    size = pixels.shape[-1]
    for i, (row, view) in enumerate(zip(rows.tolist(), views.tolist(), strict=True)):
        if view == PLAIN:
            continue
        rng = generator(seed, view, row)
        if kind == "deit":
            area, aspect = rng.uniform(0.35, 1.0), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            zoom = np.minimum(np.sqrt([area * aspect, area / aspect]), 1.0)
            shift = rng.uniform(-1, 1, 2) * (1 - zoom)
            gain[i] = rng.uniform(0.6, 1.4) * rng.uniform(0.9, 1.1, 3)
            if rng.uniform() < 0.25:
                height, width = (rng.uniform(0.15, 0.45, 2) * size).astype(int)
                top, left = rng.integers(0, size - height), rng.integers(0, size - width)
                boxes.append((i, int(top), int(left), int(top + height), int(left + width)))
        else:
            zoom = np.repeat(1 / rng.uniform(0.9, 1.1), 2)
            shift = rng.uniform(-0.16, 0.16, 2)  # of [-1, 1]: 8 % of the width
            gain[i] = rng.uniform(0.8, 1.2)
        offset[i] = rng.uniform(-0.2, 0.2) * 128
        mirror = -1.0 if kind != "light" and rng.uniform() < 0.5 else 1.0
        theta[i] = [[mirror * zoom[0], 0, shift[0]], [0, zoom[1], shift[1]]]
    grid = functional.affine_grid(torch.from_numpy(theta).float(), list(pixels.shape), align_corners=False)
    warped = functional.grid_sample(
        pixels.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    gains = torch.from_numpy(gain).float()[:, :, None, None]
    offsets = torch.from_numpy(offset).float()[:, :, None, None]
    result = ((warped - 128) * gains + 128 + offsets).round_().clamp_(0, 255).to(torch.uint8)
    for i, top, left, bottom, right in boxes:
        result[i, :, top:bottom, left:right] = 128
    return result


class Views(Dataset[Tensor]):
    """Views of samples for a DataLoader: an item is (row, view), a fetch takes a whole batch at once."""

    def __init__(self, samples: Samples, kind: str, seed: int) -> None:
        self.samples, self.kind, self.seed = samples, kind, seed
        self._decoded = None if samples.decoded is None else np.load(samples.decoded, mmap_mode="r")

    def __len__(self) -> int:
        return self.samples.table.num_rows

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> Tensor:
        """(row, view) pairs -> uint8 [B, 3, S, S].

        Raises:
            RetortError: when an image that is not decoded yet cannot be read or is another one by now.
        """
        rows, views = np.array(items, dtype=np.int64).reshape(-1, 2).T
        if self._decoded is not None:
            pixels = self._decoded[rows]
        else:
            pixels = np.stack([self._decode(row) for row in rows.tolist()])
        stacked = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        return augment(stacked, rows, views, self.kind, self.seed)

    def _decode(self, row: int) -> np.ndarray:
        table = (
            self.samples.table
        )  # asked cell by cell: to take rows, Arrow would join the whole column first
        name, size, digest = (table[column][row].as_py() for column in ("path", "bytes", "sha256"))
        return _pixels(self.samples.root, name, self.samples.size, images.Pin(size, digest))


class _Told(Dataset[Any]):
    """Views whose errors come as values: what a loader process raises reaches us as a traceback's text."""

    def __init__(self, views: Views) -> None:
        self._views = views

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> Tensor | RetortError:
        try:
            return self._views.__getitems__(items)
        except RetortError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


def load(views: Views, batches: Sequence[Sequence[tuple[int, int]]], num_workers: int) -> Iterator[Tensor]:
    """Batches uint8 [B, 3, S, S] in the given order, made by ``num_workers`` processes (0: by this one).

    Raises:
        RetortError: see ``Views``.
    """
    made = DataLoader(
        _Told(views),
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=num_workers,
        collate_fn=_as_it_is,
        prefetch_factor=PREFETCH if num_workers else None,
    )
    for batch in made:
        if isinstance(batch, RetortError):
            raise batch
        yield batch


def pairs(rows: np.ndarray, view: int) -> list[tuple[int, int]]:
    """(row, view) for each row."""
    return [(row, view) for row in rows.tolist()]


class Normalise:
    """Pixels to a network's input. Teacher and student may differ here: each has its own.

    Args:
        mean, std: per RGB channel, for pixels in 0..1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        scale = torch.tensor(std, device=device).view(1, 3, 1, 1) * 255
        self._factor = 1 / scale
        self._offset = -torch.tensor(mean, device=device).view(1, 3, 1, 1) * 255 / scale
        self._device = device

    def __call__(self, pixels: Tensor) -> Tensor:
        """Uint8 [B, 3, S, S] -> float32 [B, 3, S, S], channels last."""
        values = pixels.to(self._device).contiguous(memory_format=torch.channels_last).float()
        return values.mul_(self._factor).add_(self._offset)


def shm_needed(size: int, batch_size: int, num_workers: int, ray_workers: int) -> int:
    """Bytes of /dev/shm that loader processes may hold: ready batches, one in work, one in use; uint8."""
    return ray_workers * num_workers * (PREFETCH + 2) * batch_size * 3 * size * size


def shm_size(folder: str = "/dev/shm") -> int | None:  # noqa: S108
    """Bytes free in shared memory; None where there is no such folder."""
    try:
        stat = os.statvfs(folder)
    except OSError:
        return None
    return stat.f_bavail * stat.f_frsize

"""Pictures of a manifest's rows: decoded once into memory maps where they fit, else when asked for."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from components.common import progress, shared
from components.common.environment import cores
from components.common.errors import ChangedError, RetortError
from components.common.object_store import CONNECTIONS
from components.common.storage import (
    atomic_path,
    free_bytes,
    human_bytes,
    need_disk,
    remove,
    sha256_json,
    state_dir,
)
from components.dataset import images, manifest
from components.training import augmentation, seals
from components.training.inputs.index import Index

log = logging.getLogger(__name__)

Contents = Callable[[int], bytes]  # the image file of a row; called by several processes and threads
Pixels = npt.NDArray[np.uint8]
Aspects = npt.NDArray[np.float32] | None  # width over height of what canvases show, [B]; None: squares

LEARN, JUDGE = ("train", "unlabeled"), ("val", "test")  # splits whose pictures are kept in one file
DISK_SHARE = 0.5  # of what is free, that decoded pictures may take
CHUNK = 256  # pictures decoded between two signs of progress
PROCESSES_FROM = 4 * CHUNK  # pictures from which processes pay for their start: threads share one interpreter


@dataclass(frozen=True)
class Form:
    """What is made of an image.

    ``square``: its central square, as every step and production sees it. ``canvas``: all of it, resized to a
    square whatever its shape was; the shape, width over height, is kept beside it.
    """

    kind: Literal["square", "canvas"]
    side: int

    def made(self, content: bytes) -> tuple[Pixels, float]:
        """An image file's content -> uint8 [side, side, 3] and its aspect (1 for a square)."""
        if self.kind == "square":
            return images.central_square(images.decode(content), self.side), 1.0
        return images.decode_canvas(content, self.side)

    @property
    def bytes(self) -> int:
        """Of one picture."""
        return self.side * self.side * 3

    def key(self) -> list[object]:
        """What decides the pixels beside the file, for keys of caches."""
        return [self.kind, self.side, images.decoder()]


@dataclass(frozen=True)
class Part:
    """Pictures of the rows of some splits, all of one form.

    ``contents``: None: the image files themselves, below ``root`` or in a store.
    ``decoded``: a file uint8 [rows, side, side, 3], in the rows' order; None: made when they are asked for.
    """

    index: Index
    splits: tuple[str, ...]
    form: Form
    contents: Contents | None
    root: str
    decoded: Path | None = None

    @cached_property
    def rows(self) -> npt.NDArray[np.int32]:
        """Row numbers of the part, ascending."""
        found = [self.index.rows(split) for split in self.splits]
        return np.sort(np.concatenate(found)) if sum(map(len, found)) != len(found[0]) else found[0]

    @property
    def bytes(self) -> int:
        """Of all pictures, decoded."""
        return len(self) * self.form.bytes

    def __len__(self) -> int:
        return sum(self.index.count(split) for split in self.splits)

    @cached_property
    def pixels(self) -> Pixels:
        """The decoded pictures, as a memory map."""
        assert self.decoded is not None
        return np.load(self.decoded, mmap_mode="r")

    @cached_property
    def _aspects(self) -> npt.NDArray[np.float32] | None:
        """Width over height of each decoded canvas's image, float32 [rows]; None: they are squares."""
        assert self.decoded is not None
        return None if self.form.kind == "square" else np.load(_aspects_file(self.decoded), mmap_mode="r")

    def aspects(self, slots: npt.NDArray[np.int64]) -> Aspects:
        """Of some decoded pictures."""
        return None if self._aspects is None else self._aspects[slots]

    def slots(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where rows stand in the decoded file."""
        found = np.searchsorted(self.rows, rows)
        assert (self.rows[np.minimum(found, len(self.rows) - 1)] == rows).all(), "rows of another part"
        return found

    def take(
        self, rows: npt.NDArray[np.int64], pool: Executor | None = None, out: Pixels | None = None
    ) -> tuple[Pixels, Aspects]:
        """Pictures of some rows, uint8 [B, side, side, 3], and their aspects.

        Args:
            pool: threads that share the decoding.
            out: where the pictures are written; None: a new array.

        Raises:
            ChangedError: an image is not the manifest's any more; nothing is asked of decoded ones.
            RetortError: an image cannot be read.
        """
        if self.decoded is not None:
            slots = self.slots(rows)
            # "clip" (no slot is out of range): by default NumPy would fill a buffer first, then copy it
            return np.take(self.pixels, slots, axis=0, out=out, mode="clip"), self.aspects(slots)
        once, counts = np.unique(rows, return_counts=True)  # several views of an image: it is decoded once
        places = np.split(np.argsort(rows, kind="stable"), np.cumsum(counts)[:-1])
        made = (map if pool is None else pool.map)(self.make, once.tolist())
        pixels = np.empty((len(rows), self.form.side, self.form.side, 3), np.uint8) if out is None else out
        aspects = np.empty(len(rows), np.float32)
        for place, (picture, aspect) in zip(places, made, strict=True):
            pixels[place], aspects[place] = picture, aspect
        return pixels, None if self.form.kind == "square" else aspects

    @cached_property
    def _content(self) -> Contents:
        return self.contents or self.index.files(self.root).content

    def make(self, row: int) -> tuple[Pixels, float]:
        """One picture and its aspect, from its file; errors name it and say what to do."""
        try:
            return self.form.made(self._content(row))
        except ChangedError:
            raise
        except RetortError as error:
            name = self.index.path(row)
            if "://" not in name and not Path(self.root).is_dir():
                raise RetortError(
                    f"{self.root}: no such folder; check data.root, and run 'retort ingest' again"
                ) from None
            named = str(error) if name in str(error) else f"{name}: {error}"
            raise RetortError(f"{named}; run 'retort validate' again: it sorts such images out") from None


@dataclass(frozen=True)
class Store:
    """All pictures that a recipe reads: ``learn`` those of train and unlabeled, ``judge`` of val and test."""

    index: Index
    size: int
    learn: Part
    judge: Part
    said: tuple[str, ...] = field(default=(), compare=False)  # why pictures are not decoded, for a person

    def part(self, split: str) -> Part:
        return self.judge if split in JUDGE else self.learn


def open_store(
    index: Index,
    root: str,
    size: int,
    source: Literal["square", "canvas"] = "square",
    *,
    limit: int | None = None,
    contents: Contents | None = None,
    splits: Sequence[str] = (*LEARN, *JUDGE),
    alive: Callable[[int, int], None] | None = None,
) -> Store:
    """The pictures of a manifest's rows, decoded once into files that later steps and runs find again.

    The first process of a node that asks decodes; others wait for it, and find them.

    Args:
        size: of the network's input, pixels.
        source: what the augmentation of train and unlabeled rows reads; other rows are always squares.
        limit: bytes that each file may take; None: half of what the disk has free.
        contents: what gives the image file of a row; None: it is read below ``root``, or from a store.
        splits: those whose pictures will be asked for; no others are decoded.
        alive: told now and then how many of how many pictures of a file are decoded.

    Raises:
        ChangedError: an image is not the manifest's any more; a few of them are named.
        RetortError: an image cannot be read, or the disk is too small.
    """
    square = Form("square", size)
    form = square if source == "square" else Form("canvas", augmentation.canvas_size(size))
    said: list[str] = []

    def opened(names: tuple[str, ...], of: Form) -> Part:
        part = Part(index, names, of, contents, root)
        if not any(name in splits for name in names):
            return part
        return Part(index, names, of, contents, root, decode(part, limit, said.append, alive=alive))

    learn, judge = opened(LEARN, form), opened(JUDGE, square)
    return Store(index, size, learn, judge, tuple(said))


def decode(
    part: Part,
    limit: int | None,
    why: Callable[[str], None],
    processes: int | None = None,
    alive: Callable[[int, int], None] | None = None,
) -> Path | None:
    """Decode every picture of a part once, into a file that later steps and runs find again.

    Args:
        why: told why nothing is decoded, where that is so.
        processes: None: one a core, where there are enough pictures; 0: threads.
        alive: as ``open_store`` has it.

    Returns:
        The file, uint8 [rows, side, side, 3], or None when it would be larger than ``limit``.
    """
    folder = state_dir("cache", "decoded").resolve()
    wanted = part.bytes
    if not wanted:
        return None
    too_much = f"decoded images would take {human_bytes(wanted)}, more than"
    if limit is not None and wanted > limit:
        why(f"{too_much} {human_bytes(limit)}")
        return None
    key = sha256_json([part.index.fingerprint, part.splits, part.form.key(), _stamps(part)])
    target = folder / f"{key[:32]}-{part.form.kind}-{part.form.side}.npy"
    seal = target.with_suffix(".json")
    files = [target, *([_aspects_file(target)] if part.form.kind == "canvas" else [])]
    with FileLock(target.with_suffix(".lock")):
        # decoded elsewhere, they are one object of the store instead of one for each
        if _in_a_store(part) and not target.exists() and shared.bring(seal):
            for file in files:
                shared.bring(file)
        if target.exists():
            fault = seals.fault(seal, folder)
            if fault is None:
                return target
            log.warning(f"{folder}: {fault}; the images are decoded again")
            remove(target)
        free = free_bytes(folder)
        if limit is None and wanted > DISK_SHARE * free:
            why(f"{too_much} half of the {human_bytes(free)} free at {folder}")
            return None
        need_disk(folder, wanted, "decoded images")
        _fill(part, target, processes, alive)
        if _in_a_store(part):
            for file in (*files, seal):
                shared.keep(file)
    return target


def _in_a_store(part: Part) -> bool:
    """Whether its images are s3:// objects."""
    return len(part.rows) > 0 and "://" in part.index.path(int(part.rows[0]))


def _fill(part: Part, target: Path, processes: int | None, alive: Callable[[int, int], None] | None) -> None:
    """Decode a part's pictures into ``target``, seal them."""
    rows, side = part.rows, part.form.side
    files = [target]
    aspects = np.ones(len(rows), np.float32)
    remote = _in_a_store(part)
    if processes is None:
        enough = len(rows) >= PROCESSES_FROM and not remote
        processes = cores() if enough else 0
    with atomic_path(target) as partial, progress.task("decoding images", len(rows)) as task:
        array = np.lib.format.open_memmap(
            partial, mode="w+", dtype=np.uint8, shape=(len(rows), side, side, 3)
        )
        with _pool(part, partial, processes, remote) as pool:
            starts = range(0, len(rows), CHUNK)
            if processes:
                done = (each.result() for each in [pool.submit(_fill_chunk, start) for start in starts])
            else:
                done = (_thread_chunk(part, array, start, pool) for start in starts)
            try:
                for start, (changed, of_chunk) in zip(starts, _whole(done), strict=True):
                    if changed:
                        raise ChangedError(*changed)
                    aspects[start : start + CHUNK] = of_chunk
                    task.advance(len(of_chunk))
                    if alive is not None:
                        alive(start + len(of_chunk), len(rows))
            finally:
                pool.shutdown(cancel_futures=True)
        array.flush()
        del array
    if part.form.kind == "canvas":
        files.append(_aspects_file(target))
        with atomic_path(files[-1]) as partial, partial.open("wb") as file:
            np.save(file, aspects)
    seals.write(target.with_suffix(".json"), files, sampled=True)


def _aspects_file(target: Path) -> Path:
    return target.with_name(f"{target.stem}-aspects.npy")


Done = tuple[list[str], npt.NDArray[np.float32]]  # of a chunk: images that are others by now, and aspects


def _whole(done: Iterator[Done]) -> Iterator[Done]:
    try:
        yield from done
    except BrokenProcessPool:
        raise RetortError(
            "decoding images: a process was killed, for want of memory as a rule; free some and run again"
        ) from None


def _pool(part: Part, partial: Path, processes: int, remote: bool) -> Executor:
    if processes:
        # forked: they need nothing that a thread of ours may hold, and start at once
        context = multiprocessing.get_context("fork")
        return ProcessPoolExecutor(processes, context, _begin, (part, partial))
    return ThreadPoolExecutor(CONNECTIONS if remote else cores())


_here: tuple[Part, Pixels]  # of a decoding process: what it decodes, and where to


def _begin(part: Part, partial: Path) -> None:
    global _here
    _here = part, np.load(partial, mmap_mode="r+")


def _fill_chunk(start: int) -> Done:
    part, array = _here
    return _thread_chunk(part, array, start, None)


def _thread_chunk(part: Part, array: Pixels, start: int, pool: Executor | None) -> Done:
    """Decode a chunk into its place; of exchanged images all are named, as they often come together."""
    rows = part.rows[start : start + CHUNK].tolist()
    aspects, changed = np.ones(len(rows), np.float32), list[str]()

    def made(row: int) -> tuple[Pixels, float] | ChangedError:
        try:
            return part.make(row)
        except ChangedError as error:
            return error

    for place, found in enumerate((map if pool is None else pool.map)(made, rows)):
        if isinstance(found, ChangedError):
            changed += found.what
        else:
            array[start + place], aspects[place] = found
    return changed, aspects


def _stamps(part: Part) -> list[list[object]]:
    """Size and time of files whose content the manifest does not pin by a hash."""
    stamps: list[list[object]] = []
    if part.contents is not None:  # what shards hold stays as it is
        return stamps
    for row in part.index.unpinned().tolist():
        if part.index.split_names[part.index.splits[row]] not in part.splits:
            continue
        name = part.index.path(row)
        place = manifest.image_path(part.root, name)
        if "://" not in place:
            try:
                stat = Path(place).stat()
            except OSError as error:
                raise RetortError(f"{place}: {error.strerror}; run 'retort ingest' again") from None
            stamps.append([name, stat.st_size, stat.st_mtime_ns])
    return stamps

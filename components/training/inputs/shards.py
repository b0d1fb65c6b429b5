"""The command ``shard``: image files in tar archives below ``ray.storage``, as WebDataset keeps them.

One object an image costs a request each. A shard holds some thousands of them as they are, in the manifest's
order; any tar reads it. Weighted drawing asks for single rows, so ``places.parquet`` says where tarfile found
each: a node reads that part of the shard until it has fetched the whole one for itself.
"""

from __future__ import annotations

import io
import logging
import os
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from components.common import object_store, progress
from components.common.errors import RetortError
from components.common.object_store import CONNECTIONS
from components.common.storage import (
    free_bytes,
    human_bytes,
    need,
    need_disk,
    read_json,
    state_dir,
    write_json,
)
from components.dataset import images
from components.training import remote
from components.training.inputs.index import Index, open_index
from components.training.inputs.pictures import DISK_SHARE, Contents
from components.training.params import ShardParams

log = logging.getLogger(__name__)

VERSION = 1
FOLDER = "shards"
SHARD_BYTES = 256 << 20  # of image files in a shard; the last one of a shard may go beyond
AHEAD = 64  # image files that are read at once
HEAD, PLACES, PARTS = "shards.json", "places.parquet", "parts"
SCHEMA = pa.schema([("shard", pa.int32()), ("offset", pa.int64()), ("bytes", pa.int32())])
Tar = list[tuple[int, int]]  # offset and bytes of each image file in a shard


def shard(params: ShardParams, *, manifest: Path) -> None:
    """Put the image files of a manifest into shards below ``ray.storage``; goes on where it was interrupted.

    Raises:
        ChangedError: an image is not the manifest's any more.
        RetortError: ``ray.storage`` is not given, or cannot be reached; an image cannot be read.
    """
    if not params.ray.storage:
        raise RetortError(
            "ray.storage is empty: shards go to s3://bucket/prefix or a folder that nodes share"
        )
    need(manifest, "validate")
    remote.remember(params.ray.storage, params.data.s3)
    storage = remote.open_storage(params.ray.storage)
    index = open_index(manifest)
    written = write(storage, index, index.files(params.data.root).content)
    place = f"{storage.uri}/{_folder(index.fingerprint)}"
    said = f"{progress.counted(len(index), 'image')}, {progress.counted(written.count, 'shard')}, " + (
        f"{human_bytes(written.bytes)}: {place}"
    )
    print(said if written.new else f"{said} (there already)")


@dataclass(frozen=True)
class Written:
    """Shards of a manifest. ``new``: how many of them this call wrote."""

    count: int
    bytes: int
    new: int


def _folder(fingerprint: str) -> str:
    return f"{FOLDER}/{fingerprint[:32]}"


def there(storage: object_store.Storage, fingerprint: str) -> bool:
    """Whether all shards of the manifest with this fingerprint are there."""
    return storage.exists(f"{_folder(fingerprint)}/{HEAD}")


def write(
    storage: object_store.Storage, index: Index, contents: Contents, size: int = SHARD_BYTES
) -> Written:
    """Write the shards that are not there yet; a manifest's shards are the same whoever writes them.

    Raises:
        ChangedError: an image is not the manifest's any more.
        RetortError: an image cannot be read, or the storage not be reached.
    """
    folder = _folder(index.fingerprint)
    local = state_dir("shards")
    need_disk(local, 2 * size, "a shard before it is sent")
    with tempfile.TemporaryDirectory(dir=local) as name, FileLock(local / "lock"):
        if there(storage, index.fingerprint):
            storage.get(f"{folder}/{HEAD}", Path(name) / HEAD)
            head = read_json(Path(name) / HEAD)
            return Written(len(head["shards"]), sum(each["bytes"] for each in head["shards"]), 0)
        return _write(storage, index, contents, size, folder, Path(name))


def _write(
    storage: object_store.Storage, index: Index, contents: Contents, size: int, folder: str, local: Path
) -> Written:
    heads: list[dict[str, Any]] = []
    new = row = 0
    with (
        progress.task("writing shards", len(index)) as task,
        pq.ParquetWriter(local / PLACES, SCHEMA, compression="zstd") as places,
        ThreadPoolExecutor(CONNECTIONS) as pool,
    ):
        while row < len(index):
            number = len(heads)
            tar, part = f"{number:06}.tar", f"{PARTS}/{number:06}.parquet"
            if storage.exists(f"{folder}/{part}"):  # an interrupted call wrote it: the shard came before
                storage.get(f"{folder}/{part}", local / "part.parquet")
            else:
                found = _pack(index, contents, row, size, local / tar, pool)
                columns = [[number] * len(found), *map(list, zip(*found, strict=True))]
                pq.write_table(pa.table(columns, schema=SCHEMA), local / "part.parquet")
                storage.put(local / tar, f"{folder}/{tar}")
                storage.put(local / "part.parquet", f"{folder}/{part}")
                (local / tar).unlink()
                new += 1
            table = pq.read_table(local / "part.parquet")
            places.write_table(table)
            last = table.slice(table.num_rows - 1).to_pylist()[0]
            end = -(-(last["offset"] + last["bytes"]) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            heads.append({"name": tar, "rows": table.num_rows, "bytes": _padded(end)})
            row += table.num_rows
            task.update(row, tar)
    storage.put(local / PLACES, f"{folder}/{PLACES}")
    write_json(
        local / HEAD,
        {"version": VERSION, "fingerprint": index.fingerprint, "rows": len(index), "shards": heads},
    )
    storage.put(local / HEAD, f"{folder}/{HEAD}")  # last: what it names is there
    storage.remove(f"{folder}/{PARTS}")
    return Written(len(heads), sum(head["bytes"] for head in heads), new)


def _padded(end: int) -> int:
    """Bytes of a tar archive whose members end there: two empty blocks, filled up to a record."""
    return -(-(end + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _pack(
    index: Index, contents: Contents, first: int, size: int, path: Path, pool: ThreadPoolExecutor
) -> Tar:
    """Write one shard that begins with a row; returns where tarfile finds its members."""
    packed = 0
    with tarfile.open(path, "w") as archive:
        for row, content in _ahead(contents, range(first, len(index)), pool):
            member = tarfile.TarInfo(f"{row:09}.{_extension(index.path(row))}")
            member.size, member.mode = len(content), 0o444
            member.uname = member.gname = "bigdata"  # as WebDataset's own writer has it
            archive.addfile(member, io.BytesIO(content))
            packed += len(content)
            if packed >= size:
                break
    with tarfile.open(path) as archive:
        return [(member.offset_data, member.size) for member in archive]


def _ahead(contents: Contents, rows: range, pool: ThreadPoolExecutor) -> Iterator[tuple[int, bytes]]:
    """Rows and their image files, some of them read at once."""
    left = iter(rows)
    while some := list(islice(left, AHEAD)):
        yield from zip(some, pool.map(contents, some), strict=True)


def _extension(path: str) -> str:
    """By what WebDataset names an image file."""
    suffix = PurePosixPath(path).suffix[1:].lower()
    return suffix if suffix.isascii() and suffix.isalnum() else "img"


# --- reading them ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shards:
    """Image files out of shards: contents of a manifest's rows, for the processes of one node.

    A shared folder is read where it is. Of an S3 storage's shards a node fetches whole ones into its cache
    (``remote.node_cache``) while training goes on, if they all fit; what it has not, it reads by range.
    """

    storage: object_store.Storage
    index: Index

    def __call__(self, row: int) -> bytes:
        """The content of a row's image file.

        Raises:
            ChangedError: it is not the manifest's image.
            RetortError: the storage cannot be reached.
        """
        opened = self._opened
        number, offset, size = (int(column[row]) for column in opened.places)
        content = opened.read(number, offset, size)
        images.need_same(self.index.path(row), content, self.index.pin(row))
        return content

    @cached_property
    def _opened(self) -> _Node:
        return _Node(self.storage, self.index.fingerprint)

    def __reduce__(self) -> tuple[Any, ...]:
        return Shards, (self.storage, self.index)  # each process opens its files for itself


class _Node:
    """What a node has of a manifest's shards; of each process its own."""

    def __init__(self, storage: object_store.Storage, fingerprint: str) -> None:
        self._storage, self._remote = storage, _folder(fingerprint)
        self._folder = remote.node_cache(FOLDER, fingerprint[:32])
        with FileLock(self._folder / "lock"):
            head = self._folder / HEAD
            if not head.exists():
                self._fetch_places(head)
        self._shards: list[dict[str, Any]] = read_json(head)["shards"]
        self.places = [np.load(self._folder / f"{name}.npy", mmap_mode="r") for name in SCHEMA.names]
        self._files: dict[int, int] = {}
        self._opening = threading.Lock()
        if not isinstance(storage, object_store.FolderStorage) and self._fit():
            threading.Thread(target=self._fetch, name="shards", daemon=True).start()

    def _fetch_places(self, head: Path) -> None:
        """Where each row lies, as columns that are mapped into memory."""
        self._storage.get(f"{self._remote}/{PLACES}", self._folder / PLACES)
        with pq.ParquetFile(self._folder / PLACES) as file:
            rows, done = file.metadata.num_rows, 0
            columns: list[npt.NDArray[Any]] = [
                np.lib.format.open_memmap(
                    self._folder / f"{field.name}.npy", "w+", field.type.to_pandas_dtype(), shape=(rows,)
                )
                for field in SCHEMA
            ]
            for batch in file.iter_batches():
                for column, values in zip(columns, batch.columns, strict=True):
                    column[done : done + len(batch)] = values.to_numpy()
                done += len(batch)
        (self._folder / PLACES).unlink()
        del columns
        self._storage.get(f"{self._remote}/{HEAD}", head)  # last: the rest is there

    def read(self, number: int, offset: int, size: int) -> bytes:
        """A part of a shard: from this node if it has it."""
        file = self._file(number)
        if file is None:
            return self._storage.read(f"{self._remote}/{self._shards[number]['name']}", offset, size)
        content = os.pread(file, size, offset)
        if len(content) != size:
            raise RetortError(f"{self._place(number)}: shorter than it was; remove it, and run again")
        return content

    def _file(self, number: int) -> int | None:
        """The open file of a shard; None: it is not here yet."""
        if number not in self._files:
            with self._opening:
                if number not in self._files:
                    try:
                        self._files[number] = os.open(self._place(number), os.O_RDONLY)
                    except FileNotFoundError:
                        return None
        return self._files[number]

    def _place(self, number: int) -> Path:
        name = self._shards[number]["name"]
        if isinstance(self._storage, object_store.FolderStorage):
            return Path(self._storage.uri) / self._remote / name
        return self._folder / name

    def _fit(self) -> bool:
        """Whether all shards may be kept here: the same answer before and after some of them are."""
        here = sum(file.stat().st_size for file in self._folder.glob("*.tar"))
        whole = sum(shard["bytes"] for shard in self._shards)
        return whole <= DISK_SHARE * (free_bytes(self._folder) + here)

    def _fetch(self) -> None:
        """Fetch what is not here, one process a node."""
        try:
            with FileLock(self._folder / "fetching", timeout=0):
                for number, shard in enumerate(self._shards):
                    if not self._place(number).exists():
                        need_disk(self._folder, shard["bytes"], "a node's copy of the shards")
                        self._storage.get(f"{self._remote}/{shard['name']}", self._place(number))
        except Timeout:
            return  # another process does
        except (RetortError, OSError) as error:
            log.warning(f"shards: {error}; images are read from {self._storage.uri} one by one")

"""A manifest's rows as workers see them: columns in memory maps, so that 43 million take no memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock

from components.common import progress
from components.common.errors import RetortError
from components.common.storage import (
    atomic_path,
    need_disk,
    read_json,
    remove,
    sha256_json,
    state_dir,
    write_json,
    write_text,
)
from components.dataset import images, manifest
from components.training import seals

log = logging.getLogger(__name__)

VERSION = 1  # of the files' layout
BLOCK = 1 << 20  # rows of one record batch: a row's place is a division, not a search
SEAL, HEAD, TEXT = "seal.json", "index.json", "text.arrow"
COLUMNS = ["path", "label", "split", "source", "bytes", "sha256"]
TEXT_SCHEMA = pa.schema(
    [manifest.SCHEMA.field("path"), manifest.SCHEMA.field("bytes"), manifest.SCHEMA.field("sha256")]
)
MOST_NAMES = 127  # of splits, or of sources: their codes are int8


T = TypeVar("T")


@dataclass(frozen=True)
class _Column(Generic[T]):
    """A column of an index, looked up row by row."""

    index: Index
    of: Callable[[Index, int], T]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int, /) -> T:
        return self.of(self.index, row)


class Index:
    """The rows of a manifest, looked up by number.

    ``labels``: int32 [rows], -1 where there is none. ``splits`` and ``sources``: int8 [rows], places in
    ``split_names`` and ``source_names``. All are memory maps; a path is read when it is asked for.
    """

    labels: npt.NDArray[np.int32]
    splits: npt.NDArray[np.int8]
    sources: npt.NDArray[np.int8]
    split_names: tuple[str, ...]
    source_names: tuple[str, ...]
    fingerprint: str  # of the manifest

    def __init__(self, folder: Path) -> None:
        """Open what ``build`` has made; the files are trusted: ``open_index`` proves them."""
        self.folder: Path | None = folder
        head = read_json(folder / HEAD)
        self.fingerprint = head["fingerprint"]
        self.split_names, self.source_names = tuple(head["splits"]), tuple(head["sources"])
        self.labels, self.splits, self.sources = (
            _mapped(folder / f"{name}.npy") for name in ("labels", "splits", "sources")
        )
        self._rows: dict[str, npt.NDArray[np.int32]] = {}
        self._take_text(pa.memory_map(str(folder / TEXT)))  # stays open: batches are read when asked for

    @classmethod
    def from_table(cls, table: pa.Table, fingerprint: str = "") -> Index:
        """The index of a manifest in memory, for small ones."""
        index = cls.__new__(cls)
        index.folder, index.fingerprint = None, fingerprint
        splits, sources = _Codes(manifest.SPLITS), _Codes(manifest.SOURCES)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, TEXT_SCHEMA) as text:
            for batch in _blocks(table.select(COLUMNS).to_batches()):
                text.write_batch(_text(batch))
        index.labels = table["label"].to_numpy().astype(np.int32)
        index.splits, index.sources = splits(table["split"]), sources(table["source"])
        index.split_names, index.source_names = tuple(splits.names), tuple(sources.names)
        index._rows = {}
        index._take_text(pa.BufferReader(sink.getvalue()))
        return index

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[Any, ...]:
        """Processes that are handed an index open its files again."""
        if self.folder is None:
            table = pa.Table.from_batches([self._batch(i) for i in range(self._count)], TEXT_SCHEMA)
            names = {"label": self.labels, "split": self._names("split"), "source": self._names("source")}
            for name, values in names.items():
                field = manifest.SCHEMA.field(name)
                table = table.append_column(field, pa.array(values, field.type))
            return Index.from_table, (table, self.fingerprint)
        return Index, (self.folder,)

    def _names(self, column: str) -> list[str]:
        codes, names = (
            (self.splits, self.split_names) if column == "split" else (self.sources, self.source_names)
        )
        return [names[code] for code in codes.tolist()]

    def rows(self, split: str) -> npt.NDArray[np.int32]:
        """Row numbers of one split, ascending."""
        if split not in self._rows:
            place = None if self.folder is None else self.folder / f"rows-{split}.npy"
            if place is not None and place.exists():
                self._rows[split] = _mapped(place)
            elif split in self.split_names:
                self._rows[split] = _rows_of(self.splits, self.split_names.index(split))
            else:
                self._rows[split] = np.empty(0, np.int32)
        return self._rows[split]

    def count(self, split: str) -> int:
        return len(self.rows(split))

    def path(self, row: int) -> str:
        """The manifest's ``path`` of a row."""
        return self._cell(row, 0)

    def pin(self, row: int) -> images.Pin:
        """What the manifest says of a row's content."""
        return images.Pin(self._cell(row, 1), self._cell(row, 2))

    def files(self, root: str) -> images.Images:
        """The image files of the rows below ``data.root``, or in a store; each is held to its pin."""
        return images.Images(root, _Column(self, Index.path), _Column(self, Index.pin))

    def find(self, paths: Collection[str]) -> npt.NDArray[np.int64]:
        """Row numbers of those of the ``paths`` that are in the manifest, ascending."""
        wanted = pa.array(sorted(paths), pa.string())
        found = [np.empty(0, np.int64)]
        for i in range(self._count if len(wanted) else 0):
            here = pc.is_in(self._batch(i).column(0), wanted).to_numpy(zero_copy_only=False)
            found.append(np.flatnonzero(here) + i * BLOCK)
        return np.concatenate(found)

    def unpinned(self) -> npt.NDArray[np.int64]:
        """Rows whose content the manifest does not pin by a hash, ascending."""
        found = [np.empty(0, np.int64)]
        for i in range(self._count):
            column = self._batch(i).column(2)
            if column.null_count:
                found.append(np.flatnonzero(pc.is_null(column).to_numpy(zero_copy_only=False)) + i * BLOCK)
        return np.concatenate(found)

    def _take_text(self, source: pa.NativeFile) -> None:
        self._reader = pa.ipc.open_file(source)
        self._count = self._reader.num_record_batches
        self._batches: list[pa.RecordBatch | None] = [None] * self._count

    def _batch(self, number: int) -> pa.RecordBatch:
        batch = self._batches[number]
        if batch is None:  # a view of the map: the file's bytes are not read here
            batch = self._batches[number] = self._reader.get_batch(number)
        return batch

    def _cell(self, row: int, column: int) -> Any:
        return self._batch(int(row) // BLOCK).column(column)[int(row) % BLOCK].as_py()


def open_index(
    path: Path, fingerprint: str | None = None, note: Callable[[str], None] | None = None
) -> Index:
    """The index of a manifest below ``.retort/cache``: built once, by one of the processes that ask for it.

    Args:
        fingerprint: the manifest's, where it is known: to work it out takes reading all of it.
        note: told when an index was damaged; None: a person is told.

    Raises:
        RetortError: when the manifest cannot be read, or the disk is too small.
    """
    fingerprint = fingerprint or known_fingerprint(path)
    folder = (state_dir("cache", "index") / f"{fingerprint[:32]}-{VERSION}").resolve()
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            fault = seals.fault(folder / SEAL, folder)
            if fault is None:
                return Index(folder)
            (note or log.warning)(f"{folder}: {fault}; the index is built again")
            remove(folder)
        build(path, folder, fingerprint)
    return Index(folder)


def known_fingerprint(path: Path) -> str:
    """The fingerprint of a manifest, worked out once for a file: 43 million rows take half a minute.

    Manifests are written beside and renamed, so that another one has another inode or time.
    """
    try:
        found = path.stat()
    except OSError:
        return manifest.fingerprint(path)  # which says what is wrong
    same = sha256_json([str(path.resolve()), found.st_ino, found.st_size, found.st_mtime_ns])
    note = state_dir("cache", "index") / f"{same[:32]}.fingerprint"
    if not note.exists():
        write_text(note, manifest.fingerprint(path))
    return note.read_text(encoding="utf-8")


def build(path: Path, folder: Path, fingerprint: str) -> None:
    """Write the index of a manifest into ``folder``, whole or not at all, in memory of a few million rows."""
    rows = manifest.check(path).num_rows
    # paths and hashes as they are, 20 bytes of numbers a row
    need_disk(folder.parent, rows * (20 + 64 + 8) + 2 * path.stat().st_size, "the index of the rows")
    splits, sources = _Codes(manifest.SPLITS), _Codes(manifest.SOURCES)
    with atomic_path(folder) as partial, progress.task("indexing rows", rows) as task:
        partial.mkdir()
        labels = _array(partial / "labels.npy", rows, np.int32)
        split_codes = _array(partial / "splits.npy", rows, np.int8)
        source_codes = _array(partial / "sources.npy", rows, np.int8)
        done = 0
        with (
            manifest.whole(path),
            pq.ParquetFile(path, pre_buffer=False) as file,
            pa.OSFile(str(partial / TEXT), "wb") as sink,
            pa.ipc.new_file(sink, TEXT_SCHEMA) as text,
        ):
            for batch in _blocks(file.iter_batches(BLOCK, columns=COLUMNS)):
                here = slice(done, done + len(batch))
                labels[here] = batch.column("label").to_numpy()
                split_codes[here] = splits(batch.column("split"))
                source_codes[here] = sources(batch.column("source"))
                text.write_batch(_text(batch))
                done += len(batch)
                task.advance(len(batch))
        for code, name in enumerate(splits.names):
            np.save(partial / f"rows-{name}.npy", _rows_of(split_codes, code))
        names = {"fingerprint": fingerprint, "splits": splits.names, "sources": sources.names}
        write_json(partial / HEAD, {"version": VERSION, "rows": rows, **names})
        del labels, split_codes, source_codes  # written back before the folder gets its name
        seals.write(partial / SEAL, [file for file in partial.iterdir() if file.is_file()], sampled=True)


class _Codes:
    """Small numbers for the few names of a column; new names follow those that are known."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)

    def __call__(self, column: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.int8]:
        encoded = pc.dictionary_encode(
            column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        )
        found = encoded.dictionary.to_pylist()
        self.names += [name for name in found if name not in self.names]
        if len(self.names) > MOST_NAMES:
            raise RetortError(f"manifest: more than {MOST_NAMES} splits or sources: {self.names[MOST_NAMES]}")
        code = np.array([self.names.index(name) for name in found], np.int8)
        return code[encoded.indices.to_numpy()]


def _blocks(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows, BLOCK in each batch but the last."""
    held: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        while rows + len(batch) >= BLOCK:
            first = batch.slice(0, BLOCK - rows)
            yield pa.concat_batches([*held, first]) if held else first
            batch, held, rows = batch.slice(BLOCK - rows), [], 0
        if len(batch):
            held.append(batch)
            rows += len(batch)
    if held:
        yield pa.concat_batches(held)


def _text(batch: pa.RecordBatch) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([batch.column(name) for name in TEXT_SCHEMA.names], schema=TEXT_SCHEMA)


def _rows_of(codes: npt.NDArray[np.int8], code: int) -> npt.NDArray[np.int32]:
    """Where a code stands, int32; block by block, so that no array of 8 bytes a row is made."""
    found = [np.empty(0, np.int32)]
    for start in range(0, len(codes), BLOCK):
        found.append((np.flatnonzero(codes[start : start + BLOCK] == code) + start).astype(np.int32))
    return np.concatenate(found)


def _array(path: Path, rows: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A new .npy file to fill; one without entries cannot be mapped and is written at once."""
    if not rows:
        np.save(path, np.empty(0, dtype))
        return np.empty(0, dtype)
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=(rows,))


def _mapped(path: Path) -> npt.NDArray[Any]:
    """A .npy file, read where it is looked at; one without entries cannot be mapped."""
    empty = path.stat().st_size <= np.lib.format.ARRAY_ALIGN * 2
    return np.load(path, mmap_mode=None if empty else "r")

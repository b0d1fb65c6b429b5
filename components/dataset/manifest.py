"""The manifest: one row an image, as Parquet. What ingest writes and every later step reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.common.errors import RetortError
from components.common.storage import atomic_path

if TYPE_CHECKING:
    from components.tracking.tracker import Tracker

SCHEMA_VERSION = 1
SPLITS = ("train", "val", "test", "unlabeled")
SOURCES = ("real", "synthetic", "semi_synthetic")
ROW_GROUP = 1 << 20  # rows
UNLABELED = -1  # the label of rows in the split ``unlabeled``

SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("class_name", pa.string()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("group", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("bytes", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field("phash", pa.uint64()),
    ],
    metadata={"schema_version": str(SCHEMA_VERSION)},
)


def write(table: pa.Table, path: Path) -> None:
    """Write a manifest, whole or not at all: the same rows give the same bytes."""
    write_all(table.cast(SCHEMA).to_batches() or [SCHEMA.empty_table()], path)


def write_all(portions: Iterable[pa.RecordBatch | pa.Table], path: Path) -> None:
    """``write`` for rows that come in portions of SCHEMA: however they are cut, the bytes are the same.

    A row group is compressed while the next portions are made; two of them are in memory.
    """
    with (
        atomic_path(path) as partial,
        pq.ParquetWriter(partial, SCHEMA, compression="zstd") as writer,
        ThreadPoolExecutor(1) as aside,
    ):
        writing: Future[None] | None = None
        for group in _row_groups(portions):
            if writing:
                writing.result()
            writing = aside.submit(writer.write_table, group, ROW_GROUP)
        if writing:
            writing.result()


def _row_groups(portions: Iterable[pa.RecordBatch | pa.Table]) -> Iterator[pa.Table]:
    """The rows again, ROW_GROUP at a time, each in one chunk; an empty table when there are none."""
    held: list[pa.Table] = []
    rows = groups = 0
    for portion in portions:
        table = pa.Table.from_batches([portion]) if isinstance(portion, pa.RecordBatch) else portion
        while rows + table.num_rows >= ROW_GROUP:
            yield pa.concat_tables([*held, table.slice(0, ROW_GROUP - rows)]).combine_chunks()
            groups += 1
            table = table.slice(ROW_GROUP - rows)
            held, rows = [], 0
        if table.num_rows:
            held.append(table)
            rows += table.num_rows
    if held or not groups:
        yield pa.concat_tables(held or [SCHEMA.empty_table()]).combine_chunks()


def check(path: Path) -> pq.FileMetaData:
    """The Parquet metadata of a manifest, from its footer alone.

    Raises:
        RetortError: naming the file and the column at fault, when it is no manifest of ours.
    """
    try:
        metadata = pq.read_metadata(path)
    except FileNotFoundError:
        raise RetortError(f"{path}: no such file; run 'retort ingest' first") from None
    except (pa.ArrowException, OSError) as error:
        raise RetortError(f"{path}: not a Parquet file ({_first_line(error)}); {remake(path)}") from None
    schema = metadata.schema.to_arrow_schema()
    version = (schema.metadata or {}).get(b"schema_version", b"1").decode("ascii", "replace")
    if not version.isdecimal() or int(version) > SCHEMA_VERSION:
        raise RetortError(f"{path}: schema_version {version} is not {SCHEMA_VERSION} or older")
    for field in SCHEMA:
        if field.name not in schema.names:
            raise RetortError(f"{path}: column '{field.name}' is missing; see the manifest's schema")
        if schema.field(field.name).type != field.type:
            raise RetortError(
                f"{path}: column '{field.name}' is {schema.field(field.name).type}, expected {field.type}"
            )
    return metadata


def read(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a manifest, or some of its columns.

    Raises:
        RetortError: naming the file and the column at fault, when it is no manifest of ours.
    """
    check(path)
    with whole(path):
        return pq.read_table(path, columns=columns or SCHEMA.names)


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """Name the file when rows cannot be read though its footer could: Arrow's errors do not.

    Raises:
        RetortError: with the step that makes it anew.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise RetortError(f"{path}: damaged ({_first_line(error)}); {remake(path)}") from None


def _first_line(error: Exception) -> str:
    said = next(iter(str(error).splitlines()), type(error).__name__)[:160]
    return "".join(letter if letter.isprintable() else "?" for letter in said)


def remake(path: Path) -> str:
    """How to get a damaged manifest again."""
    step = {"manifest": "retort ingest", "clean": "retort validate"}.get(path.stem)
    return f"'{step}' makes it anew" if step else "restore it, or make it anew"


def class_names(table: pa.Table) -> list[str]:
    """Names by label, ``0 .. highest label``; a label without rows is called by its number."""
    names = names_by_label(table)
    return [names.get(label, str(label)) for label in range(max(names, default=-1) + 1)]


def names_by_label(table: pa.Table) -> dict[int, str]:
    """The names of labels that occur; a class without a name is called by its number."""
    pairs = table.select(["label", "class_name"]).group_by(["label", "class_name"]).aggregate([])
    return {
        label: name or str(label)
        for label, name in zip(pairs["label"].to_pylist(), pairs["class_name"].to_pylist(), strict=True)
        if label >= 0
    }


def fingerprint(path: Path) -> str:
    """The data fingerprint: sha256 over path, label, split, source and content hash of every row in order.

    Each column is hashed by itself, values and lengths apart, so that it is one pass over Arrow's buffers
    and does not depend on how the file is cut into row groups.
    """
    names = ["path", "label", "split", "source", "sha256"]
    digests = {name: (hashlib.sha256(), hashlib.sha256()) for name in names}
    rows = 0
    with whole(path), pq.ParquetFile(path, pre_buffer=False) as file:
        for batch in file.iter_batches(columns=names):
            rows += len(batch)
            for name, (values, lengths) in digests.items():
                column = batch.column(name)
                if pa.types.is_string(column.type):
                    lengths.update(_bytes(pc.fill_null(pc.binary_length(column), -1)))
                    values.update(_characters(column))
                else:
                    lengths.update(_bytes(pc.is_valid(column).cast(pa.int32())))
                    values.update(_bytes(pc.fill_null(column, 0)))
    parts = [digest.digest() for pair in digests.values() for digest in pair]
    return hashlib.sha256(b"".join([rows.to_bytes(8, "little"), *parts])).hexdigest()


def record_use(tracker: Tracker, name: str, path: Path, *splits: str) -> None:
    """Record in the step's run that it reads these splits of a manifest (all of them when none is named)."""
    counts = pc.value_counts(read(path, ["split"])["split"]).to_pylist()
    rows = {str(one["values"]): int(one["counts"]) for one in counts}
    tracker.dataset(name, fingerprint(path), path, {split: rows.get(split, 0) for split in splits or SPLITS})


def _bytes(column: pa.Int32Array) -> bytes:
    return np.asarray(column, "<i4").tobytes()


def _characters(column: pa.StringArray) -> memoryview:
    """The bytes of all strings, one after the other."""
    filled = pc.fill_null(column, "") if column.null_count else column
    _, offsets, data = filled.buffers()
    if data is None:
        return memoryview(b"")
    places = np.frombuffer(offsets, np.int32)[filled.offset : filled.offset + len(filled) + 1]
    return memoryview(data)[int(places[0]) : int(places[-1])]


def image_path(root: str | Path, path: str) -> str:
    """Where the image of a manifest's ``path`` lies: below ``root``, or the URI itself."""
    if "://" in path:
        return path
    import os

    return os.path.join(str(root), os.fsdecode(unquote_to_bytes(path)) if "%" in path else path)

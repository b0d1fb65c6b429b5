"""Recorded requests: files of a folder, bytes in Parquet, objects of a bucket; read in chunks, in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.common.errors import ConfigError, ImageError, RetortError
from components.common.object_store import split
from components.common.storage import sha256_json
from components.dataset import images, manifest, s3
from components.dataset.params import Data
from components.dataset.sources.found import encode

CHUNK = 512  # requests whose answers are kept together: what an interruption costs
NAMES = ("name", "path", "request", "request_id", "id", "file", "filename", "key", "uri")  # of a request
CONTENTS = ("bytes", "image", "content", "body", "data", "request")  # where several columns hold bytes


@dataclass(frozen=True)
class Request:
    """``content`` reads the bytes that were sent; it raises ImageError where there are none."""

    number: int
    name: str
    content: Callable[[], bytes]


Rows = list[tuple[str, Callable[[], bytes]]]  # names, and what reads their bytes


@dataclass(frozen=True)
class Piece:
    """Requests that are read one after the other; ``read`` is given the chunks of them that are wanted."""

    count: int
    read: Callable[[Container[int]], Iterator[tuple[int, Rows]]]

    @property
    def chunks(self) -> int:
        return -(-self.count // CHUNK)


@dataclass(frozen=True)
class Requests:
    """All of them. ``key`` changes when they do."""

    pieces: list[Piece]
    key: str

    @property
    def count(self) -> int:
        return sum(piece.count for piece in self.pieces)

    @property
    def chunks(self) -> int:
        return sum(piece.chunks for piece in self.pieces)

    def read(self, wanted: Container[int]) -> Iterator[tuple[int, list[Request]]]:
        """The chunks whose number is in ``wanted``, in order; a chunk never reaches over two pieces."""
        chunk, number = 0, 0
        for piece in self.pieces:
            inside = [index for index in range(piece.chunks) if chunk + index in wanted]
            if inside:
                for index, rows in piece.read(inside):
                    start = number + index * CHUNK
                    yield chunk + index, [Request(start + at, *row) for at, row in enumerate(rows)]
            chunk += piece.chunks
            number += piece.count

    def some(self, numbers: Sequence[int]) -> dict[int, Request]:
        """Those with these numbers, each in its own time again."""
        places = self._chunks_of(numbers)
        wanted = set(numbers)
        return {
            request.number: request
            for _, requests in self.read(places)
            for request in requests
            if request.number in wanted
        }

    def _chunks_of(self, numbers: Sequence[int]) -> set[int]:
        found = set()
        chunk, first = 0, 0
        for piece in self.pieces:
            inside = (number - first for number in numbers if first <= number < first + piece.count)
            found |= {chunk + number // CHUNK for number in inside}
            chunk += piece.chunks
            first += piece.count
        return found


def find(places: Sequence[str], data: Data, column: str = "") -> Requests:
    """The requests at these places: files, folders, Parquet files, ``s3://`` prefixes or objects.

    Every file of a folder is a request, whatever it is called, but for hidden ones: what is no image is
    counted as such.

    Args:
        data: where a manifest's images lie (``root``), and which store holds a bucket (``s3``).
        column: of Parquet, that holds the bytes; empty: the only one that can.

    Raises:
        RetortError: when a place is missing or empty, or a store does not answer.
        ConfigError: when no column, or more than one, may be meant.
    """
    pieces: list[Piece] = []
    identity: list[Any] = [CHUNK, column]
    for place in places:
        found = _bucket(place, data) if place.startswith("s3://") else _files(Path(place))
        if not found:
            raise RetortError(f"{place}: no request in there")
        plain = [(name, stamp, read) for name, stamp, read, table in found if table is None]
        if plain:
            rows = [(name, read) for name, _, read in plain]
            pieces.append(Piece(len(rows), partial(_listed, rows)))
        for name, _, _, table in found:
            if table is not None:
                pieces += _parquet(table(), name, column, data)
        identity += [(name, stamp) for name, stamp, _, _ in found]
    if not sum(piece.count for piece in pieces):
        raise RetortError(f"{', '.join(places)}: no request in there")
    return Requests(pieces, sha256_json(identity))


# a name, what changes with the content, what reads it, and what fetches it where it is a table
_Found = tuple[str, Any, Callable[[], bytes], Callable[[], Path] | None]


def _files(place: Path) -> list[_Found]:
    if place.is_dir():
        files = sorted(
            file
            for file in place.rglob("*")
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(place).parts)
        )
    elif place.is_file():
        files = [place]
    else:
        raise RetortError(f"{place}: no such file or folder")
    found: list[_Found] = []
    for file in files:
        status = file.stat()
        table = (lambda file=file: file) if file.suffix == ".parquet" else None
        read = partial(_content, file)
        found.append((encode(os.fsencode(file)), [status.st_size, status.st_mtime_ns], read, table))
    return found


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ImageError("image.unreadable", (error.strerror or str(error)).lower()) from None


def _bucket(uri: str, data: Data) -> list[_Found]:
    bucket, _ = split(uri)
    s3.remember_store(bucket, data.s3)

    def table(uri: str, etag: str) -> Path:
        s3.fetch(uri, etag)
        return s3.cached(uri)

    found: list[_Found] = []
    alone = [s3.Item(uri, uri, 0, etag) for etag in s3.etags([uri]).values()]
    for item in alone if uri.endswith(".parquet") else s3.listing(uri):
        fetch = partial(table, item.uri, item.etag) if item.key.endswith(".parquet") else None
        found.append((item.uri, item.etag, partial(s3.read, item.uri), fetch))
    return found


def _listed(rows: Rows, wanted: Container[int]) -> Iterator[tuple[int, Rows]]:
    for chunk in range(-(-len(rows) // CHUNK)):
        if chunk in wanted:
            yield chunk, rows[chunk * CHUNK : (chunk + 1) * CHUNK]


# --- Parquet -----------------------------------------------------------------------------------------------


def _parquet(place: Path, name: str, column: str, data: Data) -> list[Piece]:
    """One piece for each row group, which is the least that can be read alone."""
    try:
        with pq.ParquetFile(place) as file:
            schema = file.schema_arrow
            counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        raise RetortError(f"{name}: not a Parquet file ({str(error).splitlines()[0]})") from None
    holding = [field.name for field in schema if _holds_bytes(field.type)]
    if not column and not holding and {"path", "sha256", "split"} <= set(schema.names):
        manifest.check(place)
        reads = [partial(_manifest_rows, place, group, data.root) for group in range(len(counts))]
        return [Piece(count, read) for count, read in zip(counts, reads, strict=True)]
    if column and column not in holding:
        raise ConfigError(
            f"--column {column}: {name} has no such column of bytes; it has {', '.join(holding) or 'none'}"
        )
    known = [found for found in CONTENTS if found in holding]
    if not column and len(holding) != 1 and len(known) != 1:
        raise ConfigError(
            f"{name}: which column holds the requests? --column names one of "
            f"{', '.join(holding) or 'them, but none holds bytes'}"
        )
    chosen = column or (holding[0] if len(holding) == 1 else known[0])
    texts = [
        found for found in NAMES if found in schema.names and pa.types.is_string(schema.field(found).type)
    ]
    called = next((found for found in texts if found != chosen), "")
    reads = [
        partial(_rows, place, name, group, chosen, called, sum(counts[:group]))
        for group in range(len(counts))
    ]
    return [Piece(count, read) for count, read in zip(counts, reads, strict=True)]


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether it holds bytes, or a struct of ``bytes`` and more, as Hugging Face's data sets keep images."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _batches(place: Path, group: int, columns: list[str]) -> Iterator[list[dict[str, Any]]]:
    """The rows of a row group, ``CHUNK`` at a time."""
    kept: list[dict[str, Any]] = []
    with pq.ParquetFile(place) as file:
        for batch in file.iter_batches(CHUNK, [group], columns):
            kept += batch.to_pylist()
            while len(kept) >= CHUNK:
                yield kept[:CHUNK]
                del kept[:CHUNK]
    if kept:
        yield kept


def _rows(
    place: Path, name: str, group: int, column: str, called: str, before: int, wanted: Container[int]
) -> Iterator[tuple[int, Rows]]:
    columns = [column, *([called] if called else [])]
    try:
        for chunk, rows in enumerate(_batches(place, group, columns)):
            if chunk in wanted:
                first = before + chunk * CHUNK
                yield (
                    chunk,
                    [
                        (
                            (row[called] if called else None) or f"{name}#{first + at}",
                            partial(_given, row[column]),
                        )
                        for at, row in enumerate(rows)
                    ],
                )
    except (pa.ArrowException, OSError) as error:
        raise RetortError(
            f"{name}: row group {group} cannot be read ({str(error).splitlines()[0]}); the file is damaged"
        ) from None


def _given(value: Any) -> bytes:
    content = value.get("bytes") if isinstance(value, dict) else value
    if content is None:
        raise ImageError("image.unreadable", "the request has no content")
    return content


def _manifest_rows(place: Path, group: int, root: str, wanted: Container[int]) -> Iterator[tuple[int, Rows]]:
    for chunk, rows in enumerate(_batches(place, group, ["path"])):
        if chunk in wanted:
            yield chunk, [(row["path"], partial(images.read_bytes, root, row["path"])) for row in rows]

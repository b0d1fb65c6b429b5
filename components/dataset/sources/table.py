"""A manifest that is there already, ``manifest.parquet``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.common.errors import RetortError
from components.dataset import manifest
from components.dataset.columns import Columns, by_value, equals, kept, matches
from components.dataset.params import IngestParams
from components.dataset.sources.found import (
    ALIASES,
    FOUND,
    HIGHEST_LABEL,
    PORTION,
    Found,
    Reader,
    Rejected,
    matcher,
)

TEXT = pa.string()


@dataclass
class Table(Found):
    """A manifest's rows, which are read from its file a portion at a time."""

    file: Path = Path()
    unlabeled: re.Pattern[str] | None = None

    def portions(self, names: Sequence[str] = FOUND.names) -> Iterator[tuple[Columns, Rejected]]:
        yield from _rows(self.file, names, self.unlabeled)


def read(params: IngestParams) -> Found:
    """An existing manifest: ``path`` and ``label`` must be there, the other columns may.

    Raises:
        RetortError: naming the column that is missing or of another kind.
    """
    data, path = params.data, Path(str(params.data.source))
    with _open_table(path) as file:
        names = file.schema_arrow.names
        for name in ("path", "label"):
            if name not in names:
                raise RetortError(
                    f"{path}: column '{name}' is missing (found: {', '.join(names[:12]) or 'none'})"
                )
        for name in (name for name in manifest.SCHEMA.names if name in names):
            _cast(path, name, pa.array([], file.schema_arrow.field(name).type))
        if not file.metadata.num_rows:
            raise RetortError(f"{path}: the table has no rows; check data.source")
    return Table(file=path, unlabeled=matcher(data.unlabeled))


def _open_table(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, pre_buffer=False)  # reading ahead would hold a gigabyte more
    except (pa.ArrowInvalid, OSError) as error:
        raise RetortError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None


def _cast(path: Path, name: str, column: pa.Array) -> pa.Array:
    wanted = FOUND.field(name).type
    try:
        return column.cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise RetortError(
            f"{path}: column '{name}' is {column.type}, expected {wanted} ({str(error).splitlines()[0]})"
        ) from None


def _rows(
    path: Path, names: Sequence[str], unlabeled: re.Pattern[str] | None
) -> Iterator[tuple[Columns, Rejected]]:
    needed = {"path", "label", "split", "source", *names} - {"below"}
    start = 0
    with _open_table(path) as file:
        there = [name for name in FOUND.names if name in needed and name in file.schema_arrow.names]
        for batch in file.iter_batches(PORTION, columns=there):
            labels = batch.column("label")
            columns = {
                name: _cast(path, name, _in_range(labels) if name == "label" else batch.column(name))
                for name in there
            }
            for name in needed.difference(there):
                columns[name] = pa.nulls(len(batch), FOUND.field(name).type)
            columns["split"] = by_value(columns["split"], lambda text: ALIASES.get(text.lower(), text), TEXT)
            usable, rejected = _judged(path, columns, labels, start, unlabeled)
            usable["below"] = usable["path"]
            yield {name: usable[name] for name in names}, rejected
            start += len(batch)


def _in_range(labels: pa.Array) -> pa.Array:
    """Labels, null where an integer is none: beyond HIGHEST_LABEL, or below int32."""
    kind = labels.type
    if not pa.types.is_integer(kind) or kind.bit_width < 32:
        return labels
    beyond = pc.greater(labels, pa.scalar(HIGHEST_LABEL, kind))
    if pa.types.is_signed_integer(kind) and kind.bit_width > 32:
        beyond = pc.or_(beyond, pc.less(labels, pa.scalar(-(2**31), kind)))
    return pc.if_else(beyond, pa.scalar(None, kind), labels) if pc.any(beyond).as_py() else labels


def _judged(
    file: Path, columns: Columns, labels: pa.Array, start: int, unlabeled: re.Pattern[str] | None
) -> tuple[Columns, Rejected]:
    """The rows that can be used, and why each other one cannot.

    ``labels`` as the file has them, before ``_in_range``; ``start`` is the first row's number.
    """
    path, label, split, source = (columns[name] for name in ("path", "label", "split", "source"))
    no_path = pc.fill_null(pc.equal(path, ""), True)
    foreign = pc.and_(pc.match_substring(path, "://"), pc.invert(pc.starts_with(path, "s3://")))
    foreign = pc.fill_null(foreign, False)
    free = equals(split, "unlabeled")
    no_label = pc.and_(pc.fill_null(pc.less(label, 0), True), pc.invert(free))
    if unlabeled and pc.any(no_label).as_py():
        no_label = pc.and_(no_label, pc.invert(matches(unlabeled, pc.fill_null(path, ""))))
    no_split = pc.and_(split.is_valid(), pc.invert(pc.is_in(split, pa.array(manifest.SPLITS))))
    no_source = pc.and_(source.is_valid(), pc.invert(pc.is_in(source, pa.array(manifest.SOURCES))))
    bad = pc.or_(pc.or_(pc.or_(no_path, foreign), no_label), pc.or_(no_split, no_source))
    places = np.flatnonzero(bad)
    if not len(places):
        return columns, []
    rejected = []
    for place in places.tolist():
        where = f"{file}, row {start + place + 1}: {path[place]}"
        if no_path[place].as_py():
            rejected.append((where, "the path is missing"))
        elif foreign[place].as_py():
            rejected.append((where, "only files and s3:// can be read"))
        elif no_split[place].as_py():
            rejected.append((where, f"the split '{split[place]}' is unknown"))
        elif no_source[place].as_py():
            rejected.append((where, f"the source '{source[place]}' is unknown"))
        elif labels[place].is_valid and not label[place].is_valid:
            rejected.append((where, f"the label {labels[place]} is out of range"))
        else:
            rejected.append((where, "the label is missing or negative"))
    return kept(columns, pc.invert(bad)), rejected


READER = Reader(
    lambda source: isinstance(source, str) and source.endswith(".parquet") and Path(source).exists(), read
)

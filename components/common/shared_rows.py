"""Rows of a SQLite cache that steps on several machines add to, in the place of ``components.common.shared``.

SQLite is not safe on a network file system, and one object that all rewrite would keep the rows of the last
writer only. So each writer puts its new rows into Parquet files of its own, and a reader takes the union.
"""

from __future__ import annotations

import sqlite3
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.common import shared
from components.common.object_store import MissingError, Storage

FOLDER = "rows"
MANY = 64  # files of few rows, from which on a reader makes one of them
FEW = 100_000  # rows
READ_SECONDS = 600.0  # for all files of a table


class SharedRows:
    """The table ``table`` of a cache, whose first column is its key, shared under ``name``."""

    def __init__(self, name: str, table: str, columns: Sequence[str]) -> None:
        self._folder = f"{FOLDER}/{name}"
        self._table, self._columns = table, list(columns)

    def pull(self, cache: sqlite3.Connection) -> None:
        """Add to the cache what others have put there since the last time."""
        place = shared.place()
        if place is None:
            return
        with cache:
            cache.execute(
                "create table if not exists merged (place text, name text, primary key (place, name))"
            )
        rows = cache.execute("select name from merged where place = ?", (place.uri,))
        there = {name for (name,) in rows}
        with tempfile.TemporaryDirectory(prefix="rows-") as folder:

            def fetch(storage: Storage) -> list[tuple[str, Path]]:
                names = list(storage.list(self._folder))
                found = []
                for number, name in enumerate(name for name in names if name not in there):
                    file = Path(folder) / f"{number}.parquet"
                    try:
                        storage.get(name, file)
                    except MissingError:  # another has just made one of many
                        continue
                    found.append((name, file))
                return found

            for name, file in place.attempt(fetch, READ_SECONDS) or []:
                with cache:
                    self._insert(cache, file)
                    cache.execute("insert or ignore into merged values (?, ?)", (place.uri, name))
            place.attempt(self._make_fewer, READ_SECONDS)

    def push(self, rows: Sequence[Sequence[Any]]) -> None:
        """Let others have new rows, each as the cache's table has it."""
        place = shared.place()
        if place is None or not rows:
            return
        import pyarrow as pa

        values = dict(zip(self._columns, map(list, zip(*rows, strict=True)), strict=True))
        table = pa.table(values)
        place.attempt(lambda storage: self._put(storage, table))

    def _put(self, storage: Storage, table: Any) -> None:
        import pyarrow.parquet as pq

        with tempfile.TemporaryDirectory(prefix="rows-") as folder:
            file = Path(folder) / "rows.parquet"
            pq.write_table(table, file, compression="zstd")
            storage.put(file, f"{self._folder}/{table.num_rows}-{uuid.uuid4().hex}.parquet")

    def _insert(self, cache: sqlite3.Connection, file: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        marks = ",".join("?" * len(self._columns))
        try:
            with pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(10_000, columns=self._columns):
                    columns = [column.to_pylist() for column in batch.columns]
                    cache.executemany(
                        f"insert or ignore into {self._table} values ({marks})",  # noqa: S608 - our own names
                        zip(*columns, strict=True),
                    )
        except pa.ArrowException:  # damaged, or of other columns: its rows are made again
            return

    def _make_fewer(self, storage: Storage) -> None:
        """Put many small files together. What two readers do at once stands there twice, and does no harm."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        small = [name for name in storage.list(self._folder) if _rows(name) < FEW]
        if len(small) < MANY:
            return
        with tempfile.TemporaryDirectory(prefix="rows-") as folder:
            tables, names = [], []
            for number, name in enumerate(small):
                file = Path(folder) / f"{number}.parquet"
                try:
                    storage.get(name, file)
                    tables.append(pq.read_table(file))
                except (MissingError, pa.ArrowException):
                    continue
                names.append(name)
            if len(names) < MANY:
                return
            self._put(storage, pa.concat_tables(tables, promote_options="permissive"))
        for name in names:  # the whole is there by now
            storage.discard(name)


def _rows(name: str) -> int:
    """How many rows a file says that it has."""
    count = name.rpartition("/")[2].partition("-")[0]
    return int(count) if count.isdigit() else FEW

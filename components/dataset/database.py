"""DuckDB for tables that are larger than memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from components.common.environment import cores
from components.common.errors import RetortError
from components.common.signals import stopped_by
from components.common.storage import disk_full, state_dir
from components.dataset.manifest import remake

if TYPE_CHECKING:
    import duckdb


@contextmanager
def database(reads: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """An empty database on all cores: at most 2 GB in memory, the rest below ``.retort/``.

    Raises:
        RetortError: naming ``reads``, the manifest that is read with it, when DuckDB cannot.
    """
    import duckdb

    with duckdb.connect() as db:
        db.execute(f"set threads = {cores()}")
        db.execute("set memory_limit = '2GB'")
        db.execute(f"set temp_directory = '{state_dir('cache', 'duckdb')}'")
        db.execute("set enable_progress_bar = false")
        try:
            yield db
        except duckdb.Error as error:
            if stopped_by(error) is not None or disk_full(error):
                raise
            said = next(iter(str(error).splitlines()), type(error).__name__)
            said = "".join(letter if letter.isprintable() else "?" for letter in said)[:160]
            raise RetortError(f"{reads}: damaged, or no room for it ({said}); {remake(reads)}") from error

"""DuckDB for tables that are larger than memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from components.common.storage import state_dir

if TYPE_CHECKING:
    import duckdb


@contextmanager
def database() -> Iterator[duckdb.DuckDBPyConnection]:
    """An empty database on all cores: at most 2 GB in memory, the rest below ``.retort/``."""
    import duckdb

    with duckdb.connect() as db:
        db.execute(f"set threads = {len(os.sched_getaffinity(0))}")
        db.execute("set memory_limit = '2GB'")
        db.execute(f"set temp_directory = '{state_dir('cache', 'duckdb')}'")
        db.execute("set enable_progress_bar = false")
        yield db

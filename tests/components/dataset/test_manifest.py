"""A damaged manifest is named, and the step that makes it anew, whoever reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.audit import counts
from components.common.errors import RetortError
from components.dataset import manifest, named
from components.dataset.database import database


@pytest.fixture
def damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clean manifest whose footer is whole and whose rows are not."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "clean.parquet"
    rows = {
        "path": [f"{number}.png" for number in range(500)], "label": pa.array([0] * 500, pa.int32()),
        "class_name": ["a"] * 500, "split": ["train"] * 500, "source": ["real"] * 500,
    }  # fmt: skip
    unknown = {name: pa.nulls(500) for name in manifest.SCHEMA.names if name not in rows}
    manifest.write(pa.table({**rows, **unknown}).select(manifest.SCHEMA.names), path)
    content = bytearray(path.read_bytes())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[4:footer] = bytes(byte ^ 0x5A for byte in content[4:footer])
    path.write_bytes(content)
    assert pq.read_metadata(path).num_rows == 500
    return path


def with_duckdb(path: Path) -> None:
    with database(path) as db:
        counts.view(db, path)
        db.sql("select path, label, split from m").fetchall()


@pytest.mark.parametrize(
    "read",
    [
        manifest.read,
        manifest.fingerprint,
        lambda path: list(named.find([path], "").decoded()),
        with_duckdb,
    ],
)
def test_it_is_named_with_the_way_out(damaged: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(RetortError) as raised:
        read(damaged)
    said = str(raised.value)
    assert "clean.parquet" in said
    assert "'retort validate'" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no table at all"])
def test_what_is_no_parquet_file_is_named_too(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    path.write_bytes(content)
    with pytest.raises(RetortError, match=r"manifest\.parquet: not a Parquet file .*'retort ingest'"):
        manifest.check(path)

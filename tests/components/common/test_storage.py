"""Files are whole or not there; the lock names its holder."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pytest
from safetensors import SafetensorError

from components.common import storage
from components.common.errors import RetortError


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RETORT_STATE", raising=False)


def test_atomic_path_keeps_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    storage.write_text(target, "old")
    with pytest.raises(ValueError, match="half-way"), storage.atomic_path(target) as partial:
        partial.write_text("ne")
        raise ValueError("half-way")
    assert target.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != ".retort"] == ["a.txt"]


def test_atomic_path_replaces_a_folder_whole(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "stale").write_text("x")
    with storage.atomic_path(target) as partial:
        partial.mkdir()
        (partial / "fresh").write_text("y")
    assert [entry.name for entry in target.iterdir()] == ["fresh"]
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != ".retort"] == ["folder"]


def test_sha256_json_does_not_depend_on_the_order_of_keys() -> None:
    assert storage.sha256_json({"a": 1, "b": 2}) == storage.sha256_json({"b": 2, "a": 1})
    assert storage.sha256_json({"a": 1}) != storage.sha256_json({"a": 2})


def test_read_json_names_the_file(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"a": ')
    with pytest.raises(RetortError, match=r"broken\.json: not valid JSON"):
        storage.read_json(broken)
    with pytest.raises(RetortError, match="no such file"):
        storage.read_json(tmp_path / "none.json")


def test_need_disk_says_what_is_missing(tmp_path: Path) -> None:
    storage.need_disk(tmp_path, 1, "a byte")
    with pytest.raises(RetortError, match=r"the cache needs .* the disk has .* free"):
        storage.need_disk(tmp_path, 10**18, "the cache")


def test_a_second_run_in_the_same_folder_is_refused_with_the_holders_name(tmp_path: Path) -> None:
    code = (
        "import time\n"
        "from components.common.storage import project_lock\n"
        "with project_lock('finetune'):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        expected = rf"'retort finetune' \(process {holder.pid}\) is running"
        with pytest.raises(RetortError, match=expected), storage.project_lock("distill"):
            pass
    finally:
        holder.kill()
        holder.wait()
    # a holder that was killed leaves no lock behind
    for _ in range(50):
        try:
            with storage.project_lock("distill"):
                return
        except RetortError:
            time.sleep(0.1)
    pytest.fail("the lock of a dead process was still held")


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 B"), (999, "999 B"), (19_000_000, "19.0 MB"), (3.2e12, "3.2 TB")]
)
def test_human_bytes(count: float, said: str) -> None:
    assert storage.human_bytes(count) == said


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (sqlite3.OperationalError, "database or disk is full"),
        (duckdb.IOException, 'IO Error: Could not write file "x": No space left on device'),
        (SafetensorError, "Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_known_by_whatever_library_says_it(kind: type[Exception], words: str) -> None:
    assert storage.disk_full(kind(words))
    assert not storage.disk_full(kind("it is not there"))
    wrapped = RuntimeError("the step failed")
    wrapped.__cause__ = kind(words)
    assert storage.disk_full(wrapped)


def test_a_database_without_room_says_so(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "full.db")
    db.execute("pragma max_page_count = 2")
    with pytest.raises(sqlite3.OperationalError) as raised:
        db.executescript("create table a (b); create table c (d); create table e (f);")
    db.close()
    assert storage.disk_full(raised.value)

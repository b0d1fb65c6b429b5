"""The index of a manifest: the manifest's own values, looked up by row, without an object a row."""

import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from components.dataset import manifest
from components.dataset.images import Pin
from components.training.inputs import index as of_index
from components.training.inputs.index import Index, known_fingerprint, open_index

ROWS = 1000


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETORT_STATE", ".retort")


def table(rows: int = ROWS) -> pa.Table:
    """Rows of every kind: with and without a hash, of all splits, in no order."""
    rng = np.random.default_rng(3)
    return pa.Table.from_pylist(
        [
            {
                "path": f"ü/{row % 7}/{row}.jpg",
                "label": -1 if (split := manifest.SPLITS[rng.integers(4)]) == "unlabeled" else row % 5,
                "split": split,
                "source": manifest.SOURCES[rng.integers(3)],
                "bytes": None if row % 11 == 0 else row,
                "sha256": None if row % 13 == 0 else hashlib.sha256(str(row).encode()).hexdigest(),
            }
            for row in range(rows)
        ],
        schema=manifest.SCHEMA,
    )


def same(index: Index, rows: list[dict[str, object]]) -> None:
    assert len(index) == len(rows)
    assert index.labels.tolist() == [row["label"] for row in rows]
    assert [index.split_names[code] for code in index.splits] == [row["split"] for row in rows]
    assert [index.source_names[code] for code in index.sources] == [row["source"] for row in rows]
    for split in (*manifest.SPLITS, "no such split"):
        assert index.rows(split).tolist() == [i for i, row in enumerate(rows) if row["split"] == split]
    for i, row in enumerate(rows):
        assert index.path(i) == row["path"]
        assert index.pin(i) == Pin(row["bytes"], row["sha256"])
    assert index.unpinned().tolist() == [i for i, row in enumerate(rows) if row["sha256"] is None]


def test_an_index_says_what_the_manifest_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_index, "BLOCK", 64)  # many blocks, the last one short
    manifest.write(table(), Path("clean.parquet"))
    index = open_index(Path("clean.parquet"))
    same(index, table().to_pylist())
    assert isinstance(index.labels, np.memmap)
    assert isinstance(index.rows("train"), np.memmap)
    assert index.fingerprint == manifest.fingerprint(Path("clean.parquet"))
    same(pickle.loads(pickle.dumps(index)), table().to_pylist())
    some = {"ü/3/318.jpg", "ü/0/0.jpg", "ü/5/999.jpg", "not there"}
    assert index.find(some).tolist() == [0, 318, 999]
    assert index.find([]).tolist() == []


@pytest.mark.parametrize("rows", [0, 1, ROWS])
def test_an_index_of_a_table_in_memory_is_the_same(rows: int) -> None:
    sliced = pa.concat_tables([table().slice(0, rows // 3), table().slice(rows // 3, rows - rows // 3)])
    index = Index.from_table(sliced)
    same(index, sliced.to_pylist())
    same(pickle.loads(pickle.dumps(index)), sliced.to_pylist())


def test_a_manifest_without_rows_has_an_index(tmp_path: Path) -> None:
    manifest.write(table(0), Path("clean.parquet"))
    same(open_index(Path("clean.parquet")), [])


def test_names_that_the_schema_does_not_know_get_codes_of_their_own() -> None:
    odd = table(3).set_column(4, manifest.SCHEMA.field("source"), pa.array(["drawn", "real", "drawn"]))
    index = Index.from_table(odd)
    assert [index.source_names[code] for code in index.sources] == ["drawn", "real", "drawn"]


def test_an_index_is_built_once_and_a_damaged_one_again(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("clean.parquet")
    manifest.write(table(), path)
    folder = open_index(path).folder
    assert folder is not None
    before = (folder / "seal.json").stat().st_mtime_ns
    assert open_index(path).folder == folder
    assert (folder / "seal.json").stat().st_mtime_ns == before, "found again"
    assert capsys.readouterr().err == ""
    whole = (folder / "labels.npy").read_bytes()
    (folder / "labels.npy").write_bytes(whole[:-4] + b"\7\7\7\7")
    same(open_index(path), table().to_pylist())
    assert "labels.npy is not what was written" in capsys.readouterr().err
    manifest.write(table(ROWS - 1), path)
    assert open_index(path).folder != folder, "other data, another index"


def test_the_fingerprint_is_worked_out_once_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("clean.parquet")
    manifest.write(table(), path)
    first = known_fingerprint(path)
    manifest.write(table(ROWS - 1), path)
    second = known_fingerprint(path)
    assert second == manifest.fingerprint(path) != first, "a manifest that was written anew is looked at"
    monkeypatch.setattr(manifest, "fingerprint", lambda _: pytest.fail("read again"))
    assert known_fingerprint(path) == second


def test_several_processes_build_one_index_together() -> None:
    manifest.write(table(), Path("clean.parquet"))
    code = (
        "import json; from pathlib import Path; from components.training.inputs import index\n"
        "built = []; build = index.build\n"
        "index.build = lambda *given: (built.append(1), build(*given))\n"
        "found = index.open_index(Path('clean.parquet'))\n"
        "print(json.dumps([len(built), found.labels.sum().item()]))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    found = [json.loads(process.communicate(timeout=120)[0]) for process in started]
    assert sum(built for built, _ in found) == 1
    assert {total for _, total in found} == {sum(table()["label"].to_pylist())}

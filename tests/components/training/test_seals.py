"""Seals of caches: what is wrong with a file is found before it is used."""

from pathlib import Path

import pytest

from components.training import seals


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.npy", "b.npy"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    seals.write(tmp_path / "seal.json", [tmp_path / "a.npy", tmp_path / "b.npy"])
    return tmp_path


def test_whole_files_have_no_fault(folder: Path) -> None:
    assert seals.fault(folder / "seal.json", folder) is None


def test_what_is_wrong_is_named(folder: Path) -> None:
    file = folder / "b.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert seals.fault(folder / "seal.json", folder) == "b.npy has 4,999 bytes instead of 5,000"
    file.write_bytes(content[::-1])
    assert seals.fault(folder / "seal.json", folder) == (
        "b.npy is not what was written: its checksum is another"
    )
    file.unlink()
    assert seals.fault(folder / "seal.json", folder) == "b.npy is missing"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": {"a.npy": 3}}', '{"files": []}'])
def test_a_damaged_seal_vouches_for_nothing(folder: Path, content: str) -> None:
    (folder / "seal.json").write_text(content)
    assert seals.fault(folder / "seal.json", folder) == "seal.json is damaged"


def test_a_sample_of_a_large_file_finds_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seals, "BLOCK", 10)
    monkeypatch.setattr(seals, "SAMPLE", 5)
    file = tmp_path / "a.npy"
    file.write_bytes(bytes(range(250)))
    seals.write(tmp_path / "a.json", [file], sampled=True)
    assert seals.checksum(file, sampled=True) != seals.checksum(file), "not all of it is read"
    assert seals.fault(tmp_path / "a.json", tmp_path) is None
    file.write_bytes(bytes(range(200)) + bytes(50))  # as a file with a hole at its end reads
    fault = seals.fault(tmp_path / "a.json", tmp_path)
    assert fault is not None
    assert "checksum" in fault

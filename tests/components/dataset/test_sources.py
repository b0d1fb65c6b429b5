"""What a source leaves out, refuses or loses is the same for every kind of source, and is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto import mock_aws

from components.common import object_store
from components.common.errors import RetortError
from components.common.findings import Finding, read_report
from components.dataset import sources
from components.dataset.params import IngestParams
from components.dataset.sources.folder import DEEPEST, walk
from components.dataset.sources.found import Found, Row
from components.dataset.sources.lists import parse_line
from tests.components.dataset.conftest import Steps, digit, encoded, put

LARGEST = 2**31 - 2


def read(source: Any, root: Path | str = ".", **data: Any) -> Found:
    return sources.read(IngestParams.model_validate({"data": {"source": source, "root": str(root), **data}}))


def other_files() -> dict[str, Finding]:
    report = read_report(Path("outputs/ingest/report.json"))
    return {finding.level: finding for finding in report.findings if finding.rule == "ingest.other_files"}


def bucket(keys: list[str], monkeypatch: pytest.MonkeyPatch) -> Found:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "tests")
    monkeypatch.setattr(object_store, "_clients", {})
    with mock_aws():
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="photos")
        for key in keys:
            client.put_object(Bucket="photos", Key=key, Body=b"")
        return read("s3://photos/.set", s3={"region": "us-east-1"})


def test_a_bucket_leaves_out_what_a_folder_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = [".thumbs/a.png", "a/.cache/a.png", "a/.b.png", "__MACOSX/a/b.png", ".git/config"]
    nameless = ["a//b.png", "/c.png"]
    keys = ["a/a.png", "b/a.GIF", *hidden, *nameless]
    found = bucket([f".set/{key}" for key in keys], monkeypatch)
    assert [(row.path, row.class_name) for row in found.rows] == [
        ("s3://photos/.set/a/a.png", "a"),
        ("s3://photos/.set/b/a.GIF", "b"),
    ]
    why = "a folder in its key has no name"
    assert found.rejected == [("s3://photos/.set//c.png", why), ("s3://photos/.set/a//b.png", why)]
    assert set(found.etags) == {row.path for row in found.rows}
    assert not found.other_files


def test_a_bucket_counts_other_files(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [".set/a/a.png", ".set/a/a.TXT", ".set/b/a.cr2", ".set/b/deep/er/b.cr2", ".set/README"]
    found = bucket(keys, monkeypatch)
    assert found.other_files == {".txt": 1, ".cr2": 2, "": 1}
    assert found.imageless == {"b": {".cr2": 2}}


def test_gif_and_jfif_are_images(photos: Path, steps: Steps) -> None:
    put(photos / "a" / "still.gif", encoded(digit(200), "GIF"))
    put(photos / "b" / "saved.JFIF", encoded(digit(201), "JPEG"))
    rows = {row["path"]: row for row in steps.ingest(str(photos), photos)}
    assert len(rows) == 62
    assert rows["a/still.gif"]["width"] == rows["b/saved.JFIF"]["width"] == 32
    assert not other_files()


def test_other_files_are_told_by_extension(photos: Path, steps: Steps) -> None:
    kinds = {".txt": 7, ".cr2": 6, ".xml": 5, ".json": 4, "": 3, ".csv": 2, ".md": 1}
    for extension, count in kinds.items():
        for number in range(count):
            put(photos / "a" / f"{number}{extension}", b"")
    (photos / "a" / "0.txt").rename(photos / "a" / "0.TXT")
    steps.ingest(str(photos), photos)
    finding = other_files()["info"]
    assert finding.measured == 22
    assert finding.message == (
        "22 files are no images by their name: .txt (7), .xml (5), .json (4), without one (3), .csv (2)."
    )
    finding = other_files()["warning"]
    assert finding.measured == 6
    assert finding.message == "6 images are left out, in formats that are not read: .cr2 (6)."
    assert "Convert them to JPEG or PNG" in finding.advice


def test_a_class_without_one_image_is_a_warning(photos: Path, steps: Steps) -> None:
    for name in "defg":
        put(photos / name / "deep" / "0.cr2", b"")
    put(photos / "d" / "notes.txt", b"")
    put(photos / "a" / "notes.txt", b"")
    put(photos / "README.txt", b"")
    steps.ingest(str(photos), photos)
    assert other_files()["info"].measured == 3
    finding = other_files()["warning"]
    assert (finding.measured, finding.subject) == (4, "d; e; f")
    assert "'d': .cr2 (1), .txt (1); 'e': .cr2 (1); 'f': .cr2 (1)." in finding.message


def test_a_class_without_one_image_in_its_split(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "val", "test")):
        put(tmp_path / "set" / split / "a" / f"{number}.png", b"")
        put(tmp_path / "set" / split / "a" / "notes.txt", b"")
    put(tmp_path / "set/train/b/0.cr2", b"")
    put(tmp_path / "set/unlabeled/b/0.png", b"")
    put(tmp_path / "set/unlabeled/c/0.txt", b"")
    put(tmp_path / "set/papers/licence.pdf", b"")
    put(tmp_path / "set/train/labels.csv", b"")
    found = read(str(tmp_path / "set"), tmp_path / "set")
    assert found.imageless == {"train/b": {".cr2": 1}}
    assert found.other_files == {".txt": 4, ".cr2": 1, ".pdf": 1, ".csv": 1}


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (b"9" * 5_000, "99999999999999999..."),
        (b"-" + b"9" * 5_000, "-9999999999999999..."),
        (b"9" * 20, "9" * 20),
        (b"2147483647", "2147483647"),
        (b"-1", "-1"),
    ],
)
def test_a_label_out_of_range_in_a_list(number: bytes, shown: str) -> None:
    assert parse_line(b"a.png " + number, None, None) == f"the label {shown} is out of range"
    assert parse_line(b"a.png " + number, "unlabeled", None) == Row("a.png", "a.png", split="unlabeled")


@pytest.mark.parametrize("number", [b"+%d" % LARGEST, b"0" * 5_000 + b"%d" % LARGEST])
def test_the_largest_label_of_a_list(number: bytes) -> None:
    assert parse_line(b"a.png " + number, None, None) == Row("a.png", "a.png", label=LARGEST)


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        (pa.int32(), [2**31 - 1]),
        (pa.uint32(), [2**31 - 1, 2**32 - 1]),
        (pa.int64(), [2**31 - 1, 2**31, 2**63 - 1, -(2**31) - 1, -(2**63)]),
        (pa.uint64(), [2**31 - 1, 2**63, 2**64 - 1]),
    ],
)
def test_a_label_out_of_range_in_a_manifest(kind: pa.DataType, numbers: list[int], tmp_path: Path) -> None:
    labels = pa.array([0, *numbers, LARGEST, None, numbers[-1]], kind)
    paths = [f"{number}.png" for number in range(len(labels))]
    splits = [None] * (len(labels) - 1) + ["unlabeled"]
    file = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"path": paths, "label": labels, "split": splits}), file)
    ((columns, rejected),) = read(str(file)).portions(["path", "label"])
    assert columns["path"].to_pylist() == [paths[0], paths[-3], paths[-1]]
    assert columns["label"].to_pylist()[:2] == [0, LARGEST]
    assert columns["label"].type == pa.int32()
    reasons = [f"the label {number} is out of range" for number in numbers]
    assert [why for _, why in rejected] == [*reasons, "the label is missing or negative"]
    assert rejected[0][0] == f"{file}, row 2: 1.png"


def test_a_label_out_of_range_ends_no_ingest(steps: Steps, tmp_path: Path) -> None:
    labels = [number % 2 for number in range(40)]
    table = {
        "path": [f"{number:02d}.png" for number in range(41)],
        "label": pa.array([*labels, 2**40], pa.int64()),
        "sha256": [f"{number:08x}" * 8 for number in range(0, 41 * 10**8, 10**8)],
    }
    pq.write_table(pa.table(table), tmp_path / "mine.parquet")
    assert len(steps.ingest(str(tmp_path / "mine.parquet"), ".")) == 40
    assert (
        "the label 1099511627776 is out of range (1)" in steps.findings("ingest")["ingest.rejected"].message
    )


def test_a_link_to_a_folder_above_the_source_is_no_class(tmp_path: Path) -> None:
    place = tmp_path / "shelf" / "photos"
    for name in "ab":
        put(place / name / "0.png", b"")
    put(tmp_path / "shelf" / "private" / "0.png", b"")
    (place / "loop").symlink_to("..", target_is_directory=True)
    (place / "a" / "all").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "linked").symlink_to(place, target_is_directory=True)
    for root in (place, tmp_path / "linked"):
        found = read(str(root), root)
        assert [row.path for row in found.rows] == ["a/0.png", "b/0.png"]
        why = "a link back to a folder above it"
        assert found.rejected == [("a/all", why), ("loop", why)]


def test_how_deep_the_source_lies_takes_nothing_from_the_depth_below_it(tmp_path: Path) -> None:
    place = tmp_path / "/".join("d" * DEEPEST)
    inside = "/".join("e" * (DEEPEST - 1))
    put(place / inside / "0.png", b"")
    lost: sources.Rejected = []
    assert list(walk(bytes(place), lost)) == [f"{inside}/0.png".encode()]
    assert not lost


def test_a_bucket_of_nameless_folders_alone_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found = bucket([".set/a//0.png"], monkeypatch)
    assert not found.rows
    assert len(found.rejected) == 1
    with pytest.raises(RetortError, match="no image below this prefix"):
        bucket([".set/.a/0.png"], monkeypatch)

"""Validate: every planted fault is named by file, every row ends in one place, clean data stays silent."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from components.common.errors import FindingsError, RetortError
from components.common.findings import Finding, read_report
from components.common.storage import sha256_file
from components.dataset import manifest as manifests
from components.dataset import suite
from tests.components.dataset.conftest import Steps, digit, encoded, put, row, write_manifest


def recoded(content: bytes, side: int = 48, quality: int = 85) -> bytes:
    """The same picture as someone else would save it."""
    image = Image.open(io.BytesIO(content)).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return encoded(image, "JPEG", quality=quality)


def bomb(side: int) -> bytes:
    """A small PNG whose header claims ``side`` x ``side`` pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@dataclass
class Planted:
    """A data set with one of each fault, after ingest and validate."""

    manifest: list[dict[str, Any]]
    clean: list[dict[str, Any]]
    quarantine: dict[str, str]  # reason by path
    findings: dict[str, Finding]
    cases: set[tuple[str, str, str]]  # rule, path, other
    report: str

    def of(self, rule: str) -> set[str]:
        """Paths that ``rule`` names."""
        return {path for found, path, _ in self.cases if found == rule}


def plant(root: Path) -> None:
    digits = {number: encoded(digit(number)) for number in range(240)}
    for number, content in digits.items():
        split = (
            "train" if number < 150 else "val" if number < 200 else "test" if number < 220 else "unlabeled"
        )
        folder = root / split if split == "unlabeled" else root / split / "abc"[number % 3]
        put(folder / f"{number:03d}.png", content)
    train = root / "train" / "a"
    # files that cannot be used
    put(train / "truncated.jpg", encoded(digit(300, 200), "JPEG")[:-900])
    put(train / "empty.png", b"")
    put(train / "text.png", b"<html>404 Not Found</html>")
    put(train / "bomb.png", bomb(30_000))
    # files that look odd and are fine
    exif = Image.Exif()
    exif[274] = 6
    put(train / "rotated.jpg", encoded(digit(301), "JPEG", exif=exif))
    frames = [digit(302), digit(303)]
    put(train / "animated.webp", encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    put(train / "cmyk.jpg", encoded(digit(304).convert("CMYK"), "JPEG"))
    deep = np.asarray(digit(305), np.uint16) * 257
    put(train / "deep.png", encoded(Image.fromarray(deep)))
    put(train / "palette.png", encoded(digit(306).convert("P")))
    alpha = digit(307).convert("RGBA")
    put(train / "alpha.png", encoded(alpha))
    put(train / "tiny.png", encoded(digit(308, 4)))
    put(train / "strip.png", encoded(digit(309).resize((400, 12))))
    # copies inside the training split
    put(train / "copy.png", digits[0])
    put(root / "train" / "b" / "torn.png", digits[3])
    put(train / "smaller.jpg", recoded(digits[6], 24, 90))
    put(train / "larger.jpg", recoded(digits[6], 64, 90))
    put(root / "train" / "c" / "torn.jpg", recoded(digits[9]))
    # copies of validation and test images
    put(train / "leak.png", digits[150])
    put(train / "leak.jpg", recoded(digits[153]))
    put(train / "synthetic" / "leak.jpg", recoded(digits[156], 40))
    put(root / "unlabeled" / "leak.png", digits[200])
    put(root / "unlabeled" / "leak.jpg", recoded(digits[203]))
    put(root / "unlabeled" / "twin.jpg", recoded(digits[203]))
    put(root / "val" / "a" / "tested.png", digits[204])
    # nothing to see on any of them, so none is a copy of another
    for split in ("train", "val"):
        for number in range(3):
            grey = np.full((32, 32), 250 + number, np.uint8)
            grey[number, number] = 245 if split == "train" else 244
            put(root / split / "a" / f"flat{number}.png", encoded(Image.fromarray(grey)))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planted]:
    folder = tmp_path_factory.mktemp("planted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("RETORT_RUN", "tests")
        plant(folder / "photos")
        steps = Steps()
        manifest = steps.ingest("photos", "photos", synthetic=["*/*/synthetic/**"])
        quarantine = steps.validate("photos")
        yield Planted(
            manifest,
            steps.rows(steps.clean),
            {row["path"]: row["reason"] for row in quarantine},
            steps.findings("validate"),
            {(row["rule"], row["path"], row["other"]) for row in steps.cases().to_pylist()},
            Path("outputs/validate/report.html").read_text(),
        )


def test_every_row_is_clean_or_in_quarantine(planted: Planted) -> None:
    apart = sorted([row["path"] for row in planted.clean] + list(planted.quarantine))
    assert apart == [row["path"] for row in planted.manifest]
    by_path = {row["path"]: row for row in planted.manifest}
    assert all(row == by_path[row["path"]] for row in planted.clean)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("truncated.jpg", "image.unreadable: OSError: image file is truncated"),
        ("empty.png", "image.unreadable: the file is empty"),
        ("text.png", "image.unreadable: not an image of a known format"),
        ("bomb.png", "image.bomb: "),
    ],
)
def test_what_cannot_be_decoded_is_quarantined_with_the_reason(
    planted: Planted, name: str, reason: str
) -> None:
    assert planted.quarantine[f"train/a/{name}"].startswith(reason)


def test_odd_images_stay_and_are_said(planted: Planted) -> None:
    clean = {row["path"]: row for row in planted.clean}
    for name in ("rotated.jpg", "animated.webp", "cmyk.jpg", "deep.png", "palette.png", "alpha.png"):
        assert (clean[f"train/a/{name}"]["width"], clean[f"train/a/{name}"]["height"]) == (32, 32)
    assert planted.findings["image.exif"].measured == 1
    assert planted.findings["image.frames"].measured == 1
    assert planted.findings["image.mode"].subject == "CMYK, I;16, P, RGBA"
    assert planted.of("image.size") == {"train/a/tiny.png", "train/a/strip.png"}
    assert not planted.of("image.size") & set(planted.quarantine)


def test_copies_within_a_split_are_reported_and_stay(planted: Planted) -> None:
    # of two with the same content, the one further down is called the copy
    assert planted.of("duplicates.exact") == {
        "train/a/copy.png",
        "train/b/torn.png",
        "unlabeled/twin.jpg",
        "val/a/tested.png",
    }
    assert planted.of("duplicates.near") >= {"train/a/smaller.jpg", "train/a/larger.jpg", "train/c/torn.jpg"}
    copies = planted.of("duplicates.exact") | planted.of("duplicates.near")
    assert copies & set(planted.quarantine) == {"unlabeled/twin.jpg"}, "which leaks, too"


def test_one_picture_with_two_labels_is_named_with_both_files(planted: Planted) -> None:
    named = {(path, other) for rule, path, other in planted.cases if rule == "duplicates.labels"}
    assert named == {("train/b/torn.png", "train/a/003.png"), ("train/c/torn.jpg", "train/a/009.png")}
    finding = planted.findings["duplicates.labels"]
    assert (finding.level, finding.measured) == ("warning", 2)
    assert "labels 1 and 0" in finding.message


def test_leakage_takes_the_training_side_away_and_keeps_validation(planted: Planted) -> None:
    exact = {"train/a/leak.png", "unlabeled/leak.png"}
    near = {"train/a/leak.jpg", "train/a/synthetic/leak.jpg", "unlabeled/leak.jpg", "unlabeled/twin.jpg"}
    assert planted.of("leakage.exact") == exact
    assert planted.of("leakage.near") == near
    assert set(planted.quarantine) == exact | near | {
        f"train/a/{name}" for name in ("truncated.jpg", "empty.png", "text.png", "bomb.png")
    }
    assert "(val/a/150.png)" in planted.quarantine["train/a/leak.png"]
    assert planted.findings["leakage.near"].measured == len(near)
    assert "a correction, not a loss" in planted.findings["leakage.near"].advice


def test_the_page_shows_what_was_quarantined(planted: Planted) -> None:
    for title in ("Images per class", "Quarantined images", "Near-duplicates, side by side"):
        assert f"<h2>{title}</h2>" in planted.report


def test_a_clean_data_set_is_silent_and_passes_through(photos: Path, steps: Steps) -> None:
    steps.ingest(str(photos), photos)
    assert steps.validate(photos) == []
    assert steps.findings("validate") == {}
    assert sha256_file(steps.clean) == sha256_file(steps.manifest)
    assert steps.cases().num_rows == 0
    assert "data:image" in Path("outputs/validate/report.html").read_text()
    docs = Path("outputs/validate/data_docs")
    assert "not met" not in (docs / "index.html").read_text()
    for page in docs.rglob("*.html"):
        assert 'src="http' not in page.read_text()
    counts = pq.read_table("outputs/validate/counts.parquet").to_pylist()
    assert sum(row["rows"] for row in counts) == 60
    assert {row["class_name"] for row in counts} == {"a", "b", "c"}


def test_the_same_input_gives_the_same_files(photos: Path, steps: Steps) -> None:
    plant(photos / "more")
    (photos / "more" / "train" / "a" / "bomb.png").rename(photos / "a" / "bomb.png")
    steps.ingest(str(photos), photos)
    names = ["data/clean.parquet", "data/quarantine.parquet"]
    names += [f"outputs/validate/{name}" for name in ("findings.parquet", "counts.parquet", "report.html")]
    hashes = []
    for _ in range(2):
        steps.validate(photos)
        hashes.append([sha256_file(Path(name)) for name in names])
    assert hashes[0] == hashes[1]


def listed(photos: Path, label_of: dict[str, int]) -> str:
    lines = [
        f"{path.relative_to(photos)} {label_of[path.parent.name]}" for path in sorted(photos.rglob("*.png"))
    ]
    put(Path("all.txt"), "\n".join(lines).encode())
    return "all.txt"


def test_labels_that_start_late_and_have_gaps_cost_rows(photos: Path, steps: Steps) -> None:
    steps.ingest(listed(photos, {"a": 2, "b": 3, "c": 9}), photos)
    steps.validate(photos, **{"global": {"class_num": 12}})
    found = steps.findings("validate")
    assert set(found) == {"labels.start", "labels.contiguous", "labels.class_num"}
    assert (found["labels.start"].measured, found["labels.start"].level) == (2, "warning")
    # 2 rows of 1,280 weights and a bias in float32
    assert (
        f"2 rows of the last FC layer are never trained, {2 * 1281 * 4 / 1000:.1f} KB"
        in found["labels.start"].message
    )
    assert found["labels.contiguous"].measured == 5
    assert found["labels.contiguous"].subject == "labels 4, 5, 6, 7, 8"
    assert (found["labels.class_num"].level, found["labels.class_num"].limit) == ("info", 10)
    assert "2 classes more than the labels need" in found["labels.class_num"].message


def test_remapping_makes_the_warnings_go(photos: Path, steps: Steps) -> None:
    source = listed(photos, {"a": 2, "b": 3, "c": 9})
    steps.ingest(source, photos, remap_labels=True)
    steps.validate(photos, **{"global": {"class_num": 3}})
    assert steps.findings("validate") == {}
    assert json.loads(Path("outputs/ingest/label_map.json").read_text()) == {"2": 0, "3": 1, "9": 2}


def test_a_class_num_below_the_labels_is_an_error_that_can_be_waived(photos: Path, steps: Steps) -> None:
    steps.ingest(str(photos), photos)
    with pytest.raises(FindingsError, match=r"labels\.class_num: The highest label is 2, so there are 3"):
        steps.validate(photos, **{"global": {"class_num": 2}})
    assert not steps.clean.exists()
    assert not steps.quarantine.exists()
    steps.validate(photos, **{"global": {"class_num": 2}, "checks": {"waive": ["labels.class_num"]}})
    finding = steps.findings("validate")["labels.class_num"]
    assert (finding.level, finding.waived) == ("warning", True)
    assert steps.clean.exists()


def test_too_many_bad_rows_are_an_error(photos: Path, steps: Steps) -> None:
    for path in sorted((photos / "a").iterdir())[:7]:
        path.write_bytes(b"")
    steps.ingest(str(photos), photos)
    with pytest.raises(FindingsError, match=r"7 of 60 rows \(11\.7%\) are bad, the limit is 10\.0%"):
        steps.validate(photos)
    rows = steps.validate(photos, validate={"max_bad_share": 0.2})
    assert len(rows) == 7


def test_a_file_that_changed_since_ingest_is_not_what_was_hashed(photos: Path, steps: Steps) -> None:
    steps.ingest(str(photos), photos)
    put(photos / "b" / "01.png", encoded(digit(401)))
    gone = sorted((photos / "c").iterdir())[3]
    gone.unlink()
    reasons = {row["path"]: row["reason"] for row in steps.validate(photos)}
    assert reasons == {
        "b/01.png": "image.changed: the file is not the one that ingest read",
        f"c/{gone.name}": f"image.unreadable: c/{gone.name}: No such file or directory",
    }


def test_a_number_of_images_is_looked_at_and_none_shown_where_that_is_asked(
    photos: Path, steps: Steps
) -> None:
    steps.ingest(str(photos), photos)
    steps.validate(photos, validate={"images": 25}, report={"thumbnails": False})
    finding = steps.findings("validate")["image.unreadable"]
    assert (finding.level, finding.measured, finding.limit) == ("info", 25, 60)
    assert "data:image" not in Path("outputs/validate/report.html").read_text()


# manifests that somebody else made

GOOD = [
    row(f"{split}{number}", number % 2, split) for number in range(20) for split in ("train", "val", "test")
]


BAD = [
    (row("", 0), "manifest.path"),
    (row(None, 0), "manifest.path"),
    (row("b1", 0, "dev"), "manifest.split"),
    (row("b2", 0, None), "manifest.split"),
    (row("b3", 0, source="drawn"), "manifest.source"),
    (row("b4", 0, source=None), "manifest.source"),
    (row("b5", -1), "labels.missing"),
    (row("b6", None), "labels.missing"),
    (row("b7", 1, "unlabeled"), "labels.unlabeled"),
    (row("b8", 1, "val", source="synthetic"), "leakage.synthetic"),
    (row("b9", 1, sha256="val3"), "leakage.exact"),
    (row("b10", -1, "unlabeled", sha256="test3"), "leakage.exact"),
]


def test_rows_that_break_the_rules_are_put_aside_and_the_rest_goes_on(steps: Steps) -> None:
    write_manifest([*GOOD, *(bad for bad, _ in BAD)])
    aside = steps.validate(".", validate={"images": "none", "max_bad_share": 0.5})
    assert [{name: one[name] for name in row("", 0)} for one in aside] == [bad for bad, _ in BAD]
    assert [one["reason"].split(":")[0] for one in aside] == [rule for _, rule in BAD]
    found = steps.findings("validate")
    rules = [rule for _, rule in BAD]
    assert set(found) == {*rules, "image.unreadable"}
    assert all((found[rule].level, found[rule].measured) == ("warning", rules.count(rule)) for rule in rules)
    assert [one["path"] for one in steps.rows(steps.clean)] == [one["path"] for one in GOOD]
    counts = pq.read_table("outputs/validate/counts.parquet").to_pylist()
    assert sum(one["rows"] for one in counts) == len(GOOD)


def test_any_mixture_of_contents_is_parted_as_the_contract_says(steps: Steps) -> None:
    """500 rows over few contents, so that every kind of repetition occurs; judged by plain loops."""
    random = np.random.default_rng(7)
    splits = [*manifests.SPLITS, "train", "train"]
    rows = []
    for number in range(500):
        split = splits[random.integers(len(splits))]
        label = -1 if split == "unlabeled" else int(random.integers(3))
        content = None if number % 50 == 0 else f"content {random.integers(400)}"
        source = manifests.SOURCES[random.integers(3)] if split == "train" else "real"
        rows.append(row(f"{number:03d}", label, split, sha256=content, source=source))
    write_manifest(rows)
    held = {one["sha256"] for one in rows if one["split"] in ("val", "test") and one["sha256"]}
    leaks = {one["path"] for one in rows if one["split"] in ("train", "unlabeled") and one["sha256"] in held}
    labels: dict[str, set[int]] = {}
    for one in rows:
        if one["label"] >= 0 and one["sha256"]:
            labels.setdefault(one["sha256"], set()).add(one["label"])
    torn = {one["path"] for one in rows if one["label"] > min(labels.get(one["sha256"], {9}))}
    aside = steps.validate(".", validate={"images": "none", "max_bad_share": 1.0})
    assert [one["path"] for one in aside] == sorted(leaks)
    kept = [one["path"] for one in steps.rows(steps.clean)]
    assert kept == [one["path"] for one in rows if one["path"] not in leaks]
    cases = steps.cases().to_pylist()
    assert {case["path"] for case in cases if case["rule"] == "duplicates.labels"} == torn


def test_the_same_path_twice_with_two_labels(photos: Path, steps: Steps) -> None:
    source = Path(listed(photos, {"a": 0, "b": 1, "c": 2}))
    with source.open("a") as file:
        file.write("\na/00.png 1\n")
    steps.ingest(str(source), photos)
    steps.validate(photos)
    finding = steps.findings("validate")["duplicates.labels"]
    assert finding.measured == 1
    assert "a/00.png = a/00.png (the same content, labels 1 and 0)" in finding.message


def test_paths_stand_for_contents_that_nobody_hashed(steps: Steps) -> None:
    rows = [{**one, "sha256": None} for one in GOOD]
    write_manifest([*rows, {**rows[0], "label": 1}, {**rows[1], "split": "train"}])
    (aside,) = steps.validate(".", validate={"images": "none"})
    assert (aside["path"], aside["reason"]) == ("val0", "leakage.exact: the same content, in val (val0)")
    assert steps.findings("validate")["duplicates.labels"].measured == 1


def test_groups_on_both_sides_and_labels_with_two_names_are_said(steps: Steps) -> None:
    named = [{**one, "class_name": "ab"[one["label"]]} for one in GOOD]
    odd = [
        row("x", 0, group="film 7", class_name="c"),
        row("y", 0, "val", group="film 7", class_name="a"),
        row("z", 1, group="film 8", class_name="b"),
    ]
    write_manifest([*named, *odd])
    steps.validate(".", validate={"images": "none"})
    found = steps.findings("validate")
    assert set(found) == {"leakage.group", "labels.names", "image.unreadable"}
    assert (found["leakage.group"].subject, found["leakage.group"].measured) == ("film 7", 1)
    assert found["labels.names"].message == "1 label goes by several names, such as 0: 'a' and 'c'."


def test_a_class_that_quarantine_empties_is_said(photos: Path, steps: Steps) -> None:
    for place, name in enumerate(("d", "e")):
        put(photos / name / "bad.png", b"no image")
        put(photos / "a" / f"empty{place}.png", b"")
    steps.ingest(str(photos), photos)
    steps.validate(photos)
    found = steps.findings("validate")
    assert (found["labels.classes"].level, found["labels.classes"].measured) == ("warning", 2)
    assert "duplicates.exact" not in found, "files without a content repeat none"
    assert "duplicates.labels" not in found


def test_one_class_or_no_validation_is_an_error(steps: Steps) -> None:
    write_manifest([{**one, "label": 0} for one in GOOD if one["split"] != "val"])
    with pytest.raises(FindingsError, match="No clean row is left in 'val'"):
        steps.validate(".", validate={"images": "none"})
    found = steps.findings("validate")
    assert {rule for rule, finding in found.items() if finding.level == "error"} == {
        "splits.empty",
        "labels.classes",
    }
    assert not Path("outputs/validate/counts.parquet").exists(), "a failed step leaves no product"


def test_a_file_that_is_no_manifest_is_named(steps: Steps) -> None:
    with pytest.raises(RetortError, match="no such file; run 'retort ingest' first"):
        steps.validate(".")
    put(steps.manifest, b"path,label")
    with pytest.raises(RetortError, match="not a Parquet file"):
        steps.validate(".")
    pq.write_table(pa.table({"path": ["a"], "label": ["0"]}), steps.manifest)
    with pytest.raises(RetortError, match="column 'label' is string, expected int32"):
        steps.validate(".")


def test_a_failure_leaves_no_rows_of_an_earlier_run(photos: Path, steps: Steps) -> None:
    """The audits would go on with the old file."""
    steps.ingest(str(photos), photos)
    for old in (steps.clean, steps.quarantine):
        put(old, b"of an earlier run")
    steps.manifest.unlink()
    with pytest.raises(RetortError, match="run 'retort ingest' first"):
        steps.validate(photos)
    assert not steps.clean.exists()
    assert not steps.quarantine.exists()


def test_a_failure_leaves_no_half_of_the_data_docs(
    photos: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    steps.ingest(str(photos), photos)
    monkeypatch.setattr(suite, "_write_index", full)
    with pytest.raises(OSError, match="No space left"):
        steps.validate(photos, validate={"images": "none"})
    assert not [path for path in Path("outputs/validate").iterdir() if "data_docs" in path.name]
    assert not steps.clean.exists()


def test_sixteen_bits_of_which_twelve_are_used_are_said(photos: Path, steps: Steps) -> None:
    for number in range(4):
        grey = np.asarray(digit(number).convert("L"), np.uint16)
        put(photos / "a" / f"deep{number}.png", encoded(Image.fromarray(grey * (16 if number < 3 else 257))))
    steps.ingest(str(photos), photos)
    steps.validate(photos)
    report = read_report(Path("outputs/validate/report.json"))
    (found,) = [one for one in report.findings if one.rule == "image.mode" and one.level == "warning"]
    assert found.measured == 3
    assert found.message.startswith("3 16-bit images are nearly black")

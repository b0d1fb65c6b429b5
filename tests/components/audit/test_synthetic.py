"""The synthetic audit on real digits, with what is planted among them (components/dataset/digits.py)."""

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.audit.counts import count
from components.audit.part import SyntheticPart, read_part
from components.audit.rows import select
from components.common.errors import RetortError
from components.dataset.digits import FLOODED, GARBLED, TOPPED_UP
from tests.components.audit.conftest import Audits, rows_of


def subjects(found: dict[str, Any], rule: str) -> set[str]:
    return {finding.subject for finding in found.get(rule, [])}


def test_each_rule_names_the_class_planted_for_it_and_no_other(done: Audits) -> None:
    found = done.findings("synthetic")
    assert subjects(found, "synthetic.blow_up") == {f"class '{FLOODED}'"}
    assert subjects(found, "synthetic.same_order") == {f"class '{TOPPED_UP}'"}
    assert subjects(found, "synthetic.recognisable") == {f"class '{GARBLED}'"}
    assert "synthetic.degradation" not in found
    assert all(finding.row == "4.1" for findings in found.values() for finding in findings)
    part = read_part(SyntheticPart, done.out / "synthetic", "audit synthetic")
    # 480 glyphs beside 20 real digits fill the class up to the median of the others, 104
    assert part.by_source[int(FLOODED)] == {"synthetic": pytest.approx(84 / 480, abs=1e-6)}
    assert part.by_source[int(GARBLED)]["synthetic"] < 0.4
    assert int(TOPPED_UP) not in part.by_source
    assert part.leave_out == [], "only when asked to"


def test_flipped_labels_are_found_by_file(cached: Audits) -> None:
    flipped = set()

    def flip(row: dict[str, Any]) -> dict[str, Any]:
        if row["source"] == "real" and int(row["sha256"][:6], 16) % 20 == 0 and row["label"] >= 0:
            flipped.add(row["path"])
            wrong = (row["label"] + 1 + int(row["sha256"][6:10], 16) % 9) % 10
            return {**row, "label": wrong, "class_name": str(wrong)}
        return row

    cached.change(flip)
    finding, of_others = cached.synthetic(audit={"drop_suspects": True})["labels.suspect"]
    suspects = {row["path"]: row for row in cached.samples() if row["rule"] == "labels.suspect"}
    assert finding.level == "warning"
    assert "expected to be right after all" in finding.message
    assert of_others.level == "info", "no plan leaves validation or test images out"
    assert finding.measured == sum(row["split"] == "train" for row in suspects.values())
    assert of_others.measured == len(suspects) - finding.measured
    assert len(flipped & set(suspects)) >= 0.9 * len(flipped)
    assert len(flipped & set(suspects)) >= 0.9 * len(suspects)
    right = [path for path in flipped & set(suspects) if suspects[path]["suggested"] == path.split("/")[0]]
    assert len(right) >= 0.9 * len(flipped & set(suspects)), "and what they are is suggested"
    with (cached.out / "synthetic/proposed_corrections.csv").open(encoding="utf-8") as file:
        assert {row["path"]: row["label"] for row in csv.DictReader(file)} == {
            path: row["suggested"] for path, row in suspects.items()
        }
    left_out = read_part(SyntheticPart, cached.out / "synthetic", "audit synthetic").leave_out
    dropped = {row.path for row in left_out if row.finding == "labels.suspect"}
    assert dropped == {path for path, row in suspects.items() if row["split"] == "train"}


def test_right_labels_are_not_suspected(done: Audits) -> None:
    (finding,) = done.findings("synthetic")["labels.suspect"]
    assert finding.level == "info"
    assert finding.measured <= 3, "of 1,537 digits"


def test_a_class_that_the_probe_cannot_know_has_no_suspect_labels(cached: Audits) -> None:
    kept = 0

    def thin(row: dict[str, Any]) -> dict[str, Any] | None:
        nonlocal kept
        if row["source"] != "real" or row["label"] != 8:
            return row if row["source"] == "real" else None
        kept += 1
        return row if kept <= 4 else None

    cached.change(thin)
    (finding,) = cached.synthetic()["labels.suspect"]
    assert "Of 1 class ('8') no label is called suspect" in finding.message
    assert "8" not in {row["class_name"] for row in cached.samples() if row["rule"] == "labels.suspect"}


def test_no_more_is_asked_of_synthetic_images_than_of_real_ones(cached: Audits) -> None:
    # ones stand under two names by chance, so that nothing can tell these classes apart
    def torn(row: dict[str, Any]) -> dict[str, Any] | None:
        if row["source"] != "real" or row["label"] == 2:
            return None
        if row["label"] != 1:
            return row
        chance = int(row["sha256"][:8], 16)
        name = ("1", "2")[chance % 2]
        made = name == "1" and row["split"] == "train" and chance % 3 == 0
        source = "synthetic" if made else "real"
        return {**row, "label": int(name), "class_name": name, "source": source}

    cached.change(torn)
    found = cached.synthetic(audit={"recognisable_recall": 0.95})
    assert "synthetic.recognisable" not in found
    assert subjects(found, "synthetic.same_order") == {"class '1'"}


def test_synthetic_images_without_a_real_one_are_said(cached: Audits) -> None:
    cached.change(lambda row: None if row["class_name"] == TOPPED_UP and row["source"] == "real" else row)
    (finding,) = cached.synthetic()["synthetic.same_order"]
    assert "It has no real image" in finding.message


def test_a_class_degrades_by_images_of_another_under_its_name(cached: Audits) -> None:
    # nines of the pool stand as synthetic fours among good ones: real fours suffer
    fours = 0

    def poison(row: dict[str, Any]) -> dict[str, Any] | None:
        nonlocal fours
        if row["source"] != "real":
            return None
        if row["label"] == 9 and row["split"] == "train":
            return {**row, "label": 4, "class_name": "4", "source": "synthetic"}
        if row["label"] == 4 and row["split"] == "train":
            fours += 1
            return {**row, "source": "synthetic"} if fours % 2 else row
        return row

    cached.change(poison)
    found = cached.synthetic(audit={"recognisable_recall": 0.3})
    assert subjects(found, "synthetic.degradation") <= {"class '9'", "class '4'"}
    assert "synthetic.degradation" in found
    listed = [row for row in cached.samples() if row["rule"] == "synthetic.degradation"]
    assert {row["class_name"] for row in listed} == {"4"}
    assert sum(row["suggested"] == "9" for row in listed) > 0.7 * len(listed)


def test_without_synthetic_images_only_labels_are_looked_at(cached: Audits) -> None:
    cached.change(lambda row: row if row["source"] == "real" else None)
    found = cached.synthetic()
    assert set(found) == {"synthetic.none", "labels.suspect"}


def test_the_same_data_give_the_same_bytes_cached_or_not(cached: Audits, digits: Path) -> None:
    cached.change(lambda row: row if row["label"] in (1, 3) else None)
    cached.synthetic()
    names = ("part.json", "samples.parquet", "classes.parquet", "report.json", "page.json")
    first = [(cached.out / "synthetic" / name).read_bytes() for name in names]
    shutil.rmtree(".retort/cache/features")
    cached.synthetic()
    assert [(cached.out / "synthetic" / name).read_bytes() for name in names] == first


def test_no_image_is_shown_when_thumbnails_are_off(cached: Audits, all_three: Path) -> None:
    shown = all_three / "outputs/audit/synthetic/report.html"
    assert "<img" in shown.read_text(encoding="utf-8")
    cached.change(lambda row: row if row["label"] in (1, 2, 3) else None)
    cached.synthetic(report={"thumbnails": False})
    assert "<img" not in (cached.out / "synthetic/report.html").read_text(encoding="utf-8")


def test_a_sample_is_looked_at_when_there_is_more(cached: Audits) -> None:
    found = cached.synthetic(audit={"probe_images": 400})
    (said,) = found["synthetic.probe"]
    assert said.level == "info"
    assert 300 < said.measured <= 400
    assert "audit.probe_images" in said.message
    assert subjects(found, "synthetic.blow_up") == {f"class '{FLOODED}'"}, "counts need no sample"


def test_a_sample_is_even_over_classes_splits_and_sources(digits: Path) -> None:
    manifest = digits / "data/clean.parquet"
    table = select(manifest, 200)
    assert table.num_rows <= 200
    groups = table.group_by(["label", "split", "source"]).aggregate([("path", "count")])
    for split in ("train", "val", "test"):
        sizes = groups.filter(groups["split"].to_numpy(zero_copy_only=False) == split)["path_count"]
        assert np.ptp(sizes.to_numpy()) == 0
    assert select(manifest, 10**6).num_rows == int(
        sum(part.sum() for part in (count(manifest).total, count(manifest).val, count(manifest).test))
    )


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (rows_of({"a": {"real": 20, "val": 5}, "b": {"real": 20, "val": 5}}), "none of 450 images"),
        (
            [
                {**row, "path": f"s3://b/{row['path']}"}
                for row in rows_of({"a": {"real": 9}, "b": {"real": 9}})
            ],
            "no hashes",
        ),
        (rows_of({f"c{i}": {"real": 1} for i in range(2001)}), "2,001 classes"),
    ],
)
def test_where_images_cannot_be_looked_at_the_counts_still_are(
    audits: Audits, rows: list[dict[str, Any]], why: str
) -> None:
    audits.write([*rows, *({**rows[0], "path": f"made/{i}.png", "source": "synthetic"} for i in range(400))])
    found = audits.synthetic()
    assert why in found["synthetic.probe"][0].message
    assert len(found["synthetic.blow_up"]) == 1


def test_features_that_are_no_backbone_are_refused(audits: Audits) -> None:
    audits.features = Path("features.onnx")
    with pytest.raises(RetortError, match="run 'retort weights' first"):
        audits.synthetic()
    audits.features.write_bytes(b"<html>not found</html>")
    with pytest.raises(RetortError, match=r"not a backbone of ours .*run 'retort weights' again"):
        audits.synthetic()
    assert not (audits.out / "synthetic/part.json").exists()


def test_a_damaged_cache_is_made_anew(cached: Audits) -> None:
    (path,) = Path(".retort/cache/features").iterdir()
    path.write_bytes(b"SQLite format 3\0 but not really" * 100)
    cached.change(lambda row: row if row["label"] in (1, 2) else None)
    assert subjects(cached.synthetic(), "labels.suspect") == {"labels"}


def only(keep: Any) -> Any:
    """What makes ``keep(row, its number in its group)`` of real zeros and ones, and leaves out the rest."""
    seen: dict[tuple[str, int, str], int] = {}

    def change(row: dict[str, Any]) -> dict[str, Any] | None:
        if row["label"] not in (0, 1) or row["source"] != "real":
            return None
        group = (row["split"], row["label"], row["source"])
        seen[group] = seen.get(group, 0) + 1
        return keep(row, seen[group])

    return change


def made(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "source": "synthetic"}


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (lambda row, n: row if row["label"] == 0 or n == 1 else None, "fewer than two classes"),
        (lambda row, n: row if row["split"] == "train" else None, None),
        (lambda row, n: row if row["split"] != "train" or row["label"] == 0 else None, "fewer than two"),
        (lambda row, n: row if row["split"] == "train" and row["label"] == 0 and n == 1 else None, "fewer"),
        (
            lambda row, n: made(row) if row["label"] == 1 and row["split"] == "train" else row,
            "fewer than two",
        ),
        (lambda row, n: made(row) if row["split"] == "train" and n % 2 else row, None),
        (lambda row, n: made(row) if row["split"] == "train" and n > 1 else row, "fewer than two classes"),
    ],
    ids=[
        "one image",
        "no val, no test",
        "one class in train",
        "one image in all",
        "only synthetic",
        "two",
        "1",
    ],
)
def test_what_cannot_be_judged_is_said(cached: Audits, keep: Any, said: str | None) -> None:
    cached.change(only(keep))
    (finding, *_) = cached.synthetic()["labels.suspect"]
    assert finding.level == "info"
    assert said is None or said in finding.message

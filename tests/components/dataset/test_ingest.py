"""Every source becomes the same kind of manifest: named, counted, nothing lost."""

from __future__ import annotations

import json
import os
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.common.errors import ConfigError, FindingsError, RetortError
from components.common.sheet import write_csv
from components.common.storage import sha256_file
from components.dataset import manifest as manifests
from components.dataset import rows as dataset_rows
from components.dataset.images import read_bytes
from components.dataset.params import Splits
from components.dataset.sources import found as found_sources
from components.dataset.sources import table as table_sources
from components.dataset.sources.folder import DEEPEST
from components.dataset.sources.found import Row, encode, glob_regex, matcher
from components.dataset.sources.lists import parse_line
from components.dataset.splits import splits_of
from tests.components.dataset.conftest import Steps, digit, encoded, put


def test_digits_are_imbalanced_and_always_the_same(steps: Steps) -> None:
    globs = {"synthetic": ["*/synthetic/**"], "unlabeled": ["unlabeled/**"]}
    rows = steps.ingest("digits", "digits", **globs)
    first = sha256_file(steps.manifest)
    train = Counter((row["class_name"], row["source"]) for row in rows if row["split"] == "train")
    real = sorted(train[str(label), "real"] for label in range(10))
    assert real[:3] == [20, 20, 20]
    assert real[3] > 90
    synthetic = {name: count for (name, source), count in train.items() if source == "synthetic"}
    assert max(synthetic.values()) > 4 * np.median(real)
    assert sum(row["split"] == "unlabeled" for row in rows) > 200
    assert {row["source"] for row in rows if row["split"] in ("val", "test")} == {"real"}
    assert {row["label"] for row in rows if row["split"] == "unlabeled"} == {-1}
    steps.ingest("digits", "again", **globs)
    assert sha256_file(steps.manifest) == first


def test_digits_never_overwrite_a_persons_folder(photos: Path, steps: Steps) -> None:
    with pytest.raises(RetortError, match="holds other files"):
        steps.ingest("digits", photos)
    assert len(list(photos.rglob("*.png"))) == 60


def test_a_class_folder(photos: Path, steps: Steps) -> None:
    rows = steps.ingest(str(photos), photos)
    assert {(row["class_name"], row["label"]) for row in rows} == {("a", 0), ("b", 1), ("c", 2)}
    assert len(rows) == 60
    assert {"train", "val", "test"} == {row["split"] for row in rows}
    one = next(row for row in rows if row["path"] == "a/00.png")
    assert one["sha256"] == sha256_file(photos / "a/00.png")
    assert (one["width"], one["height"], one["bytes"]) == (32, 32, (photos / "a/00.png").stat().st_size)
    assert one["phash"] is not None


def test_an_image_never_changes_its_split_when_others_arrive(photos: Path, steps: Steps) -> None:
    before = {row["path"]: row["split"] for row in steps.ingest(str(photos), photos)}
    for number in range(100, 140):
        put(photos / "a" / f"new{number}.png", encoded(digit(number)))
    after = {row["path"]: row["split"] for row in steps.ingest(str(photos), photos)}
    assert before.items() <= after.items()


def test_groups_stay_whole(photos: Path, steps: Steps) -> None:
    rows = steps.ingest(str(photos), photos, group=r"(\d)\.png$")
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row["group"], set()).add(row["split"])
    assert len(splits) == 10
    assert all(len(of_group) == 1 for of_group in splits.values())


@pytest.mark.parametrize("names", [("train", "val", "test"), ("training", "validation", "testing")])
def test_a_folder_with_splits_keeps_them(tmp_path: Path, steps: Steps, names: tuple[str, ...]) -> None:
    root = tmp_path / "data_set"
    for number, split in enumerate(names * 4):
        put(root / split / "xy"[number // 6] / "deep" / f"{number}.png", encoded(digit(number)))
    put(root / "unlabeled" / "free.png", encoded(digit(99)))
    rows = steps.ingest(str(root), root)
    assert Counter(row["split"] for row in rows) == {"train": 4, "val": 4, "test": 4, "unlabeled": 1}
    assert {row["class_name"] for row in rows} == {"x", "y", None}


def test_a_class_may_be_called_train(tmp_path: Path, steps: Steps) -> None:
    root = tmp_path / "vehicles"
    for number in range(40):
        put(root / ("car", "train")[number % 2] / f"{number}.png", encoded(digit(number)))
    assert {row["class_name"] for row in steps.ingest(str(root), root)} == {"car", "train"}


def test_synthetic_images_are_for_training_alone(tmp_path: Path, steps: Steps) -> None:
    root = tmp_path / "set"
    for number in range(12):
        split = ("train", "val")[number % 2]
        put(root / split / "xy"[number // 6] / ("synthetic" if number < 4 else "real") / f"{number}.png",
            encoded(digit(number)))  # fmt: skip
    rows = steps.ingest(str(root), root, synthetic=["**/synthetic/**"])
    assert {row["source"] for row in rows if row["split"] == "val"} == {"real"}
    assert steps.findings("ingest")["ingest.synthetic"].measured == 2


def listed(folder: Path, name: str, lines: list[str]) -> str:
    put(folder / name, "\n".join(lines).encode())
    return str(folder / name)


def test_list_files_one_a_split_with_labels_from_one(photos: Path, steps: Steps, tmp_path: Path) -> None:
    names = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
    lines = [f"{name} {'abc'.index(name[0]) + 1}" for name in names]
    lines[0] += " synthetic"
    source = {"train": listed(tmp_path, "t.txt", lines[::2]), "val": listed(tmp_path, "v.txt", lines[1::2])}
    rows = steps.ingest(source, photos)
    assert {row["label"] for row in rows} == {1, 2, 3}
    assert Counter(row["split"] for row in rows) == {"train": 30, "val": 30}
    assert [row["path"] for row in rows if row["source"] == "synthetic"] == [names[0]]
    assert "ingest.splits" in steps.findings("ingest"), "there is no test split, and the report says so"


def test_labels_are_remapped_and_the_mapping_saved(photos: Path, steps: Steps, tmp_path: Path) -> None:
    names = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
    source = listed(tmp_path, "list.txt", [f"{name} {'abc'.index(name[0]) * 5 + 1}" for name in names])
    rows = steps.ingest(source, photos, remap_labels=True)
    assert {row["label"] for row in rows} == {0, 1, 2}
    assert json.loads(Path("outputs/ingest/label_map.json").read_text()) == {"1": 0, "6": 1, "11": 2}


def test_class_names_file(photos: Path, steps: Steps, tmp_path: Path) -> None:
    names = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
    source = listed(tmp_path, "list.txt", [f"{name} {'abc'.index(name[0])}" for name in names])
    rows = steps.ingest(source, photos, class_names=listed(tmp_path, "names.txt", ["ant", "bee", "cat"]))
    assert {row["class_name"] for row in rows} == {"ant", "bee", "cat"}
    assert "labels.names" not in steps.findings("ingest")
    steps.ingest(source, photos, class_names=listed(tmp_path, "names.txt", ["ant", "bee"]))
    assert "1 label lies beyond them: 2." in steps.findings("ingest")["labels.names"].message


def test_the_order_of_a_list_does_not_matter(photos: Path, steps: Steps, tmp_path: Path) -> None:
    names = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
    lines = [f"{name} {'abc'.index(name[0])}{kind}" for name in names for kind in ("", " synthetic")]
    steps.ingest(listed(tmp_path, "list.txt", lines), photos)
    content = steps.manifest.read_bytes()
    steps.ingest(listed(tmp_path, "list.txt", lines[::-1]), photos)
    assert steps.manifest.read_bytes() == content


def test_bad_lines_are_named_and_the_rest_goes_on(photos: Path, steps: Steps, tmp_path: Path) -> None:
    names = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
    good = [f"{name} {'abc'.index(name[0])}" for name in names]
    bad = ["a/00.png", "a/00.png -1", "a/00.png x", "a/00.png 1.5", "/etc/passwd 0", "../up.png 0"]
    rows = steps.ingest(listed(tmp_path, "list.txt", good + bad), photos)
    assert len(rows) == 60
    finding = steps.findings("ingest")["ingest.rejected"]
    assert finding.measured == len(bad)
    assert "line 61" in finding.subject
    assert len(Path("outputs/ingest/rejected.csv").read_text().splitlines()) == len(bad)


@pytest.mark.parametrize(
    ("line", "path", "label", "source"),
    [
        (b"a b/c d.jpg 3", "a b/c d.jpg", 3, None),
        (b"a b.jpg\t3\tsynthetic", "a b.jpg", 3, "synthetic"),
        (b"a.jpg 0 semi-synthetic", "a.jpg", 0, "semi_synthetic"),
        (b"./x//y.jpg 1", "x/y.jpg", 1, None),
        (b"\xff.jpg 1", "%FF.jpg", 1, None),
        (b"100%.jpg 1", "100%.jpg", 1, None),
        (b"a%20b.jpg 1", "a%2520b.jpg", 1, None),
    ],
)
def test_lines_of_a_list(line: bytes, path: str, label: int, source: str | None) -> None:
    row = parse_line(line, None, None)
    assert isinstance(row, Row)
    assert (row.path, row.label, row.source) == (path, label, source)


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=1).filter(lambda line: b"\n" not in line))
def test_any_line_is_a_row_or_a_reason(line: bytes) -> None:
    row = parse_line(line, None, None)
    if isinstance(row, Row):
        assert row.label is not None
        assert row.label >= 0
        assert not row.path.startswith(("/", "../"))
    else:
        assert row


FILE_NAMES = st.binary(min_size=1, max_size=60).filter(
    lambda name: b"/" not in name and b"\0" not in name and not name.startswith(b".")
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=FILE_NAMES)
def test_any_file_name_is_found_again(tmp_path: Path, name: bytes) -> None:
    folder = os.fsencode(tmp_path)
    with open(os.path.join(folder, name), "wb") as file:  # noqa: PTH123
        file.write(name)
    path = encode(name)
    path.encode("utf-8")
    assert read_bytes(tmp_path, path) == name
    os.unlink(os.path.join(folder, name))  # noqa: PTH108


def test_odd_names_and_circles_of_links(photos: Path, steps: Steps) -> None:
    odd = ["a b.png", "new\nline.png", "quote'\".png", "ünï.png", "100%25.png", "-o.PNG"]
    for place, name in enumerate(odd):
        put(photos / "a" / name, encoded(digit(200 + place)))
    with open(os.fsencode(photos) + b"/b/\xff\xfe.png", "wb") as file:  # noqa: PTH123
        file.write(encoded(digit(300)))
    (photos / "c" / "circle").symlink_to(photos, target_is_directory=True)
    (photos / "c" / "linked").symlink_to(photos / "b", target_is_directory=True)
    rows = steps.ingest(str(photos), photos)
    paths = {row["path"] for row in rows}
    assert {
        "a/a b.png",
        "a/new\nline.png",
        "a/quote'\".png",
        "a/ünï.png",
        "a/-o.PNG",
        "b/%FF%FE.png",
    } <= paths
    assert len(rows) == 60 + len(odd) + 1 + 21, "what is linked counts once more, the circle not at all"
    assert all(row["sha256"] for row in rows)
    assert steps.findings("ingest")["ingest.rejected"].measured == 1, "the circle is named"


def test_what_leads_to_no_image_is_named_and_stops_nothing(photos: Path, steps: Steps) -> None:
    (photos / "a" / "itself.png").symlink_to("itself.png")
    (photos / "a" / "nowhere.png").symlink_to("nowhere.jpg")
    os.mkfifo(photos / "b" / "pipe.png")
    deep = photos / "c" / "/".join("d" * DEEPEST)
    put(deep / "deep.png", encoded(digit(0)))
    assert len(steps.ingest(str(photos), photos)) == 60
    assert steps.findings("ingest")["ingest.rejected"].measured == 4
    rejected = Path("outputs/ingest/rejected.csv").read_text(encoding="utf-8")
    assert all(name in rejected for name in ("a/itself.png", "a/nowhere.png", "b/pipe.png", "c/d/d"))


@pytest.mark.parametrize(
    ("glob", "path", "matches"),
    [
        ("*/synthetic/**", "a/synthetic/x.png", True),
        ("*/synthetic/**", "a/b/synthetic/x.png", False),
        ("**/synthetic/**", "synthetic/x.png", True),
        ("**/*.png", "x.png", True),
        ("*.png", "a/x.png", False),
        ("a/img[0-9]?.png", "a/img1x.png", True),
        ("a/[!b]*.png", "a/bx.png", False),
        ("gen**", "generated/a/b.png", True),
    ],
)
def test_globs(glob: str, path: str, matches: bool) -> None:
    pattern = matcher([glob])
    assert pattern is not None
    assert bool(pattern.fullmatch(path)) == matches


@given(st.text(max_size=20))
def test_any_glob_without_wildcards_matches_itself(text: str) -> None:
    if not set(text) & set("*?[]"):
        import re

        assert re.fullmatch(glob_regex(text), text)


def test_corrections_relabel_and_drop(photos: Path, steps: Steps, tmp_path: Path) -> None:
    before = steps.ingest(str(photos), photos)
    first = manifests.fingerprint(steps.manifest)
    csv = listed(tmp_path, "verdicts.csv", ["path,label", "a/00.png,c", "a/10.png,drop", "gone.png,a"])
    rows = {row["path"]: row for row in steps.ingest(str(photos), photos, corrections=csv)}
    assert (rows["a/00.png"]["label"], rows["a/00.png"]["class_name"]) == (2, "c")
    assert "a/10.png" not in rows
    assert len(rows) == len(before) - 1
    assert manifests.fingerprint(steps.manifest) != first
    assert "gone.png" in steps.findings("ingest")["ingest.corrections"].message
    put(photos / "a" / "new\nline.png", encoded(digit(300)))
    csv = listed(tmp_path, "verdicts.csv", ["path,label", '"a/new\nline.png",b'])
    rows = {row["path"]: row for row in steps.ingest(str(photos), photos, corrections=csv)}
    assert rows["a/new\nline.png"]["class_name"] == "b"


def test_corrections_as_they_were_proposed_name_what_a_spreadsheet_would_compute(
    photos: Path, steps: Steps, tmp_path: Path
) -> None:
    put(photos / "=b" / "-1+1.png", encoded(digit(300)))
    proposed = tmp_path / "proposed.csv"
    write_csv(proposed, [("path", "label"), ("=b/-1+1.png", "a"), ("a/00.png", "=b")])
    assert "'=b/-1+1.png" in proposed.read_text()
    rows = {row["path"]: row for row in steps.ingest(str(photos), photos, corrections=str(proposed))}
    assert rows["=b/-1+1.png"]["class_name"] == "a"
    assert rows["a/00.png"]["class_name"] == "=b"


def test_corrections_go_by_the_names_of_their_columns(photos: Path, steps: Steps, tmp_path: Path) -> None:
    kept = f"b/{min((photos / 'b').iterdir()).name}"
    lines = ["given,drop,path,label,why", "a,,a/00.png,c,blurred", "a,1,a/10.png,a,", f"b,no,{kept},,"]
    csv = listed(tmp_path, "verdicts.csv", lines)
    rows = {row["path"]: row for row in steps.ingest(str(photos), photos, corrections=csv)}
    assert rows["a/00.png"]["class_name"] == "c"
    assert "a/10.png" not in rows
    assert rows[kept]["class_name"] == "b"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["path,class", "a/00.png,c"], "verdicts.csv, line 1: no column 'label' or 'drop' beside 'path'"),
        (["path,drop", "a/00.png,maybe"], "verdicts.csv, line 2: 'maybe' in column drop; use 1 or 0"),
        (["path,label", "a/00.png,"], "verdicts.csv, line 2: expected 'path,label' or 'path,drop'"),
        (["path,label", "a/00.png," + "9" * 5000], "no class '9999"),
    ],
)
def test_corrections_that_cannot_be_understood_are_named_by_line(
    photos: Path, steps: Steps, tmp_path: Path, lines: list[str], message: str
) -> None:
    with pytest.raises(RetortError, match=message):
        steps.ingest(str(photos), photos, corrections=listed(tmp_path, "verdicts.csv", lines))


def test_a_class_may_be_called_drop(photos: Path, steps: Steps, tmp_path: Path) -> None:
    (photos / "b").rename(photos / "drop")
    csv = listed(tmp_path, "verdicts.csv", ["path,label", "a/00.png,drop"])
    rows = {row["path"]: row for row in steps.ingest(str(photos), photos, corrections=csv)}
    assert rows["a/00.png"]["class_name"] == "drop"


def test_capital_letters_in_a_hash_are_none_of_its_value(photos: Path, steps: Steps, tmp_path: Path) -> None:
    steps.ingest(str(photos), photos)
    content = steps.manifest.read_bytes()
    rows = pq.read_table(steps.manifest).to_pylist()
    upper = [{**row, "sha256": row["sha256"].upper()} for row in rows]
    pq.write_table(pa.Table.from_pylist(upper, schema=manifests.SCHEMA), tmp_path / "mine.parquet")
    steps.ingest(str(tmp_path / "mine.parquet"), photos)
    assert steps.manifest.read_bytes() == content
    assert "ingest.sha256" not in steps.findings("ingest")


def test_names_that_stand_twice_serve_where_labels_are_given(
    photos: Path, steps: Steps, tmp_path: Path
) -> None:
    """As in lists of ImageNet's names, of which two are called 'crane'."""
    names = listed(tmp_path, "names.txt", ["crane", "heron", "crane"])
    images = sorted(path.relative_to(photos) for path in photos.rglob("*.png"))
    lines = [f"{path} {'abc'.index(str(path)[0])}" for path in images]
    rows = steps.ingest(listed(tmp_path, "list.txt", lines), photos, class_names=names)
    assert {(row["label"], row["class_name"]) for row in rows} == {(0, "crane"), (1, "heron"), (2, "crane")}
    for old, new in (("a", "crane"), ("b", "heron")):
        (photos / old).rename(photos / new)
    with pytest.raises(RetortError, match=r"'crane' stands there twice \(lines 1 and 3\)"):
        steps.ingest(str(photos), photos, class_names=names)


def test_synthetic_images_of_a_held_out_group_are_left_out(steps: Steps, tmp_path: Path) -> None:
    """Every recording has a real frame and one rendered from it; some groups are rendered alone."""
    rows = [
        {"path": f"{kind}/{number}.jpg", "label": number % 2, "source": kind, "group": f"take {number}"}
        for number in range(100)
        for kind in ("real", "synthetic")
        if kind == "synthetic" or number < 80
    ]
    made = steps.ingest(table(tmp_path, rows), ".", group="group")
    splits: dict[str, set[str]] = {}
    for row in made:
        splits.setdefault(row["group"], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values()), "no group is parted"
    held = [group for group, found in splits.items() if found & {"val", "test"}]
    assert len(held) > 10
    finding = steps.findings("ingest")["ingest.synthetic"]
    assert (finding.level, finding.measured) == ("warning", len(held))
    assert len(made) == len(rows) - len(held)
    assert sum(row["source"] == "synthetic" for row in made) == 100 - len(held)
    assert len(Path("outputs/ingest/held_out.csv").read_text().splitlines()) == len(held)


def test_synthetic_images_beside_real_ones_that_the_source_trains_on_are_kept(
    steps: Steps, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [
        {"path": f"{number}.jpg", "label": number % 2, "group": f"take {number}", "source": "real",
         "split": "val" if number < 10 else "train"}
        for number in range(60)
    ]  # fmt: skip
    made = [{**row, "path": f"made/{row['path']}", "source": "synthetic", "split": None} for row in rows[10:]]
    kept = steps.ingest(table(tmp_path, rows + made), ".", group="group")
    assert len(kept) == 110
    assert {row["split"] for row in kept if row["source"] == "synthetic"} == {"train"}


def test_an_existing_manifest_comes_through_unchanged(photos: Path, steps: Steps, tmp_path: Path) -> None:
    steps.ingest(str(photos), photos)
    kept = tmp_path / "earlier.parquet"
    kept.write_bytes(steps.manifest.read_bytes())
    steps.ingest(str(kept), photos)
    assert steps.manifest.read_bytes() == kept.read_bytes()


def test_a_table_of_paths_and_labels_is_enough(photos: Path, steps: Steps, tmp_path: Path) -> None:
    names = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
    table = {"path": names, "label": ["abc".index(name[0]) for name in names], "note": names}
    pq.write_table(pa.table(table), tmp_path / "mine.parquet")
    rows = steps.ingest(str(tmp_path / "mine.parquet"), photos)
    assert len(rows) == 60
    assert {"train", "val", "test"} == {row["split"] for row in rows}


def test_a_hash_that_is_none_is_worked_out_from_the_image(photos: Path, steps: Steps, tmp_path: Path) -> None:
    steps.ingest(str(photos), photos)
    content = steps.manifest.read_bytes()
    rows = pq.read_table(steps.manifest).to_pylist()
    paths = [row["path"] for row in rows[:3]]
    for row, wrong in zip(rows, ("zz" * 32, "abc", ""), strict=False):
        row["sha256"] = wrong
    rows[3]["sha256"] = None  # not known: nothing to say
    pq.write_table(pa.Table.from_pylist(rows, schema=manifests.SCHEMA), tmp_path / "mine.parquet")
    steps.ingest(str(tmp_path / "mine.parquet"), photos)
    assert steps.manifest.read_bytes() == content
    found = steps.findings("ingest")["ingest.sha256"]
    assert (found.level, found.measured, found.subject) == ("warning", 3, "; ".join(paths))


def table(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    """A Parquet file of these rows, every one of another content."""
    digests = [sha256(repr(number).encode()).hexdigest() for number in range(len(rows))]
    full = [{"sha256": digest, **row} for digest, row in zip(digests, rows, strict=True)]
    names = dict.fromkeys(name for row in full for name in row)
    columns = {name: [row.get(name) for row in full] for name in names}
    pq.write_table(pa.table(columns), tmp_path / "mine.parquet")
    return str(tmp_path / "mine.parquet")


def test_a_table_is_cut_into_portions_without_a_trace(
    steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in order, with corrections, groups, gaps in the labels and names that some rows lack."""
    random = np.random.default_rng(0)
    labels = random.permutation(np.repeat([3, 5, 8, 13], 50)).tolist()
    rows = [
        {
            "path": f"{'synthetic' if number % 7 == 0 else 'real'}/{label}/{number}.jpg",
            "label": label,
            "class_name": f"class {label}" if number % 3 else None,
        }
        for number, label in enumerate(labels)
    ]
    verdicts = [f"{rows[1]['path']},class 13", f"{rows[90]['path']},drop", f"{rows[199]['path']},3"]
    options: dict[str, Any] = {
        "corrections": listed(tmp_path, "verdicts.csv", ["path,label", *verdicts]),
        "synthetic": ["synthetic/**"],
        "unlabeled": ["**/*1.jpg"],
        "group": r"(\d)\.jpg$",
        "remap_labels": True,
    }
    source = table(tmp_path, rows)
    whole = steps.ingest(source, ".", **options)
    content = steps.manifest.read_bytes()
    for module in (dataset_rows, found_sources, table_sources):
        monkeypatch.setattr(module, "PORTION", 7)
    steps.ingest(source, ".", **options)
    assert steps.manifest.read_bytes() == content
    held_out = {line.strip('"') for line in Path("outputs/ingest/held_out.csv").read_text().splitlines()}
    assert all(path.startswith("synthetic/") for path in held_out)
    left = (row["path"] for row in rows if row is not rows[90] and row["path"] not in held_out)
    assert [row["path"] for row in whole] == sorted(left)
    labelled = [row for row in whole if row["split"] != "unlabeled"]
    old = {0: 3, 1: 5, 2: 8, 3: 13}
    assert all(row["class_name"] == f"class {old[row['label']]}" for row in labelled)
    assert all((row["split"] == "unlabeled") == (row["label"] == -1) for row in whole)
    by_path = {row["path"]: row for row in whole}
    assert by_path[rows[1]["path"]]["label"] == 3, "a verdict gives an unlabelled row its label"
    assert {row["split"] for row in whole if row["source"] == "synthetic"} <= {"train", "unlabeled"}
    splits = {(row["group"], row["split"]) for row in labelled}
    assert len(splits) == len({group for group, _ in splits}), "no group is parted"
    assert json.loads(Path("outputs/ingest/label_map.json").read_text()) == {"3": 0, "5": 1, "8": 2, "13": 3}


def test_rows_of_a_table_that_cannot_be_used_are_named(steps: Steps, tmp_path: Path) -> None:
    good = [{"path": f"{number}.jpg", "label": number % 2, "split": "Training"} for number in range(40)]
    bad: list[dict[str, Any]] = [
        {"path": "", "label": 0},
        {"path": "a.jpg", "label": None},
        {"path": "b.jpg", "label": -4},
        {"path": "c.jpg", "label": 0, "split": "holdout"},
        {"path": "d.jpg", "label": 0, "source": "drawn"},
        {"path": "http://photos.example/e.jpg", "label": 0},
    ]
    unlabeled = [
        {"path": "free/e.jpg", "label": None},
        {"path": "f.jpg", "label": None, "split": "unlabelled"},
    ]
    rows = steps.ingest(table(tmp_path, [*good, *bad, *unlabeled]), ".", unlabeled=["free/*"])
    assert len(rows) == 42
    assert [row["path"] for row in rows if row["label"] == -1] == ["f.jpg", "free/e.jpg"]
    finding = steps.findings("ingest")["ingest.rejected"]
    assert finding.measured == len(bad)
    lines = Path("outputs/ingest/rejected.csv").read_text().splitlines()
    assert [line.rsplit(",", 1)[1].strip('"') for line in lines] == [
        "the path is missing",
        "the label is missing or negative",
        "the label is missing or negative",
        "the split 'holdout' is unknown",
        "the source 'drawn' is unknown",
        "only files and s3:// can be read",
    ]
    assert "row 42: a.jpg" in lines[1]


def test_rows_of_one_path_keep_the_order_of_the_table(steps: Steps, tmp_path: Path) -> None:
    rows = [{"path": f"{number % 30:02d}.jpg", "label": number % 2, "width": number} for number in range(120)]
    made = steps.ingest(
        table(tmp_path, [{**row, "split": ("train", "val")[row["label"]]} for row in rows]), "."
    )
    wanted = sorted(rows, key=lambda row: (row["path"], row["label"]))
    assert [row["width"] for row in made] == [row["width"] for row in wanted]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.binary(min_size=32, max_size=32), max_size=20), st.floats(0.01, 0.5), st.floats(0.01, 0.49)
)
def test_splits_are_thresholds_on_the_first_32_bits(contents: list[bytes], val: float, test: float) -> None:
    digests = [content.hex() for content in contents]
    wanted = []
    for digest in digests:
        share = int(digest[:8], 16) / 2**32
        wanted.append("val" if share < val else "test" if share < val + test else "train")
    assert splits_of(pa.array(digests, pa.string()), Splits(val=val, test=test)).to_pylist() == wanted


@pytest.mark.parametrize(
    ("columns", "named"),
    [({"file": ["a"]}, "path"), ({"path": ["a"]}, "label"), ({"path": ["a"], "label": ["x"]}, "label")],
)
def test_a_table_with_wrong_columns(
    columns: dict[str, Any], named: str, steps: Steps, tmp_path: Path
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "mine.parquet")
    with pytest.raises(RetortError, match=f"column '{named}'"):
        steps.ingest(str(tmp_path / "mine.parquet"), tmp_path)


def test_missing_empty_and_one_class(tmp_path: Path, steps: Steps) -> None:
    with pytest.raises(RetortError, match="no such folder"):
        steps.ingest("nowhere", "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RetortError, match="no image in this folder"):
        steps.ingest("empty", "empty")
    for number in range(20):
        put(tmp_path / "one" / "only" / f"{number}.png", encoded(digit(number)))
        if number in (0, 19):  # a single image is the same mistake as many
            with pytest.raises((RetortError, FindingsError), match="at least two classes"):
                steps.ingest("one", "one")
    assert not steps.manifest.exists()
    (tmp_path / "bad.txt").write_bytes(b"")
    with pytest.raises(RetortError, match="list is empty"):
        steps.ingest("bad.txt", "one")
    with pytest.raises(RetortError, match=r"set data\.root"):
        steps.ingest("one", "empty")
    with pytest.raises(ConfigError, match="unknown split 'vall'"):
        steps.ingest({"vall": "bad.txt"}, "one")


def test_a_damaged_image_stays_in_the_manifest_for_validate(photos: Path, steps: Steps) -> None:
    put(photos / "a" / "zero.png", b"")
    put(photos / "a" / "half.png", encoded(digit(7))[:200])
    rows = {row["path"]: row for row in steps.ingest(str(photos), photos)}
    assert rows["a/zero.png"]["width"] is None
    assert rows["a/half.png"]["phash"] is None

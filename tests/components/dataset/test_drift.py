"""Drift: changes of classes are named, chance is not, however many classes there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from components.common.errors import RetortError
from components.common.storage import sha256_file
from components.dataset import drift
from components.dataset import manifest as manifests
from tests.components.dataset.conftest import Steps, row, write_manifest


def counts(rows: Any) -> pd.DataFrame:
    """``rows[k]`` images of class k."""
    names = [f"class {number}" for number in range(len(rows))]
    return pd.DataFrame({"label": range(len(rows)), "rows": rows}, index=pd.Index(names, name="class_name"))


def drawn(random: np.random.Generator, classes: int, images: int) -> pd.DataFrame:
    """A sample of a long-tailed world that is always the same."""
    share = 1 / np.arange(1, classes + 1) ** 0.5
    return counts(random.multinomial(images, share / share.sum()))


def test_no_wolf_is_cried_at_a_hundred_thousand_classes() -> None:
    random = np.random.default_rng(0)
    for images in (300_000, 3_000_000):
        before, now = drawn(random, 100_000, images), drawn(random, 100_000, images // 2)
        table = drift.compare(before, now)
        assert (table["kind"] == "changed").sum() == 0
        ratios = table["ratio"][(table["rows_before"] > 0) & (table["rows_now"] > 0)]
        assert (ratios > drift.CHANGED).mean() > 0.05, "chance alone moves many classes that far"
        both = table[(table["rows_before"] > 0) & (table["rows_now"] > 0)]
        w, _ = drift.effect(both["rows_before"].to_numpy(), both["rows_now"].to_numpy())
        assert w < drift.SMALL_EFFECT


def test_what_did_change_is_found_among_a_hundred_thousand_classes() -> None:
    random = np.random.default_rng(1)
    before, now = drawn(random, 100_000, 3_000_000), drawn(random, 100_000, 3_000_000)
    planted = [f"class {number}" for number in range(50, 550, 5)]
    now.loc[planted, "rows"] //= 2
    table = drift.compare(before, now)
    named = set(table.index[table["kind"] == "changed"])
    assert len(named & set(planted)) >= 95
    assert len(named - set(planted)) <= 2


def test_a_change_too_small_to_matter_is_not_named_however_certain() -> None:
    table = drift.compare(counts([1_000_000] * 4), counts([1_100_000] + [1_000_000] * 3))
    assert table["p"].min() < 1e-6
    assert set(table["kind"]) == {"same"}


def test_the_test_is_the_exact_binomial_one() -> None:
    # 9 of the 10 images of class 0 are new; with equal totals that has p = 2 * (10 + 1) / 2**10
    table = drift.compare(counts([1, 99]), counts([9, 91]))
    assert table.loc["class 0", "p"] == pytest.approx(22 / 1024)


def test_cohens_w_of_a_table_worked_out_by_hand() -> None:
    # chi-squared of [[40, 60], [60, 40]] is 8, one degree of freedom, 200 images
    w, p = drift.effect(np.array([40, 60]), np.array([60, 40]))
    assert w == pytest.approx((7 / 200) ** 0.5)
    assert p == pytest.approx(0.004678, rel=1e-3)


def images(sizes: dict[str, int], labels: dict[str, int] | None = None) -> list[dict[str, Any]]:
    """A manifest's rows: ``sizes[name]`` images of each class, one in four for validation."""
    numbers = labels or {name: label for label, name in enumerate(sorted(sizes))}
    return [
        row(f"{name}/{number}", numbers[name], "val" if number % 4 == 0 else "train", class_name=name)
        for name, size in sizes.items()
        for number in range(size)
    ]


NONE = {"images": "none"}


def drifted(steps: Steps, before: list[dict[str, Any]], now: list[dict[str, Any]]) -> dict[str, Any]:
    """Findings about drift between two manifests, by rule; the last of several."""
    earlier = Path("earlier/manifest.parquet")
    write_manifest(before, earlier)
    write_manifest(now)
    steps.validate(".", validate={**NONE, "baseline": str(earlier)})
    return {rule: finding for rule, finding in steps.findings("validate").items() if rule.startswith("drift")}


def test_new_vanished_and_changed_classes_are_named(steps: Steps) -> None:
    before = images({"a": 300, "b": 300, "c": 300, "old": 40})
    labels = {"a": 0, "b": 1, "c": 2, "new": 3}
    found = drifted(steps, before, images({"a": 300, "b": 300, "c": 90, "new": 50}, labels))
    assert found["drift.shares"].level == "warning"
    assert found["drift.shares"].subject.startswith("'c'")
    assert "'c' 33.33% to 13.04%" in found["drift.shares"].message
    assert found["drift.images"].measured == pytest.approx(50 / 740, abs=1e-6)
    table = {one["class_name"]: one for one in pq.read_table("outputs/validate/drift.parquet").to_pylist()}
    assert {name: one["kind"] for name, one in table.items()} == {
        "a": "changed",
        "b": "changed",
        "c": "changed",
        "new": "new",
        "old": "vanished",
    }
    assert (table["c"]["rows_before"], table["c"]["rows_now"]) == (300, 90)
    said = [
        (finding.subject, finding.measured)
        for finding in read_findings("outputs/validate/report.json")
        if finding.rule == "drift.classes"
    ]
    assert said == [("new: 'new'", 1), ("vanished: 'old'", 1)]


def read_findings(path: str) -> list[Any]:
    from components.common.findings import read_report

    return read_report(Path(path)).findings


def test_more_of_the_same_is_silent(steps: Steps) -> None:
    found = drifted(steps, images({"a": 300, "b": 100}), images({"a": 620, "b": 200}))
    assert set(found) == {"drift.compared", "drift.images"}
    assert {finding.level for finding in found.values()} == {"info"}


def test_classes_that_were_renumbered_are_said(steps: Steps) -> None:
    sizes = {"a": 40, "b": 40}
    found = drifted(steps, images(sizes), images(sizes, {"a": 1, "b": 0}))
    assert found["drift.classes"].subject == "renumbered: 'a', 'b'"


def test_saved_counts_tell_the_same_as_the_manifest(steps: Steps) -> None:
    write_manifest(images({"a": 300, "b": 300}))
    steps.validate(".", validate=NONE)
    saved = Path("outputs/validate/counts.parquet").rename("saved.parquet")
    by_manifest = drifted(steps, images({"a": 300, "b": 300}), images({"a": 300, "b": 100}))
    steps.validate(".", validate={**NONE, "baseline": str(saved)})
    by_counts = steps.findings("validate")
    assert by_counts["drift.shares"] == by_manifest["drift.shares"]
    assert "drift.images" not in by_counts, "counts do not know contents"


def test_a_baseline_that_cannot_be_used_is_named_before_any_work(steps: Steps) -> None:
    write_manifest(images({"a": 20, "b": 20}))
    Path("text.parquet").write_text("no")
    pq.write_table(pq.read_table(steps.manifest).drop_columns(["split"]), "half.parquet")
    for name, said in {
        "none.parquet": "no such file",
        "text.parquet": "not a Parquet file",
        "half.parquet": "column 'split' is missing",
        "outputs/validate/counts.parquet": "this step rewrites",
    }.items():
        with pytest.raises(RetortError, match=rf"validate\.baseline: .*{said}"):
            steps.validate(".", validate={**NONE, "baseline": name})


def test_the_fingerprint_sees_every_value_and_their_order_but_not_the_files_layout(tmp_path: Path) -> None:
    rows = [
        {**one, "source": "real", "sha256": None if number == 3 else one["sha256"]}
        for number, one in enumerate(images({"a": 9, "b": 4}))
    ]
    path = tmp_path / "m.parquet"

    def fingerprint(of: list[dict[str, Any]]) -> str:
        write_manifest(of, path)
        return manifests.fingerprint(path)

    first = fingerprint(rows)
    changed = {"path": "z", "label": 7, "split": "test", "source": "synthetic", "sha256": "z"}
    for name, value in changed.items():
        for place in (0, 3, 12):
            assert fingerprint([*rows[:place], {**rows[place], name: value}, *rows[place + 1 :]]) != first
    assert fingerprint([*rows[1:], rows[0]]) != first
    assert fingerprint(rows[:-1]) != first
    assert fingerprint([*rows[:3], {**rows[3], "sha256": ""}, *rows[4:]]) != first, "null is not empty"
    # the same characters, cut elsewhere
    cut = [{**rows[0], "path": "a/0a"}, {**rows[1], "path": "/1"}, *rows[2:]]
    assert fingerprint(cut) != first
    write_manifest(rows, path)
    before = sha256_file(path)
    pq.write_table(pq.read_table(path), path, row_group_size=2, compression="none", use_dictionary=False)
    assert sha256_file(path) != before
    assert manifests.fingerprint(path) == first

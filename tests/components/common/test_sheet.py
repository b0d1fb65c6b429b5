"""CSV files: nothing in them is a formula, and reading gives back what was written."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.common import sheet


@pytest.mark.parametrize(
    "name",
    ["=cmd|calc.jpg", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1+1", "'=1", "-a/b.png"],
)
def test_no_cell_begins_as_a_formula_does(name: str, tmp_path: Path) -> None:
    sheet.write_csv(tmp_path / "a.csv", [["path"], [name]])
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        _, (cell,) = csv.reader(file)
    assert cell == f"'{name}"
    assert sheet.text(cell) == name


@pytest.mark.parametrize("value", ["a.png", "it's", "'quoted'", "", -0.5, None, "-1", "+0.5e-3", 3])
def test_what_is_no_formula_stays(value: object) -> None:
    assert sheet.cell(value) == value
    assert not isinstance(value, str) or sheet.text(value) == value


@given(st.lists(st.lists(st.text(st.sampled_from("a'=-+@\t\r\n\",;1 .\uff1d")), min_size=2, max_size=2)))
def test_reading_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]
) -> None:
    path = tmp_path_factory.mktemp("sheet") / "a.csv"
    sheet.write_csv(path, rows)
    with path.open(encoding="utf-8", newline="") as file:
        assert [[sheet.text(cell) for cell in row] for row in csv.reader(file)] == rows

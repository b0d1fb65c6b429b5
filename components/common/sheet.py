"""CSV files for people: a cell holds what was said, and no spreadsheet takes it for a formula."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from components.common.storage import atomic_path

# What makes a formula of a cell, full-width forms too (OWASP, "CSV Injection"); an apostrophe before it makes
# it text again. One that stood there before is doubled, so that reading can tell.
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")


def cell(value: Any) -> Any:
    """A value as it stands in a cell: text that a spreadsheet would compute gets an apostrophe in front."""
    if isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def text(cell: str) -> str:
    """The text that ``cell`` was made from."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a header and rows; floats with eight significant digits."""
    write_csv(path, [columns, *([_number(value) for value in row] for row in rows)])


def _number(value: Any) -> Any:
    return f"{value:.8g}" if isinstance(value, float) else value


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write rows, the header as the first of them; whole or not at all."""
    with atomic_path(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        plain = csv.writer(file, lineterminator="\n")
        quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        for row in rows:
            cells = [cell(value) for value in row]
            # the module quotes no lone carriage return, and reads it as the end of a line
            torn = any(isinstance(value, str) and "\r" in value for value in cells)
            (quoted if torn else plain).writerow(cells)

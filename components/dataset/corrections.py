"""``data.corrections``: a person's verdicts on single images, as a CSV file."""

from __future__ import annotations

import csv
from pathlib import Path

from components.common import sheet
from components.common.errors import RetortError


def read_verdicts(file: Path) -> dict[str, str | None]:
    """Each path's verdict: a class, or None to drop it.

    A first line with a cell ``path`` names the columns, wherever they stand; others are ignored. Without one,
    a line is ``path,class``, or ``path,drop``.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:  # a path may hold line breaks
            lines = [[sheet.text(cell) for cell in line] for line in csv.reader(text)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RetortError(f"{file}: cannot be read ({error}); check data.corrections") from None
    header = [cell.strip().lower() for cell in lines[0]] if lines else []
    columns = header if "path" in header else None
    if columns and not {"label", "drop"} & set(columns):
        raise RetortError(f"{file}, line 1: no column 'label' or 'drop' beside 'path'")
    verdicts: dict[str, str | None] = {}
    for number, cells in enumerate(lines[1 if columns else 0 :], start=2 if columns else 1):
        if not cells:
            continue
        named = dict(zip(columns or ["path", "label"], cells, strict=False))
        try:
            judged, verdict = _verdict(named)
        except ValueError as error:
            raise RetortError(f"{file}, line {number}: {error}") from None
        path = named.get("path", "")
        if judged and verdicts.setdefault(path, verdict) != verdict:
            raise RetortError(
                f"{file}, line {number}: a second verdict on {path}: {verdicts[path] or 'drop'}, "
                f"{verdict or 'drop'}"
            )
    return verdicts


def _verdict(named: dict[str, str]) -> tuple[bool, str | None]:
    """Whether a line judges, and its verdict.

    Raises:
        ValueError: saying what is wrong with the line.
    """
    label, drop = named.get("label", ""), named.get("drop", "").strip().lower()
    if drop in ("1", "true", "yes", "drop"):
        return True, None
    if drop not in ("", "0", "false", "no"):
        raise ValueError(f"'{drop}' in column drop; use 1 or 0")
    if label.strip():
        return True, label
    if drop:
        return False, None  # an explicit 'no'
    raise ValueError("expected 'path,label' or 'path,drop'")

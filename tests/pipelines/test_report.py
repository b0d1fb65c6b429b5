"""The first lines of the report: did the teacher help, and what became of the student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from components.common.storage import write_json
from pipelines.params import Params
from pipelines.report import report


def student(gain: float, half: float, top1: float = 0.6) -> dict[str, Any]:
    return {
        "val": {"top1": top1, "images": 100},
        "test": {"images": 0},
        "control": {"val": {"top1": top1 - gain, "images": 100}},
        "gain": {"val_top1": gain, "val_low": gain - half, "val_high": gain + half, "seeds": 3},
    }


def registered(version: int, alias: str, champion: int | None, reason: str) -> dict[str, Any]:
    return {"name": "photos", "version": version, "alias": alias, "champion": champion, "reason": reason}


def said(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """The lines on the terminal, and the page."""
    report(Params(), folder)
    return capsys.readouterr().out.splitlines(), (folder / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("gain", "half", "answer"),
    [
        (-0.15, 0.05, "No, it did harm: 60.0% top-1 with it, 75.0% without it, -15.0 points (95 % interval "
         "-20.0 to -10.0) on 100 validation images. See distill.gain for the way out."),
        (0.15, 0.05, "Yes: 60.0% top-1 with it, 45.0% without it, +15.0 points (95 % interval +10.0 to"),
        (-0.15, 0.2, "Unknown, the difference is within the noise: 60.0% top-1 with it, 75.0% without it,"),
    ],
)  # fmt: skip
def test_the_first_line_says_whether_the_teacher_helped(
    gain: float, half: float, answer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "student/metrics.json", student(gain, half))
    lines, page = said(tmp_path, capsys)
    assert lines[0].startswith(f"Did the teacher help? {answer}")
    assert answer in page
    assert page.index(answer) < page.index('<div class="cards">'), "before any number"


def test_without_a_control_nothing_is_claimed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "student/metrics.json", {"val": {"top1": 0.6, "images": 9}})
    assert said(tmp_path, capsys)[0][0].startswith(
        "Did the teacher help? Not measured: there is no student without a teacher beside it"
    )


def test_the_first_line_says_that_the_control_is_shipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taught, alone = {"val": {"top1": 0.6, "images": 9}}, {"val": {"top1": 0.7, "images": 9}}
    gain = {"val_top1": -0.1, "val_low": -0.2, "val_high": -0.01, "seeds": 1}
    metrics = {**alone, "kept": "control", "distilled": taught, "control": alone, "gain": gain}
    write_json(tmp_path / "student/metrics.json", metrics)
    lines, page = said(tmp_path, capsys)
    assert lines[0].startswith("Which network is shipped? The student trained without the teacher")
    assert "distilled 60.0%, control 70.0%" in lines[0]
    assert lines[1].startswith("Did the teacher help? It seems not, of one training: 60.0% top-1 with it")
    assert page.index("Which network is shipped?") < page.index("Did the teacher help?")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (registered(1, "champion", 1, "it is the first: nothing to compare with"),
         "photos v1, champion because it is the first: nothing to compare with."),
        (registered(2, "challenger", 1, "not better: equal, top-1 63.33% against 63.33%"),
         "photos v2, challenger (champion stays v1): not better: equal, top-1 63.33% against 63.33%."),
        ({"name": "photos", "version": 2, "alias": "challenger"}, "photos v2, challenger."),
    ],
    ids=["first", "equal", "of an earlier version"],
)  # fmt: skip
def test_a_challenger_is_called_that_and_why(
    content: dict[str, Any], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "register/registered.json", content)
    lines, page = said(tmp_path, capsys)
    assert lines[0] == f"Champion or challenger? {line}"
    assert line in page
    card = next(line for line in lines if line.strip().startswith("Registered"))
    assert content["alias"] in card

"""Plain lines with percentages where there is no terminal; silence for short work."""

from __future__ import annotations

import pytest

from components.common import progress


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(range(5), "Reading", 5)) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""


def test_long_work_says_plain_lines_with_percentages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with progress.task("Decoding", 4) as task:
        for _ in range(4):
            task.advance(note="a.png")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1
    assert lines[0].startswith("  Decoding: ")
    assert "%" in lines[0]
    assert "a.png" in lines[0]
    assert lines[-1].startswith("  Decoding: 100% (4/4")


def test_work_that_fails_does_not_claim_to_be_complete(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 9))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(ValueError, match="broken"), progress.task("Decoding", 10) as task:
        task.advance()
        raise ValueError("broken")
    assert "100%" not in capsys.readouterr().err


def test_counted() -> None:
    assert [progress.counted(count, "note") for count in (0, 1, 2)] == ["0 notes", "1 note", "2 notes"]

"""What a person sees while workers train: results stay few in a log, and none that matters is lost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from components.common import progress
from components.training import listener
from components.training.listener import Listener
from tests.conftest import bare


class Hearing:
    """A listener without Ray or MLflow, and a clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.metrics: list[int] = []
        monkeypatch.setattr(progress.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(progress, "TICK_SECONDS", 3600.0)
        monkeypatch.setattr(progress._watch, "lined", -1000.0)
        tracker = SimpleNamespace(metrics=lambda values, step: self.metrics.append(step))
        run: Any = SimpleNamespace(name="distill", tracker=tracker)
        self.listener = Listener(run)

    def phase(self, name: str, epochs: int) -> None:
        self.listener({"kind": "phase", "name": name, "unit": "steps", "total": epochs, "epochs": epochs})

    def epoch(self, phase: str, number: int, seconds: float) -> None:
        self.now += seconds
        row = {"phase": phase, "epoch": number, "train_loss": 1.0, "val_loss": 1.0, "val_top1": 0.5}
        self.listener({"kind": "epoch", "row": row})


@pytest.fixture
def hearing(monkeypatch: pytest.MonkeyPatch) -> Hearing:
    return Hearing(monkeypatch)


def test_hundreds_of_short_epochs_are_no_flood(hearing: Hearing, capsys: pytest.CaptureFixture[str]) -> None:
    with hearing.listener:
        for phase in ("distil", "labelled"):
            hearing.phase(phase, 100)
            for number in range(1, 101):
                hearing.epoch(phase, number, 1.0)
    lines = [line for line in bare(capsys.readouterr().err).splitlines() if " epoch " in line]
    assert len(lines) <= 2 * (100 // 15 + 2)
    for phase in ("distil", "labelled"):
        assert any(line.startswith(f"distill: {phase} epoch 100: loss") for line in lines), "the last is said"
    assert hearing.metrics == [*range(1, 101)] * 2, "the tracker gets each of them"


def test_long_epochs_are_said_one_by_one(hearing: Hearing, capsys: pytest.CaptureFixture[str]) -> None:
    with hearing.listener:
        hearing.phase("finetune", 3)
        for number in (1, 2, 3):
            hearing.epoch("finetune", number, 20.0)
    lines = [line for line in bare(capsys.readouterr().err).splitlines() if " epoch " in line]
    assert [line.split(":")[1] for line in lines] == [f" finetune epoch {number}" for number in (1, 2, 3)]


def test_corrections_of_an_estimate_are_no_flood(
    hearing: Hearing, capsys: pytest.CaptureFixture[str]
) -> None:
    with hearing.listener:
        for turn in range(30):
            hearing.now += 1.0
            hearing.listener(
                {"kind": "estimate", "name": "finetune: 5 epochs", "seconds": 40.0, "again": turn > 0}
            )
    lines = bare(capsys.readouterr().err).splitlines()
    assert lines[0] == "distill: finetune: 5 epochs will take about 40 s"
    assert [line.endswith("40 s more from here, by what was measured since") for line in lines[1:]] == [
        True, True,
    ]  # fmt: skip


def test_what_a_broken_run_ended_with_is_said(hearing: Hearing, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), hearing.listener:
        hearing.phase("finetune", 30)
        for number in (1, 2, 3):
            hearing.epoch("finetune", number, 1.0)
        raise KeyboardInterrupt
    assert "finetune epoch 3:" in capsys.readouterr().err


def test_durations_are_said_as_exactly_as_they_are_known() -> None:
    assert [listener.duration(seconds) for seconds in (20, 119, 145, 599, 3000)] == [
        "20 s", "119 s", "2.4 min", "10.0 min", "50 min",
    ]  # fmt: skip

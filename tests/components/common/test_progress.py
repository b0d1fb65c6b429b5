"""Plain lines with percentages where there is no terminal; silence for short work."""

from __future__ import annotations

import io
import os
import threading

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


class Clock:
    """A clock that a test sets, and a look at what is being done at that time, as the thread takes it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(progress, "TICK_SECONDS", 3600.0)

    def look(self, seconds: float) -> None:
        self.now += seconds
        progress._watch.look()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_long_work_is_named_after_two_seconds_and_then_now_and_again(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.doing("weights", "reading"):
        clock.look(1.9)
        assert capsys.readouterr().err == ""
        clock.look(0.2)
        assert capsys.readouterr().err == "  weights: reading (2 s)\n"
        clock.look(14)
        assert capsys.readouterr().err == ""
        clock.look(2)
        assert capsys.readouterr().err == "  weights: reading (18 s)\n"
        progress.say("a line")
        clock.look(14)
        assert capsys.readouterr().err == "a line\n", "it was not silent for so long"
        progress.at("comparing")
        clock.look(2)
        assert capsys.readouterr().err == "  weights: comparing (2 s)\n", "something new is named at once"


def test_the_innermost_work_is_named(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.doing("check"):
        with progress.task("asking", 5) as task:
            task.advance(2)
            clock.look(3)
            assert capsys.readouterr().err.startswith("  asking: 40% (2/5, ")
            progress.at("later")
        clock.look(3)
        assert capsys.readouterr().err.splitlines()[-1] == "  check: later (3 s)"


def test_a_spinner_leaves_no_trace_on_a_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress.doing("weights", "reading"):
        clock.look(3)
        clock.look(0.25)
        assert terminal.getvalue().count("weights: reading (3 s)") == 2
        progress.say("done")
        assert terminal.getvalue().endswith("\r\x1b[Kdone\n")
        clock.look(3)
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_the_thread_ends_with_the_work_and_lives_in_no_child() -> None:
    with progress.doing("weights"):
        (thread,) = (one for one in threading.enumerate() if one.name == "progress")
        child = os.fork()
        if not child:
            with progress.doing("in the child"):  # neither the lock nor the stack is the parent's
                os._exit(7 if len(progress._watch.stack) == 1 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    thread.join(60)
    assert not thread.is_alive()
    assert not progress._watch.stack


def test_work_that_a_signal_ends_is_over() -> None:
    with pytest.raises(KeyboardInterrupt), progress.doing("weights"), progress.task("decoding", 3):
        raise KeyboardInterrupt
    assert not progress._watch.stack

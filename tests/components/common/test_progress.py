"""Plain lines with percentages where there is no terminal; silence for short work."""

from __future__ import annotations

import io
import itertools
import logging
import os
import re
import threading

import pytest

from components.common import progress
from tests.conftest import bare


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(range(5), "Reading", 5)) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""


def test_long_work_says_plain_lines_with_percentages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "TICK_SECONDS", 3600.0)
    monkeypatch.setattr(progress._watch, "lined", -1000.0)
    now = 100.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    with progress.task("Decoding", 40) as task:
        for _ in range(40):
            now += 1.0
            task.advance(note="a.png")
    now += 15
    lines = bare(capsys.readouterr().err).splitlines()
    assert lines == [
        "  Decoding: 5% (2/40, 2 s)  a.png",
        "  Decoding: 42% (17/40, 17 s)  a.png",
        "  Decoding: 80% (32/40, 32 s)  a.png",
    ], "2 s of silence, then 15 s between two lines, the end's included"
    with progress.task("Decoding", 4) as task:
        now += 3
        task.advance(2)
        now += 15
    assert bare(capsys.readouterr().err).splitlines() == [
        "  Decoding: 50% (2/4, 3 s)", "  Decoding: 100% (4/4, 18 s)",
    ]  # fmt: skip


def test_work_that_fails_does_not_claim_to_be_complete(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10000, 9))
    monkeypatch.setattr(progress._watch, "lined", -1000.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))
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
        progress._watch.lined = -1000.0
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
        assert bare(capsys.readouterr().err) == "  weights: reading (2 s)\n"
        clock.look(14)
        assert capsys.readouterr().err == ""
        clock.look(2)
        assert bare(capsys.readouterr().err) == "  weights: reading (18 s)\n"
        progress.log.info("a line")
        clock.look(14)
        assert bare(capsys.readouterr().err) == "a line\n", "it was not silent for so long"
        progress.at("comparing")
        clock.look(2)
        assert bare(capsys.readouterr().err) == "  weights: comparing (2 s)\n", (
            "something new is named at once"
        )


def test_the_innermost_work_is_named(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.doing("check"):
        with progress.task("asking", 5) as task:
            task.advance(2)
            clock.look(3)
            assert bare(capsys.readouterr().err).startswith("  asking: 40% (2/5, ")
            progress.at("later")
        clock.look(16)
        assert bare(capsys.readouterr().err).splitlines()[-1] == "  check: later (16 s)"


def test_all_work_together_says_a_line_in_15_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Many short works, many short epochs: what counts is how long a log gets, not who writes into it."""
    said: list[float] = []
    results = 0
    with progress.doing("distill"):
        for turn in range(60):  # each takes 3 s: long enough to be named
            progress.at(f"part {turn}")
            with progress.task("labels", 3) as task:
                for _ in range(3):
                    clock.look(1.0)
                    task.advance()
                    results += progress.log_if_due(f"epoch {turn}")
                    if capsys.readouterr().err:
                        said.append(clock.now)
    gaps = [after - before for before, after in itertools.pairwise(said)]
    assert min(gaps) >= 15
    assert max(gaps) <= 18, "nor does it fall silent"
    assert results > 0
    progress.log.info("a fault is said at once")
    progress.log.info("and another")
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_another_number_of_seconds_can_be_set(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETORT_LINE_SECONDS", "1")
    with progress.doing("distill"):
        assert [progress.log_if_due(str(turn)) for turn in range(2)] == [True, False]
        clock.look(1)
        assert progress.log_if_due("again")
    monkeypatch.setenv("RETORT_LINE_SECONDS", "often")
    assert progress.line_seconds() == progress.LINE_SECONDS


def test_on_a_terminal_each_result_is_said(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert [progress.log_if_due(f"epoch {turn}") for turn in range(3)] == [True] * 3
    assert terminal.getvalue().count("\n") == 3


def test_a_spinner_leaves_no_trace_on_a_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress.doing("weights", "reading"):
        clock.look(3)
        clock.look(0.25)
        assert terminal.getvalue().count("weights: reading (3 s)") == 2
        progress.log.info("done")
        assert terminal.getvalue().endswith("\r\x1b[Kdone\n")
        clock.look(3)
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_lines_have_their_time_and_level(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("components.training.driver")
    log.warning("100% of it: a line\n  and one more")
    log.debug("nobody asked")
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d WARNING 100% of it: a line\n  and one more\n",
        capsys.readouterr().err,
    )
    try:
        monkeypatch.setenv("RETORT_LOG_LEVEL", "error")
        progress.begin_logging()
        log.warning("left out")
        log.error("said")
        assert bare(capsys.readouterr().err) == "said\n"
        monkeypatch.setenv("RETORT_LOG_LEVEL", "loud")
        progress.begin_logging()
        assert "RETORT_LOG_LEVEL: 'loud' is none of debug, info" in capsys.readouterr().err
    finally:
        monkeypatch.delenv("RETORT_LOG_LEVEL")
        progress.begin_logging()


def test_other_libraries_are_as_loud_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    assert not [one for one in logging.getLogger().handlers if isinstance(one, progress.LineHandler)]
    logging.getLogger("some.library").info("a library's")
    assert "a library's" not in capsys.readouterr().err


def test_on_a_terminal_a_warning_has_its_level_and_a_note_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    long = "/a/path/" * 40
    progress.log.info(long)
    progress.log.warning("[a] look")
    note, warning = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).splitlines()
    assert note == long, "no line is broken: a path can be copied"
    assert warning == "WARNING [a] look"


def test_the_thread_ends_with_the_work_and_lives_in_no_child() -> None:
    ending = set(threading.enumerate())  # of tests before, whose work is over
    with progress.doing("weights"):
        (thread,) = (one for one in threading.enumerate() if one.name == "progress" and one not in ending)
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

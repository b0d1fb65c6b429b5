"""What a killed driver leaves behind is ended, and nothing else is."""

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from components.training import reaper

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="no descriptors of processes here")
REPO_ROOT = Path(__file__).resolve().parents[3]
SLEEP = "import time; time.sleep(600)"
CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}], start_new_session=True)"


@pytest.fixture
def bystander() -> Iterator[psutil.Process]:
    """A process of somebody else."""
    with subprocess.Popen([sys.executable, "-c", SLEEP]) as process:
        yield psutil.Process(process.pid)
        process.kill()


def until(found: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not found():
        assert time.monotonic() < end
        time.sleep(0.05)


def driver(last: str) -> subprocess.Popen[str]:
    """A process with a child and a grandchild, watched; it does ``last`` once it was told to go on."""
    code = f"""
        import os, subprocess, sys, time
        from components.training import reaper
        with reaper.beside():
            child = subprocess.Popen([sys.executable, "-c", {CHILD!r}])
            print("ready", flush=True)
            sys.stdin.readline()
            {last}
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)


def sleepers(pid: int) -> list[psutil.Process]:
    below = psutil.Process(pid).children(recursive=True)
    return [process for process in below if "reaper.py" not in " ".join(process.cmdline())]


@pytest.mark.parametrize(
    "last", ["pass", "os.closerange(3, 100); print('closed', flush=True); time.sleep(600)"]
)
def test_descendants_of_a_killed_driver_end(bystander: psutil.Process, last: str) -> None:
    """Also where its files are closed some time before it ends, as the kernel does it."""
    with driver(last) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        until(lambda: len(sleepers(process.pid)) == 2)
        left = sleepers(process.pid)
        watcher = [p for p in psutil.Process(process.pid).children() if p not in left]
        assert len(watcher) == 1
        if last != "pass":
            process.stdin.write("go on\n")
            process.stdin.flush()
            process.stdout.readline()
        time.sleep(2 * reaper.LOOK_SECONDS)
        left[0].kill()  # the parent in between is gone, as Ray's raylet is
        process.kill()
        _, alive = psutil.wait_procs([*left, *watcher], timeout=60)
        assert not alive
    assert bystander.is_running()


def test_an_end_in_order_kills_nothing() -> None:
    with driver("print(child.pid, flush=True)") as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        until(lambda: len(sleepers(process.pid)) == 2)
        left = sleepers(process.pid)
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.wait(60) == 0
        assert all(one.is_running() for one in left)
        for one in left:
            one.kill()


def test_a_number_that_another_process_has_by_now_is_not_noted(
    bystander: psutil.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: dict[tuple[int, str], int] = {}
    monkeypatch.setattr(reaper, "descendants", lambda ancestor: {(bystander.pid, "0")})
    reaper._note(1, noted)
    assert noted == {}
    started = reaper._stat(bystander.pid)[1]
    monkeypatch.setattr(reaper, "descendants", lambda ancestor: {(bystander.pid, started)})
    reaper._note(1, noted)
    assert list(noted) == [(bystander.pid, started)]
    monkeypatch.setattr(reaper, "descendants", lambda ancestor: set())
    reaper._note(1, noted)
    assert len(noted) == 1, "its parent is gone, not itself"
    bystander.kill()
    bystander.wait(60)
    reaper._note(1, noted)
    assert noted == {}, "and no descriptor is left open"

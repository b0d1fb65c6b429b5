"""A signal ends a step in order, also where a library turns what its handler raised into an error."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

QUERY = """
import sys
from pathlib import Path
import duckdb
from components.common import signals
from components.common.params import StepParams
from components.step import step
signals.catch()
try:
    with step("query", StepParams(), Path("outputs/query")) as run:
        run.product(Path("outputs/query/half.txt")).write_text("half")
        print("begun", flush=True)
        duckdb.sql("select sum(sin(a.range * b.range)) from range(1000000) a, range(1000000) b").fetchall()
except BaseException as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "Terminated")]
)
def test_a_query_that_is_stopped_is_no_failure(number: signal.Signals, raised: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", QUERY], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert said.splitlines() == [raised]
    assert not list((tmp_path / "outputs/query").iterdir()), "neither a product nor a report of a failure"
    events = [
        json.loads(line)
        for path in (tmp_path / ".retort/spool").rglob("events.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert not events, "it was told to the tracker too"


def test_an_ignored_interrupt_stays_ignored() -> None:
    script = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from components.common import signals\n"
        "signals.catch()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "time.sleep(0.1)\n"
        "print('goes on')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "goes on\n"


HELD = """
import os, signal
from components.common import signals
signals.catch()
with signals.defer_signals():
    os.kill(os.getpid(), signal.SIGINT)
    print("whole")
try:
    signals.raise_pending()
except KeyboardInterrupt:
    print("then stopped")
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_that_is_held_back_stops_what_comes_after() -> None:
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["whole", "then stopped"]
    assert done.stderr.splitlines()[-1].endswith("Terminated"), "held only inside the block"

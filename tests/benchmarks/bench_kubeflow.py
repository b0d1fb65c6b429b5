"""Kubeflow: compiling, the size of what is compiled, and what KFP's local runner adds to the steps' commands.

The runner is measured on the whole DAG with steps that do no work (``without_work``), beside the same steps
as ``retort STEP``, a process each: what differs is KFP, its processes, and our adapter. Seconds of processors
are told as well: they are the same on a busy machine.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from components.dataset import digits
from pipelines.steps import MAIN
from tests.benchmarks.measure import Row, at_most, run

REPO_ROOT = Path(__file__).resolve().parents[2]
PARAMS = REPO_ROOT / "params.yaml"
COMPILE = """
import sys, time
from pathlib import Path
began = time.monotonic()
from pipelines.kubeflow import dag
from pipelines.params import load
params = load(Path(sys.argv[1]))
imported = time.monotonic()
dag.compile(params, Path(sys.argv[2]))
print(imported - began, time.monotonic() - imported)
"""


def measure(seeds: int) -> list[Row]:
    """Compile and call as often as there are seeds; the middle one counts."""
    with tempfile.TemporaryDirectory(prefix="retort-bench-") as folder:
        out = Path(folder) / "pipeline.yaml"
        took = [_compile(out) for _ in range(seeds)]
        size = out.stat().st_size / 2**10
        both = [_call(Path(folder) / str(turn)) for turn in range(seeds)]
    apart, whole = ([pair[place] for pair in both] for place in (0, 1))
    wall, work = ([(b[i] - a[i]) for a, b in both] for i in (0, 1))
    return [
        Row("imports of kfp and ours", median(first for first, _ in took), "s"),
        at_most("compiling, in a fresh process", median(last for _, last in took), 2.0, "s"),
        at_most("compiled IR", size, 512, "KiB"),
        Row(f"{len(MAIN.stages)} commands without work", median(each[0] for each in apart), "s"),
        Row("the DAG of them in KFP's local runner", median(each[0] for each in whole), "s"),
        at_most("the runner's overhead", median(wall), 3.0, "s"),
        Row("... in seconds of processors", median(work), "s"),
    ]


def _compile(out: Path) -> tuple[float, float]:
    """Seconds of importing, and of compiling."""
    command = [sys.executable, "-c", COMPILE, os.fspath(PARAMS), os.fspath(out)]
    env = {**os.environ, "PYTHONPATH": os.fspath(REPO_ROOT)}
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    imports, seconds = map(float, said.split())
    return imports, seconds


def _call(folder: Path) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds, by the clock and of processors, of all steps as commands, and as one local run of the DAG."""
    drawn = folder / ".retort/kfp/state/digits" / digits.MARK
    drawn.parent.mkdir(parents=True)
    drawn.touch()  # ingest does that, which does no work here
    paths = [REPO_ROOT / "tests/benchmarks/without_work", REPO_ROOT]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.fspath, paths)), "RETORT_RUN": "benchmark"}
    retort = [sys.executable, "-m", "pipelines.cli", "--params", os.fspath(PARAMS)]

    def call(*words: str) -> None:
        done = run([*retort, *words], folder, env)
        if done.status != 0:
            raise RuntimeError(f"retort {' '.join(words)}: {done.output}")

    begin = _now()
    for stage in MAIN.stages:
        option = [f"--{stage.step.option}", stage.option] if stage.step.option else []
        call(*stage.step.command.split(), *option)
    between = _now()
    call("submit", "--local")
    end = _now()
    return (between[0] - begin[0], between[1] - begin[1]), (end[0] - between[0], end[1] - between[1])


def _now() -> tuple[float, float]:
    """The clock, and what processes below this one have used of processors so far, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic(), used.ru_utime + used.ru_stime

"""The main job, ``dvc repro`` on the embedded data, in a clone of this checkout: time, memory, accuracy."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from tests.benchmarks.measure import Row, at_least, at_most, run

REPO_ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30


def measure(seeds: int) -> list[Row]:
    """Run the whole pipeline once a seed; the first run is cold, and timed."""
    with tempfile.TemporaryDirectory(prefix="retort-bench-") as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", os.fspath(REPO_ROOT), os.fspath(clone)], check=True)
        env = _environment(clone)
        rows = _first(clone, env)
        rows += _again(clone, env)
        rows += _accuracy(clone, env, seeds)
    return rows + _help() + _frame()


def _environment(clone: Path) -> dict[str, str]:
    # the clone's code, not the installed checkout's: it stands first on Python's path
    binaries = Path(sys.executable).parent
    return {
        **os.environ,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHONPATH": os.fspath(clone),
        "CI": "true",
    }


def _repro(clone: Path, env: dict[str, str]) -> tuple[float, int, str]:
    done = run(["dvc", "repro"], clone, env, echo=True)
    if done.status != 0:
        raise SystemExit(f"dvc repro failed with status {done.status}")
    return done.seconds, done.peak_bytes, done.output


def _first(clone: Path, env: dict[str, str]) -> list[Row]:
    seconds, peak, output = _repro(clone, env)
    rows = [
        at_most("main job, after set-up", seconds, 300, "s"),
        at_most("main job, peak memory", peak / GIB, 6, "GiB", "PSS of the process tree"),
    ]
    for step, taken in re.findall(r"(\S+): done in ([\d.]+) s", output):
        rows.append(Row(f"  step {step}", float(taken), "s"))
    return rows


def _again(clone: Path, env: dict[str, str]) -> list[Row]:
    second = run(["dvc", "repro"], clone, env)
    idle = "Running stage" not in second.output
    rows = [
        at_most("dvc repro a second time", second.seconds, 5, "s"),
        Row("  stages run by it", 0 if idle else second.output.count("Running stage"), "", "0", idle),
    ]
    params = clone / "params.yaml"
    before = params.read_text(encoding="utf-8")
    content = yaml.safe_load(before)
    content["benchmark"]["latency_budget_ms"] = 50.0
    params.write_text(yaml.safe_dump(content), encoding="utf-8")
    changed = run(["dvc", "repro"], clone, env)
    stages = set(re.findall(r"Running stage '([^']+)'", changed.output))
    wanted = {"benchmark", "register"}
    rows.append(
        Row(
            "stages run after benchmark.* changed",
            len(stages),
            "",
            "benchmark, register",
            stages == wanted,
            ", ".join(sorted(stages)),
        )
    )
    params.write_text(before, encoding="utf-8")
    return rows


def _accuracy(clone: Path, env: dict[str, str], seeds: int) -> list[Row]:
    found: dict[str, list[float]] = {"teacher": [], "student": [], "ratio": [], "gain": []}
    params = clone / "params.yaml"
    content = yaml.safe_load(params.read_text(encoding="utf-8"))
    first = content["global"]["seed"]
    for seed in range(first, first + seeds):
        content["global"]["seed"] = seed
        params.write_text(yaml.safe_dump(content), encoding="utf-8")
        _repro(clone, env)
        metrics = {who: _json(clone / "outputs" / who / "metrics.json") for who in ("teacher", "student")}
        found["teacher"].append(metrics["teacher"]["test"]["top1"])
        found["student"].append(metrics["student"]["test"]["top1"])
        measured = _json(clone / "outputs" / "benchmark" / "metrics.json")
        found["ratio"].append(measured["student_to_teacher"]["p50_ratio"])
    exports = clone / "outputs" / "export"
    sizes = [(exports / name).stat().st_size for name in ("model.onnx", "teacher/model.onnx")]
    note = f"mean of {seeds} seeds, "
    return [
        at_least(
            "teacher top-1, test",
            statistics.mean(found["teacher"]),
            0.97,
            "",
            note + _spread(found["teacher"]),
        ),
        at_least(
            "student top-1, test",
            statistics.mean(found["student"]),
            0.96,
            "",
            note + _spread(found["student"]),
        ),
        at_most("student's p50 to teacher's", max(found["ratio"]), 0.75, "x", f"worst of {seeds} runs"),
        at_most("student's file to teacher's", sizes[0] / sizes[1], 1.0, "x"),
    ]


def _spread(values: list[float]) -> str:
    return f"{min(values):.4f} to {max(values):.4f}"


def _json(path: Path) -> dict[str, dict[str, float]]:
    return json.loads(path.read_text(encoding="utf-8"))


def _help() -> list[Row]:
    command = [os.fspath(Path(sys.executable).with_name("retort")), "--help"]
    taken = []
    for _ in range(10):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - started)
    return [at_most("retort --help", statistics.median(taken), 0.5, "s", "median of 10")]


FRAME = """
import time
from pathlib import Path
from components.common.params import StepParams
from components.step import step
import mlflow, matplotlib.figure  # imports are not what is measured
for turn in range(4):
    started = time.perf_counter()
    with step("frame", StepParams(), Path("outputs/frame")) as run:
        for epoch in range(5):
            run.tracker.metrics({"loss": 1.0 / (epoch + 1)}, step=epoch)
        run.page.table("Table", ["a"], [[1]])
    print(time.perf_counter() - started)
"""


def _frame() -> list[Row]:
    """A step with no work of its own: what tracking, report and files cost, the first turn apart."""
    with tempfile.TemporaryDirectory(prefix="retort-bench-") as folder:
        done = subprocess.run(
            [sys.executable, "-c", FRAME], cwd=folder, check=True, capture_output=True, text=True
        )
    first, *later = [float(line) for line in done.stdout.split()]
    return [
        at_most("a step's own overhead", statistics.median(later), 3, "s", "median of 3 further steps"),
        Row("  the first, which makes the database", first, "s"),
    ]

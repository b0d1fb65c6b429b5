"""How benchmarks measure: a row a number, memory of a whole process tree, the same table for all."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

SAMPLE_SECONDS = 2.0  # reading the memory maps of a tree of large processes takes a tenth of a second


@dataclass
class Row:
    """One measured number, beside the one that is wanted (``None``: nothing is asked, it is for reading)."""

    name: str
    measured: float
    unit: str
    wanted: str = ""
    holds: bool | None = None
    note: str = ""


def at_most(name: str, measured: float, limit: float, unit: str, note: str = "") -> Row:
    return Row(name, measured, unit, f"<= {limit:g}", measured <= limit, note)


def at_least(name: str, measured: float, limit: float, unit: str, note: str = "") -> Row:
    return Row(name, measured, unit, f">= {limit:g}", measured >= limit, note)


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in ``folder``, with its own ``.retort``."""
    before = os.environ.pop("RETORT_STATE", None)
    try:
        with chdir(folder):
            yield
    finally:
        if before is not None:
            os.environ["RETORT_STATE"] = before


@dataclass
class Command:
    """What a command took: wall time in seconds, peak memory of its process tree in bytes, its output."""

    seconds: float
    peak_bytes: int
    status: int
    output: str


def run(command: Sequence[str], cwd: Path, env: Mapping[str, str], echo: bool = False) -> Command:
    """Run a command to its end; memory is the sum of PSS over its process tree, sampled now and then."""
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=cwd, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peak = 0
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        root = psutil.Process(process.pid)
        while not over.wait(SAMPLE_SECONDS):
            total = 0
            try:
                tree = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for member in tree:
                try:
                    total += member.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                    continue  # it ended between the listing and the look
            peak = max(peak, total)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if echo:
            print(f"    {line}", end="", file=sys.stderr, flush=True)
    status = process.wait()
    seconds = time.monotonic() - started
    over.set()
    watcher.join()
    return Command(seconds, peak, status, "".join(lines))


def table(rows: Sequence[Row]) -> str:
    """The rows as a table for a terminal."""
    widths = [max((len(row.name) for row in rows), default=6), 12, 10]
    lines = [f"{'number'.ljust(widths[0])}  {'measured'.rjust(12)}  {'wanted'.ljust(10)}"]
    for row in rows:
        verdict = {True: "holds", False: "MISSED", None: ""}[row.holds]
        measured = f"{row.measured:.4g} {row.unit}".rjust(12)
        lines.append(
            f"{row.name.ljust(widths[0])}  {measured}  {row.wanted.ljust(10)}  {verdict:<6}  {row.note}"
        )
    return "\n".join(line.rstrip() for line in lines)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": sys.version.split()[0],
    }

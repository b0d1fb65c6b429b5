"""What several test folders share: a copy of the checkout to run whole commands in, the same luck, sizes.

A test's size follows from how long it took when ``make sizes`` measured it: small ones are ``make check``,
medium ones join in ``make test``, large ones in continuous integration. What was not measured is medium.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import settings

from components.common.findings import Finding, read_report

REPO_ROOT = Path(__file__).resolve().parents[1]
DURATIONS = Path(__file__).with_name("durations.json")  # seconds of each test
MEDIUM, LARGE = 0.25, 2.0  # seconds from which on a test is one; see "tests" in CONTRIBUTING.md

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # in a background job; the commands that tests interrupt would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in each run: what passes here passes there. Others: pytest --hypothesis-seed=N
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--store-durations", action="store_true", help=f"rewrite tests/{DURATIONS.name}")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--store-durations"):
        config.pluginmanager.register(Durations())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its size."""
    known: dict[str, float] = json.loads(DURATIONS.read_text(encoding="utf-8")) if DURATIONS.exists() else {}
    for item in items:
        seconds = known.get(item.nodeid, MEDIUM)
        if seconds >= MEDIUM:
            item.add_marker("large" if seconds >= LARGE else "medium")


class Durations:
    """Measures every test, with the fixtures that are made for it, and keeps that, file by file."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._file = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.partition("::")[0]
        if file != self._file:
            self.pytest_sessionfinish()
            self._file = file
        self._seconds[report.nodeid] = self._seconds.get(report.nodeid, 0.0) + report.duration

    def pytest_sessionfinish(self) -> None:
        before = json.loads(DURATIONS.read_text(encoding="utf-8")) if DURATIONS.exists() else {}
        kept = before | {name: round(seconds, 1) for name, seconds in self._seconds.items()}
        DURATIONS.write_text(json.dumps(dict(sorted(kept.items())), indent=0) + "\n", encoding="utf-8")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """The same random numbers for each test, whichever run before it; torch begins anywhere unless told."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def descendants(parent: int, text: str) -> list[psutil.Process]:
    """The processes below ``parent`` whose command line has ``text`` in it; others may end meanwhile."""
    children = psutil.Process(parent).children(recursive=True)
    return [child for child in children if text in " ".join(_seen(child, psutil.Process.cmdline, []))]


def alive(process: psutil.Process) -> bool:
    """Whether it still runs; what nobody has reaped does not."""
    zombie = psutil.STATUS_ZOMBIE
    return process.is_running() and _seen(process, psutil.Process.status, zombie) != zombie


def _seen(process: psutil.Process, what: Callable[[psutil.Process], Any], gone: Any) -> Any:
    try:
        return what(process)
    except psutil.NoSuchProcess:  # a zombie's error is one of these
        return gone


class Checkout:
    """A copy of the working tree in a folder of its own, with its own git and DVC state."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=REPO_ROOT,
            check=True,
            capture_output=True,
        )
        for name in filter(None, listed.stdout.decode().split("\0")):
            if not (REPO_ROOT / name).is_file():
                continue
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO_ROOT / name, target)
        subprocess.run(["git", "init", "--quiet", os.fspath(folder)], check=True)

    def run(
        self, *command: str, env: Mapping[str, str] | None = None, timeout: float = 900
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as a person would, with this copy's code and the environment's tools."""
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment(env),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of those commands: this copy's code stands first on Python's path."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {
            **os.environ,
            "PATH": path,
            "PYTHONPATH": os.fspath(self.folder),
            "CI": "true",
            **(more or {}),
        }

    def retort(self, *arguments: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        """Run ``retort`` in this copy."""
        command: Sequence[str] = (sys.executable, "-m", "pipelines.cli", *arguments)
        return self.run(*command, timeout=timeout)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """One copy for the session: what is run in it stays there for the next test."""
    return Checkout(tmp_path_factory.mktemp("checkout"))


def bare(text: str) -> str:
    """Lines of a log without the time and the level that each begins with where there is no terminal."""
    return re.sub(r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [A-Z]+ ", "", text)


def findings(out: Path) -> dict[str, list[Finding]]:
    """The findings of the step that wrote ``out``, by rule, in the order of its report."""
    by_rule: dict[str, list[Finding]] = {}
    for finding in read_report(out / "report.json").findings:
        by_rule.setdefault(finding.rule, []).append(finding)
    return by_rule

"""What several test folders share: a copy of the checkout to run whole commands in, and the same luck."""

from __future__ import annotations

import os
import random
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

HOUSE = Path(__file__).resolve().parents[1]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # in a background job; the commands that tests interrupt would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in each run: what passes here passes there. Others: pytest --hypothesis-seed=N
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


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
            cwd=HOUSE,
            check=True,
            capture_output=True,
        )
        for name in filter(None, listed.stdout.decode().split("\0")):
            if not (HOUSE / name).is_file():
                continue
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(HOUSE / name, target)
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

"""The local run through KFP's own runner: what a person sees when it fails, or is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import alive, bare, descendants

REPO_ROOT = Path(__file__).resolve().parents[3]


def local(folder: Path, *overrides: str, **options: Any) -> subprocess.Popen[str]:
    """``retort submit --local`` as a person starts it, in an empty folder."""
    command = [sys.executable, "-m", "pipelines.cli", "--params", os.fspath(REPO_ROOT / "params.yaml")]
    for override in overrides:
        command += ["-o", override]
    return subprocess.Popen(
        [*command, "submit", "--local"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.fspath(REPO_ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_local_run_that_fails_names_the_step_and_what_it_said(tmp_path: Path) -> None:
    process = local(tmp_path, "data.source=nowhere", "data.root=nowhere")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    first, second = err.splitlines()[-2:]
    assert bare(first).startswith("retort: ingest: nowhere: no such folder")
    assert second.strip().startswith("see .retort/kfp/runs/")
    assert "\x1b" not in err
    assert "Traceback" not in out + err
    assert "\x1b" not in out
    assert [line for line in out.splitlines() if "failed: nowhere: no such folder" in line]
    assert "executor_input" not in out


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_local_run_and_its_component(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    process = local(tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if "Executing task 'ingest'" in line:
            break
    while not (components := descendants(process.pid, "executor_main")):
        time.sleep(0.2)
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == status
    deadline = time.monotonic() + 30
    while any(map(alive, components)):
        assert time.monotonic() < deadline, "the component goes on without anyone waiting for it"
        time.sleep(0.1)

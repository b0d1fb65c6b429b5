"""``retort ui``: MLflow's pages on the runs of a folder, from its start to Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from components.tracking.client import connect
from pipelines import cli, ui
from tests.conftest import alive

COMMAND = [sys.executable, "-m", "pipelines.cli", "ui"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("registry: {name: photos}\n")


@pytest.mark.slow
@pytest.mark.claim
def test_the_pages_are_served_on_the_next_free_port_and_ctrl_c_ends_all_of_it(tmp_path: Path) -> None:
    connect(f"sqlite:///{tmp_path}/.retort/mlflow/mlflow.db").create_experiment("photos")
    with socket.socket() as taken:
        taken.bind((ui.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        running = subprocess.Popen(
            [*COMMAND, "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert running.stdout is not None
        line = running.stdout.readline()
        runs = running.stdout.readline()
    try:
        assert line.startswith(f"MLflow: http://{ui.HOST}:"), running.communicate()
        url = line.split()[1]
        assert int(url.rsplit(":", 1)[1]) > port
        with urllib.request.urlopen(f"{url}/version") as answer:
            assert answer.status == 200
        assert runs == f"  runs: {url}/#/experiments/1/runs?workflowType=machine_learning\n", (
            "there is no model yet"
        )
        servers = psutil.Process(running.pid).children(recursive=True)
        assert servers
    finally:
        running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 0, said
    assert f"port {port} is taken" in said
    assert not [server for server in servers if alive(server)]


def test_a_folder_without_runs_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["ui"]) == 1
    assert ".retort/mlflow/mlflow.db: no such file, so there are no runs" in capsys.readouterr().err
    assert not Path(".retort/mlflow").exists()


def test_a_servers_address_is_said_without_its_password(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["ui", "-o", "registry.tracking_uri=http://me:secret@mlflow.example:80"]) == 0
    assert capsys.readouterr().out == "MLflow: http://mlflow.example:80\n"


def test_a_server_that_does_not_start_is_said_with_its_last_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".retort/mlflow").mkdir(parents=True)
    (tmp_path / ".retort/mlflow/mlflow.db").write_bytes(os.urandom(5000))
    assert cli.run(["ui", "--port", "5700"]) == 1
    assert "MLflow did not start: " in capsys.readouterr().err

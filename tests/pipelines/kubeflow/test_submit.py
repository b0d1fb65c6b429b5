"""Submitting: the contract with a KFP server, and what a person sees of a local run that fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kfp_server_api as api
import pytest

import components.common.progress  # noqa: F401 - lines get their handler
from components.common.errors import RetortError
from pipelines.kubeflow import client, dag, follow, submit
from pipelines.params import Params, load
from tests.conftest import alive, bare, descendants
from tests.pipelines.kubeflow.kfp_server import KfpServer

REPO_ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[KfpServer]:
    monkeypatch.setenv("HOME", os.fspath(tmp_path))  # kfp keeps settings there
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.05)
    with KfpServer() as running:
        yield running


def params(host: str, *overrides: str) -> Params:
    return load(
        REPO_ROOT / "params.yaml",
        [f"kubeflow.host={host}", "registry.tracking_uri=http://mlflow:5000", *overrides],
    )


def run(state: str, tasks: dict[str, str] | None = None, error: str = "") -> api.V2beta1Run:
    """What a poll sees."""
    details = [api.V2beta1PipelineTaskDetail(display_name=name, state=s) for name, s in (tasks or {}).items()]
    return api.V2beta1Run(
        state=state,
        error=api.GoogleRpcStatus(message=error) if error else None,
        run_details=api.V2beta1RunDetails(task_details=details),
    )


def test_a_run_gets_the_pipeline_its_parameters_and_its_experiment(server: KfpServer) -> None:
    wanted = params(server.url, "kubeflow.experiment=nightly", "student.train.epochs=9")
    run_id = submit.submit(wanted, wait=False)
    (sent,) = server.runs
    assert sent.run_id == run_id
    (experiment,) = server.experiments
    assert experiment.display_name == "nightly"
    assert sent.experiment_id == experiment.experiment_id
    assert sent.pipeline_version_reference.pipeline_version_id == server.versions[0].pipeline_version_id
    assert sent.runtime_config.parameters == dag.arguments(wanted)
    assert sent.runtime_config.parameters["student"]["train"]["epochs"] == 9
    assert server.versions[0].pipeline_spec["pipeline_spec"]["pipelineInfo"]["name"] == "retort-digits"


def test_a_new_version_is_uploaded_only_when_the_pipeline_changed(server: KfpServer) -> None:
    for shm in ("8Gi", "4Gi", "4Gi"):
        submit.submit(params(server.url, f"kubeflow.shm={shm}"), wait=False)
    assert len(server.pipelines) == 1
    used = [sent.pipeline_version_reference.pipeline_version_id for sent in server.runs]
    assert used == ["version-0", "version-1", "version-1"]
    assert len(server.experiments) == 1


def test_waiting_says_each_tasks_state_and_outlives_a_broken_poll(
    server: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.states = [
        run("RUNNING", {"ingest-driver": "SUCCEEDED", "ingest": "RUNNING"}),
        None,
        run("RUNNING", {"ingest": "SUCCEEDED", "validate": "RUNNING"}),
        run("SUCCEEDED", {"ingest": "SUCCEEDED", "validate": "SUCCEEDED"}),
    ]
    submit.submit(params(server.url), wait=True)
    said = bare(capsys.readouterr().err).splitlines()
    assert said[:4] == ["ingest: running", "ingest: succeeded", "validate: running", "validate: succeeded"]
    assert "succeeded" in said[4]


def test_a_failed_run_is_an_error_that_names_the_step(server: KfpServer) -> None:
    server.states = [run("FAILED", {"ingest": "SUCCEEDED", "check": "FAILED"}, error="exit status 1")]
    with pytest.raises(RetortError, match=r"the run failed at check: exit status 1\n.*/runs/details/run-0"):
        submit.submit(params(server.url), wait=True)


def test_a_cancelled_run_ends_the_waiting(server: KfpServer) -> None:
    server.states = [run("RUNNING"), run("CANCELING"), run("CANCELED")]
    with pytest.raises(RetortError, match="the run canceled"):
        submit.submit(params(server.url), wait=True)


def test_a_refusal_is_told_in_the_servers_words(server: KfpServer) -> None:
    server.refuse = (403, "user 'eve' may not create experiments")
    with pytest.raises(RetortError, match="403 Forbidden user 'eve' may not create experiments"):
        submit.submit(params(server.url), wait=False)


def test_no_host_says_what_to_give() -> None:
    with pytest.raises(RetortError, match=r"kubeflow.host is empty.*--local"):
        submit.submit(Params(), wait=False)


def test_a_host_that_is_no_url() -> None:
    with pytest.raises(RetortError, match=r"kubeflow.host 'kfp:8888': expected a URL"):
        submit.submit(params("kfp:8888"), wait=False)


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RetortError, match=rf"127.0.0.1:{port}: no KFP server answers there .*refused"):
        submit.submit(params(f"http://127.0.0.1:{port}"), wait=False)


def test_a_server_that_accepts_and_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RetortError, match=r"no KFP server answers there .*timed out"):
            submit.submit(params(url), wait=False)


def test_a_tracker_that_dies_with_each_pod_is_refused(server: KfpServer) -> None:
    with pytest.raises(RetortError, match=r"registry.tracking_uri 'sqlite:.* is a file"):
        submit.submit(params(server.url, "registry.tracking_uri=sqlite:///mlflow.db"), wait=False)
    assert server.runs == []


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

"""The end of a pipeline's run in MLflow, when pods were killed before they could tell theirs."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from components.common.params import Registry, StepParams
from components.step import step
from components.tracking import tracker
from components.tracking.client import connect, tracking_uri
from components.tracking.closing import close_run
from components.tracking.tracker import Tracker

REGISTRY = Registry(tracking_uri="sqlite:///.retort/mlflow/mlflow.db", name="demo")


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> None:
    (tmp_path / ".retort/mlflow").mkdir(parents=True)
    shutil.copy(empty_store, tmp_path / ".retort/mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETORT_STATE", ".retort")
    monkeypatch.setenv("RETORT_RUN", tmp_path.name)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setattr(tracker, "EVERY_SECONDS", 0.0)


def finish(name: str) -> None:
    """A step whose pod ends by itself."""
    with step(name, StepParams(registry=REGISTRY), Path(f"outputs/{name}")):
        pass


def die(name: str) -> None:
    """A step whose pod is gone after it began."""
    Tracker(name, REGISTRY).start({}, {})


def runs() -> dict[str, Any]:
    client = connect(tracking_uri(REGISTRY))
    experiment = client.get_experiment_by_name("demo")
    found = client.search_runs([experiment.experiment_id]) if experiment else []
    return {
        "parent" if "mlflow.parentRunId" not in run.data.tags else run.info.run_name: run for run in found
    }


def test_a_run_whose_pod_was_killed_is_closed_as_failed() -> None:
    finish("ingest")
    die("validate")
    assert runs()["parent"].info.status == runs()["validate"].info.status == "RUNNING"
    close_run(REGISTRY, "FAILED")
    found = runs()
    assert found["ingest"].info.status == "FINISHED"
    assert found["validate"].info.status == "KILLED"
    assert found["parent"].info.status == "FAILED"
    assert found["parent"].data.tags["step.validate"] == f"KILLED {found['validate'].info.run_id}"


@pytest.mark.parametrize(
    ("state", "verdict"),
    [("SUCCEEDED", "FINISHED"), ("COMPLETE", "FINISHED"), ("FAILED", "FAILED"), ("CANCELED", "KILLED"),
     ("RUNNING", "FAILED")],
)  # fmt: skip
def test_the_run_ends_as_the_steps_did(state: str, verdict: str) -> None:
    finish("ingest")
    close_run(REGISTRY, state)
    assert runs()["parent"].info.status == verdict


def test_a_server_that_still_calls_a_killed_step_complete_is_not_believed() -> None:
    finish("ingest")
    die("validate")
    close_run(REGISTRY, "COMPLETE")
    assert runs()["parent"].info.status == "FAILED"


@pytest.mark.parametrize("apart", [True, False], ids=["pods share no disk", "the first try's spool is found"])
def test_a_step_that_was_tried_again_and_passed_is_no_failure(
    apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    die("ingest")
    first = runs()["ingest"].info.run_id
    if apart:
        monkeypatch.setenv("RETORT_STATE", "another pod's")
    finish("ingest")
    close_run(REGISTRY, "SUCCEEDED")
    client = connect(tracking_uri(REGISTRY))
    assert client.get_run(first).info.status == "KILLED"
    parent = runs()["parent"]
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["step.ingest"].startswith("FINISHED ")


def test_another_pipelines_run_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    die("ingest")
    monkeypatch.setenv("RETORT_RUN", "another")
    close_run(REGISTRY, "SUCCEEDED")
    assert {run.info.status for run in runs().values()} == {"RUNNING"}


def test_a_run_that_kubeflow_opened_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    die("ingest")
    monkeypatch.setenv("MLFLOW_RUN_ID", "of-kubeflow")
    close_run(REGISTRY, "SUCCEEDED")
    assert runs()["parent"].info.status == "RUNNING"


def test_no_step_began_and_nobody_answers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        close_run(REGISTRY, "FAILED")
        close_run(Registry(tracking_uri="http://127.0.0.1:9", name="demo"), "FAILED")
    assert "no run of this pipeline in 'demo'" in caplog.text
    assert "http://127.0.0.1:9" in caplog.text
    assert "may stay open there" in caplog.text

"""What outlives a pod: its spool, and a failed step's report. A real MLflow server, and a real S3 server."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from components.common import object_store, shared
from components.common.errors import FindingsError
from components.common.params import StepParams
from components.step import step
from components.tracking import shared_spool, tracker
from components.tracking.client import connect
from components.tracking.replay import sync
from pipelines.cli.frame import run as command_line
from tests.components.conftest import MlflowServer, Store, free_port, no_other_keys

REPO_ROOT = Path(__file__).resolve().parents[3]
AWAY = "http://127.0.0.1:1"


@pytest.fixture(autouse=True)
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pod's folder, one of a pipeline's run, with a volume that all pods mount."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETORT_STATE", "disk-1")
    monkeypatch.setenv("RETORT_RUN", tmp_path.name)
    monkeypatch.setenv("RETORT_SHARED", str(tmp_path / "volume"))
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracker, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(object_store, "_clients", {})
    shared._shared.cache_clear()
    return tmp_path


def params(uri: str, name: str) -> StepParams:
    return StepParams.model_validate({"registry": {"tracking_uri": uri, "name": name}})


def fail(uri: str, name: str, step_name: str = "check", out: str = "outputs/check") -> FindingsError:
    with pytest.raises(FindingsError) as told, step(step_name, params(uri, name), Path(out)) as run:
        (run.out / "chart.png").write_bytes(b"a picture")
        (run.out / "large.csv").write_bytes(b"x" * 100)
        (run.out / "weights.bin").write_bytes(b"no part of a report")
        run.add_finding(
            "distill.teacher_accuracy",
            "error",
            "teacher",
            "The teacher is weak. " * 40,
            advice="Train longer.",
        )
        run.add_finding("distill.reference_lr", "error", "student", "The rate is ten times too high.")
    return told.value


def of(uri: str, name: str) -> dict[str, Any]:
    client = connect(uri)
    found = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    return {run.info.run_name: run for run in found}


# --- a failed step's report ---------------------------------------------------------------------------------


def test_a_failed_steps_report_lies_in_both_places_and_the_log_says_where(
    pod: Path, mlflow_server: MlflowServer
) -> None:
    error = fail(mlflow_server.uri, pod.name)
    (note,) = error.__notes__
    *said, in_mlflow, in_place = note.splitlines()
    assert said[0].startswith("distill.teacher_accuracy: The teacher is weak. The teacher")
    assert len(said[0]) < 340, "shortly"
    assert said[1] == "distill.reference_lr: The rate is ten times too high."
    place = pod / "volume/runs" / pod.name / "check"
    assert in_place == f"report: {place}/report.html"
    assert sorted(path.name for path in place.iterdir()) == [
        "chart.png", "large.csv", "report.html", "report.json",
    ]  # fmt: skip
    assert "The teacher is weak" in (place / "report.html").read_text()

    run = of(mlflow_server.uri, pod.name)["check"]
    experiment = run.info.experiment_id
    assert in_mlflow == (
        f"report: {mlflow_server.uri}/#/experiments/{experiment}/runs/{run.info.run_id}/artifacts/report.html"
    )
    artifacts = {item.path for item in connect(mlflow_server.uri).list_artifacts(run.info.run_id)}
    assert {"report.html", "report.json", "chart.png"} <= artifacts


def test_the_page_in_a_bucket_is_a_page_to_a_browser(
    pod: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_other_keys(monkeypatch, pod)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", store.url)
    monkeypatch.setenv("RETORT_SHARED", f"s3://photos/{pod.name}/")
    (note,) = fail(AWAY, pod.name).__notes__
    assert f"report: s3://photos/{pod.name}/runs/{pod.name}/check/report.html" in note.splitlines()
    assert "#/experiments" not in note, "MLflow was away"
    there = store.client.head_object(Bucket="photos", Key=f"{pod.name}/runs/{pod.name}/check/report.html")
    assert there["ContentType"] == "text/html"


def test_two_uses_of_a_step_have_two_pages(pod: Path) -> None:
    fail(AWAY, pod.name, "export", "outputs/export")
    fail(AWAY, pod.name, "export", "outputs/export/teacher")
    assert {path.name for path in (pod / "volume/runs" / pod.name).iterdir()} == {"export", "export-teacher"}


def test_a_step_that_crashes_says_so_in_its_page_too(pod: Path) -> None:
    with pytest.raises(ZeroDivisionError) as told, step("demo", params(AWAY, "x"), Path("outputs/demo")):
        1 // 0  # noqa: B018
    assert "demo.failed: ZeroDivisionError" in told.value.__notes__[0]
    assert (pod / "volume/runs" / pod.name / "demo/report.html").exists()


def test_a_place_that_is_away_changes_nothing_but_a_warning(
    pod: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(object_store, "HASTY_ATTEMPTS", 1)
    no_other_keys(monkeypatch, pod)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("RETORT_SHARED", "s3://photos/run")
    error = fail(AWAY, pod.name)
    assert "distill.teacher_accuracy" in str(error)
    assert "report:" not in error.__notes__[0]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len([line for line in warnings if line.startswith("kubeflow.state: ")]) == 1
    with step("demo", params(AWAY, pod.name), Path("outputs/demo")):
        pass
    assert Path("outputs/demo/run.json").exists(), "a step that passes passes"


def test_outside_a_pod_nothing_is_added(monkeypatch: pytest.MonkeyPatch, pod: Path) -> None:
    monkeypatch.delenv("RETORT_SHARED")
    monkeypatch.delenv("RETORT_RUN")
    error = fail("sqlite:///disk-1/mlflow.db", pod.name)
    assert not hasattr(error, "__notes__")


def test_the_command_line_ends_with_it_where_a_place_is_set(
    pod: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RETORT_RUN")
    Path("params.yaml").write_text(f"registry: {{tracking_uri: '{AWAY}'}}\ndata: {{source: nowhere}}\n")
    assert command_line(["ingest"]) == 1
    last = [line for line in capsys.readouterr().err.splitlines() if line.strip()][-1]
    assert re.search(r"report: .*/volume/runs/process-.*/ingest/report\.html$", last)


# --- the spool ----------------------------------------------------------------------------------------------


def copies(pod: Path) -> set[str]:
    folder = pod / "volume/spool"
    return {path.name for path in folder.iterdir() if any(path.iterdir())} if folder.exists() else set()


def test_what_a_pod_could_not_send_is_sent_by_the_next(
    pod: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    away = f"http://127.0.0.1:{port}"
    with step("finetune", params(away, pod.name), Path("outputs/teacher")) as run:
        run.tracker.metrics({"val_top1": 0.75}, step=1)
        (run.out / "history.csv").write_text("epoch\n1\n")
    assert len(copies(pod)) == 1
    monkeypatch.setenv("RETORT_STATE", "disk-2")
    assert sync(params(mlflow_server.uri, pod.name).registry) == {"sent": 1, "running": 0}
    run = of(mlflow_server.uri, pod.name)["finetune"]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["val_top1"] == 0.75
    artifacts = {item.path for item in connect(mlflow_server.uri).list_artifacts(run.info.run_id)}
    assert {"history.csv", "report.html"} <= artifacts
    assert copies(pod) == set()


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from components.common.params import StepParams
from components.step import step
from components.tracking import shared_spool

shared_spool.BEAT_SECONDS = 0.1
uri, name = sys.argv[1:]
params = StepParams.model_validate({"registry": {"tracking_uri": uri, "name": name}})
with step("finetune", params, Path("outputs/teacher")) as run:
    run.tracker.metrics({"val_top1": 0.75}, step=1)
    print("working", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("answers", [True, False])
def test_a_pod_that_is_killed_in_mid_work_is_told_by_the_next(
    pod: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    """``answers``: whether MLflow did while the first pod lived."""
    uri = mlflow_server.uri if answers else AWAY
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), uri, pod.name],
        env={**os.environ, "PYTHONPATH": os.fspath(REPO_ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    copied = pod / "volume/spool"
    while not any("val_top1" in path.read_text() for path in copied.glob("*/events.jsonl")):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()

    monkeypatch.setenv("RETORT_STATE", "disk-2")
    if answers:
        with step("check", params(uri, pod.name), Path("outputs/check")):
            pass
        assert of(uri, pod.name)["finetune"].info.status == "RUNNING", "it may live: it was heard just now"
    monkeypatch.setattr(shared_spool, "DEAD_SECONDS", 0.0)
    monkeypatch.setenv("RETORT_STATE", "disk-3")
    if answers:
        with step("distill", params(uri, pod.name), Path("outputs/student")):
            pass
    else:
        assert sync(params(mlflow_server.uri, pod.name).registry) == {"sent": 1, "running": 0}
    run = of(mlflow_server.uri, pod.name)["finetune"]
    assert run.info.status == "KILLED"
    assert run.data.metrics["val_top1"] == 0.75
    assert copies(pod) == set()


def test_two_that_take_over_do_not_take_the_same(
    pod: Path, monkeypatch: pytest.MonkeyPatch, mlflow_server: MlflowServer
) -> None:
    with step("finetune", params(AWAY, pod.name), Path("outputs/teacher")):
        pass
    monkeypatch.setenv("RETORT_STATE", "disk-2")
    assert shared_spool.adopt() == 1
    monkeypatch.setenv("RETORT_STATE", "disk-3")
    assert shared_spool.adopt() == 0
    monkeypatch.setattr(shared_spool, "TAKEN_SECONDS", -60.0)
    assert shared_spool.adopt() == 1, "whoever took it has failed"
    monkeypatch.setenv("RETORT_STATE", "disk-2")
    assert sync(params(mlflow_server.uri, pod.name).registry)["sent"] == 1
    monkeypatch.setenv("RETORT_STATE", "disk-3")
    assert sync(params(mlflow_server.uri, pod.name).registry)["sent"] == 1, "told twice, it is one run"
    assert len([name for name in of(mlflow_server.uri, pod.name) if name == "finetune"]) == 1


def test_only_what_was_meant_for_a_tracker_is_taken_for_it(
    pod: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with step("finetune", params(AWAY, pod.name), Path("outputs/teacher")):
        pass
    monkeypatch.setenv("RETORT_STATE", "disk-2")
    assert shared_spool.adopt("http://another") == 0
    assert shared_spool.adopt(AWAY, most=0) == 0
    assert shared_spool.adopt(AWAY) == 1

"""Tracking against real stores: a SQLite file, a real server, and servers that fail in every way."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow.data
import psutil
import pytest
import yaml

from components.common.errors import FindingsError, RetortError
from components.common.params import Registry, StepParams
from components.step import read_run_id, step
from components.tracking import machine, replay, run_identity, tracker
from components.tracking.client import connect, first_line, tracking_uri
from components.tracking.replay import sync

REPO_ROOT = Path(__file__).resolve().parents[3]
SQLITE = "sqlite:///.retort/mlflow/mlflow.db"


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's SQLite file without any runs: its migrations take seconds, a copy does not."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Path:
    """A project folder; every test is a pipeline run of its own; replays are not rate-limited."""
    folder = tmp_path / "my project"
    (folder / ".retort/mlflow").mkdir(parents=True)
    shutil.copy(empty_store, folder / ".retort/mlflow")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RETORT_RUN", tmp_path.name)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracker, "EVERY_SECONDS", 0.0)
    return folder


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """An experiment of the test's own on the shared server."""
    return request.node.name


def params(uri: str = SQLITE, name: str = "demo") -> StepParams:
    return StepParams.model_validate({"registry": {"tracking_uri": uri, "name": name}})


def run_step(
    p: StepParams, name: str = "finetune", out: str = "outputs/teacher", inputs: tuple[str, ...] = ()
) -> dict[str, Any]:
    with step(name, p, Path(out), [Path(name) for name in inputs]) as run:
        run.tracker.metrics({"val_top1": 0.5}, step=0)
        run.tracker.metrics({"val_top1": 0.75}, step=1)
        run.tracker.summary({"top1": 0.75})
    return read_run_id(Path(out))


def client(uri: str = SQLITE) -> Any:
    return connect(tracking_uri(Registry(tracking_uri=uri)))


def runs(uri: str = SQLITE, name: str = "demo") -> dict[str, Any]:
    """All runs of an experiment by name; a name that stands twice fails the test."""
    experiment = client(uri).get_experiment_by_name(name)
    found = client(uri).search_runs([experiment.experiment_id])
    names = [run.info.run_name for run in found]
    assert len(set(names)) == len(names), f"doubled: {names}"
    return {run.info.run_name: run for run in found}


def history(run: Any, metric: str, uri: str = SQLITE) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client(uri).get_metric_history(run.info.run_id, metric))


def parent_of(found: dict[str, Any]) -> Any:
    return next(run for run in found.values() if "mlflow.parentRunId" not in run.data.tags)


def spooled() -> list[Path]:
    return list(Path(".retort/spool").iterdir())


def test_a_step_is_a_child_of_the_pipelines_run(project: Path) -> None:
    Path("data").mkdir()
    Path("data/clean.parquet").write_bytes(b"rows")
    out = Path("outputs/teacher")
    inputs = [Path("data/clean.parquet")]
    with step("finetune", params(), out, inputs) as run:
        run.tracker.dataset("digits", "ab" * 32, Path("data/clean.parquet"), {"train": 8, "val": 2})
        run.tracker.metrics({"val_top1": 0.5, "recall/class é%": 0.25}, step=0)
        run.tracker.metrics({"val_top1": 0.75}, step=1)
        run.tracker.summary({"top1": 0.75})
        run.tracker.tags({"network": "lite1"})
        run.tracker.tags({"alias": "champion"}, above=True)
        run.product(out / "history.csv").write_text("epoch,val_top1\n0,0.5\n")

    found = runs()
    child, parent = found["finetune"], parent_of(found)
    assert child.info.status == parent.info.status == "FINISHED"
    assert child.data.params["report.thumbnails"] == "true"
    assert parent.data.params["registry.name"] == "demo"
    assert history(child, "val_top1") == [(0, 0.5), (1, 0.75)]
    assert child.data.metrics["recall/class é_"] == 0.25
    assert parent.data.metrics == {"finetune.top1": 0.75}
    assert child.data.tags["input.data/clean.parquet"] == tracking_input(inputs)
    assert child.data.tags["network"] == "lite1"
    assert (child.data.tags["alias"], parent.data.tags["alias"]) == ("champion", "champion")
    assert "network" not in parent.data.tags
    assert child.data.tags["data.fingerprint"] == "ab" * 32
    used = {each.tags[0].value: each.dataset for each in child.inputs.dataset_inputs}
    assert {context: (each.name, each.digest) for context, each in used.items()} == {
        "training": ("digits train", ("ab" * 32)[:36]), "validation": ("digits val", ("ab" * 32)[:36]),
    }  # fmt: skip
    assert json.loads(used["validation"].profile) == {"fingerprint": "ab" * 32, "rows": 2}
    assert Path(mlflow.data.get_source(used["training"]).load()).read_bytes() == b"rows"
    assert [each.dataset.name for each in parent.inputs.dataset_inputs] == ["digits"]
    assert parent.data.tags["step.finetune"] == f"FINISHED {child.info.run_id}"
    artifacts = [item.path for item in client().list_artifacts(child.info.run_id)]
    assert artifacts == ["history.csv", "report.html", "report.json"]
    assert (project / ".retort/mlflow/artifacts" / child.info.run_id).is_dir()

    kept = client().get_experiment_by_name("demo").tags["mlflow.sharedViewState.retort"]
    shown = json.loads(zlib.decompress(base64.b64decode(kept.removeprefix("deflate;"))))
    assert "metrics.`distill.val_top1`" in shown["selectedColumns"]

    left = read_run_id(out)
    assert (left["run_id"], left["parent_run_id"]) == (child.info.run_id, parent.info.run_id)
    assert left["id"] == child.data.tags["retort.id"]
    assert spooled() == []


def tracking_input(inputs: list[Path]) -> str:
    return json.loads(Path("outputs/teacher/report.json").read_text())["inputs"]["data/clean.parquet"]


def test_a_step_that_fails_is_recorded_as_failed() -> None:
    run_step(params(), "ingest", "outputs/ingest")
    with pytest.raises(FindingsError), step("check", params(), Path("outputs/check")) as run:
        run.add_finding("distill.teacher_accuracy", "error", "teacher", "teacher is weak")
    found = runs()
    assert [found["check"].info.status, found["ingest"].info.status] == ["FAILED", "FINISHED"]
    assert parent_of(found).info.status == "FAILED"
    run_step(params(), "check", "outputs/check2")  # it is run again, as a retry does
    experiment = client().get_experiment_by_name("demo").experiment_id
    query = "tags.`retort.key` LIKE 'run:%'"
    assert client().search_runs([experiment], query)[0].info.status == "FINISHED"


def test_a_step_that_is_used_twice_has_two_names() -> None:
    for out in ("outputs/export", "outputs/export/teacher"):
        run_step(params(), "export", out)
    found = runs()
    assert {"export", "export-teacher"} < set(found)
    assert set(parent_of(found).data.metrics) == {"export.top1", "export-teacher.top1"}


def test_a_parameter_that_changes_within_a_run_keeps_its_first_value_on_the_parent() -> None:
    run_step(params(), "ingest", "outputs/ingest")
    changed = StepParams.model_validate({**params().model_dump(by_alias=True), "global": {"seed": 8}})
    run_step(changed, "validate", "outputs/validate")
    found = runs()
    seeds = [run.data.params["global.seed"] for run in (found["validate"], parent_of(found))]
    assert seeds == ["8", "7"]
    assert spooled() == []


def test_a_large_file_is_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    with step("benchmark", params(), Path("outputs/benchmark")) as run:
        path = Path("outputs/benchmark/results.csv")
        path.write_bytes(b"0" * (tracker.MAX_ARTIFACT_BYTES + 1))
        assert run.name == "benchmark"
    assert "outputs/benchmark/results.csv is 10.0 MB: not copied into MLflow" in capsys.readouterr().err
    artifacts = [item.path for item in client().list_artifacts(runs()["benchmark"].info.run_id)]
    assert artifacts == ["report.html", "report.json"]


def test_what_a_killed_server_missed_is_synced_and_never_doubled(
    mlflow_server: Any, name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    uri = mlflow_server.uri
    p = params(uri, name)
    with step("finetune", p, Path("outputs/teacher")) as run:
        run.tracker.metrics({"val_top1": 0.5}, step=0)
        before = history(runs(uri, name)["finetune"], "val_top1", uri)
        mlflow_server.kill()
        run.tracker.metrics({"val_top1": 0.75}, step=1)
        run.tracker.metrics({"val_top1": 0.875}, step=2)
        run.tracker.summary({"top1": 0.875})
    assert before == [(0, 0.5)], "values appear while the step runs"
    assert capsys.readouterr().err.count("tracking:") == 1
    assert len(spooled()) == 1
    with pytest.raises(RetortError, match="did not take 1 steps"):
        sync(p.registry)

    mlflow_server.start()
    spool = tmp_path / "spool"
    shutil.copytree(".retort/spool", spool)
    assert sync(p.registry) == {"sent": 1, "running": 0}
    assert sync(p.registry) == {"sent": 0, "running": 0}

    def check() -> None:
        found = runs(uri, name)
        assert len(found) == 2
        assert history(found["finetune"], "val_top1", uri) == [(0, 0.5), (1, 0.75), (2, 0.875)]
        assert history(parent_of(found), "finetune.top1", uri) == [(0, 0.875)]
        assert {run.info.status for run in found.values()} == {"FINISHED"}
        assert found["finetune"].info.run_id == read_run_id(Path("outputs/teacher"))["run_id"]

    check()
    # the same events again, as after a sync that was killed before it could note what it had sent
    shutil.copytree(spool, ".retort/spool", dirs_exist_ok=True)
    next(Path(".retort/spool").glob("*/cursor.json")).unlink()
    assert sync(p.registry)["sent"] == 1
    check()


def test_a_request_that_hung_leaves_its_step_to_a_sync_in_the_same_process(
    mlflow_server: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "BUDGET_SECONDS", 1.0)
    monkeypatch.setattr(tracker, "REQUEST_SECONDS", 120)
    p = params(mlflow_server.uri, name)
    with step("finetune", p, Path("outputs/teacher")) as run:
        run.tracker.metrics({"val_top1": 0.5}, step=0)
        mlflow_server.signal(signal.SIGSTOP)
        run.tracker.metrics({"val_top1": 0.75}, step=1)  # hangs, and the step goes on to its end
    assert sync(p.registry) == {"sent": 0, "running": 1}, "a thread of this process still waits for an answer"
    mlflow_server.signal(signal.SIGCONT)
    until = time.monotonic() + 120
    while sync(p.registry)["running"]:
        assert time.monotonic() < until, "the step stays with a thread that has ended"
        time.sleep(0.1)
    found = runs(mlflow_server.uri, name)
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert history(found["finetune"], "val_top1", mlflow_server.uri) == [(0, 0.5), (1, 0.75)]
    assert spooled() == []


@pytest.mark.parametrize("pod", [True, False])
def test_a_pod_whose_spool_ends_with_it_waits_for_a_busy_server(
    mlflow_server: Any, name: str, pod: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "BUDGET_SECONDS", 1.0)
    if pod:
        monkeypatch.setenv("_KFP_RUNTIME", "true")
    p = params(mlflow_server.uri, name)
    with step("finetune", p, Path("outputs/teacher")) as run:
        mlflow_server.signal(signal.SIGSTOP)
        awake = threading.Timer(4, mlflow_server.signal, [signal.SIGCONT])
        if pod:
            awake.start()
        run.tracker.metrics({"val_top1": 0.5}, step=0)
    mlflow_server.signal(signal.SIGCONT)
    assert bool(spooled()) != pod, "elsewhere a sync sends it later"
    if pod:
        assert runs(mlflow_server.uri, name)["finetune"].info.status == "FINISHED"


def test_a_port_that_does_not_answer_costs_a_line_and_the_spool(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        left = run_step(params(f"http://user:secret@127.0.0.1:{taken.getsockname()[1]}"))
    err = capsys.readouterr().err
    assert err.count("tracking:") == 1
    assert "retort sync" in err
    assert "secret" not in err
    assert left["run_id"] == ""
    assert json.loads(Path("outputs/teacher/report.json").read_text())["passed"] is True
    # the address was wrong: with the right one, everything is sent
    assert sync(params().registry) == {"sent": 1, "running": 0}
    found = runs()
    assert history(found["finetune"], "val_top1") == [(0, 0.5), (1, 0.75)]
    assert found["finetune"].data.tags["retort.id"] == left["id"]


class _Broken(BaseHTTPRequestHandler):
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        self.send_error(500)

    do_POST = do_PUT = do_GET  # noqa: N815 - the names that the base class calls

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def broken_server() -> Iterator[str]:
    """A server that answers everything with 500."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_store_that_fails_costs_a_line_that_names_the_cause(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with sqlite3.connect(project / ".retort/mlflow/mlflow.db") as database:
        database.execute("DROP TABLE latest_metrics")  # as on a full disk: it fails in the middle of a flush
    run_step(params())
    said = capfd.readouterr().err
    assert "latest_metrics" in said
    assert "Traceback" not in said
    assert len(said.splitlines()) == 2, "the warning, and that the step is done"
    reason = (
        "(raised as a result of autoflush)\n(sqlite3.OperationalError) database or disk is full\n[SQL: x]"
    )
    assert first_line(RuntimeError(reason)).endswith("database or disk is full")


def test_a_server_that_answers_500_counts_as_away(
    broken_server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_step(params(broken_server))
    assert capsys.readouterr().err.count("tracking:") == 1
    assert len(spooled()) == 1
    assert 0 < _Broken.requests <= 4, "once at the start, once at the end, no storm of retries"
    run_step(params())  # a step that gets through leaves what was meant for another server alone
    assert len(spooled()) == 1


def test_a_server_that_never_answers_holds_nothing_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "BUDGET_SECONDS", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # connections are taken, requests are never answered
        run_step(params(f"http://127.0.0.1:{silent.getsockname()[1]}"))
    assert capsys.readouterr().err.count("tracking:") == 1
    assert len(spooled()) == 1


@pytest.mark.parametrize("nested", [False, True], ids=["the pipeline's run", "the task's run"])
def test_a_run_that_kfp_opened_is_adopted(nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = tracking_uri(Registry(tracking_uri="sqlite:///kfp.db"))
    kfp = client(uri)
    experiment = kfp.create_experiment("pipelines")
    pipeline = kfp.create_run(experiment, run_name="kfp's run")
    task = kfp.create_run(experiment, run_name="task", tags={"mlflow.parentRunId": pipeline.info.run_id})
    monkeypatch.setenv("MLFLOW_RUN_ID", (task if nested else pipeline).info.run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)

    left = run_step(params())

    found = runs(uri, "pipelines")
    assert set(found) == {"kfp's run", "task", *([] if nested else ["finetune"])}, "no second child of a task"
    assert left["parent_run_id"] == pipeline.info.run_id
    own = found["task" if nested else "finetune"]
    assert left["run_id"] == own.info.run_id
    assert own.data.tags["mlflow.parentRunId"] == pipeline.info.run_id
    assert own.data.tags["retort.step"] == "finetune"
    assert own.data.metrics["val_top1"] == 0.75
    assert own.data.params["registry.name"] == "demo"
    assert found["kfp's run"].data.metrics["finetune.top1"] == 0.75
    assert found["kfp's run"].info.status == "RUNNING", "who opened it ends it"
    assert own.info.status == ("RUNNING" if nested else "FINISHED")


def test_a_run_that_was_named_to_two_steps_is_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = tracking_uri(Registry(tracking_uri="sqlite:///own.db"))
    own = client(uri)
    experiment = own.create_experiment("mine")
    above = own.create_run(experiment, run_name="above")
    below = own.create_run(experiment, run_name="below", tags={"mlflow.parentRunId": above.info.run_id})
    monkeypatch.setenv("MLFLOW_RUN_ID", below.info.run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for name in ("validate", "plan"):
        run_step(params(), name, f"outputs/{name}")
    found = runs(uri, "mine")
    assert set(found) == {"above", "below", "plan"}
    assert found["below"].data.tags["retort.step"] == "validate"
    assert found["plan"].data.tags["mlflow.parentRunId"] == above.info.run_id


STEP_SCRIPT = """
import os, sys
from pathlib import Path
from components.common.params import StepParams
from components.step import step

name, out, reads, makes = sys.argv[1:5]
inputs = [Path(file) for file in reads.split(",") if file]
with step(name, StepParams(), Path(out), inputs) as run:
    run.tracker.metrics({"loss": 1.0}, step=0)
    if makes == "dies":
        os.kill(os.getpid(), 9)
    run.product(Path(makes)).write_text(f"{name} {os.environ.get('FLAVOUR')}")
"""


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(REPO_ROOT), "PATH": path, "DVC_NO_ANALYTICS": "1", **more}


def start_script(*arguments: str, **more: str) -> subprocess.Popen[str]:
    Path("step.py").write_text(STEP_SCRIPT)
    command = [sys.executable, "step.py", *arguments]
    return subprocess.Popen(command, env=environment(**more), stderr=subprocess.PIPE, text=True)


def test_two_processes_that_make_the_store_at_once_share_one_parent() -> None:
    shutil.rmtree(".retort")
    processes = [
        start_script(name, f"outputs/audit/{name}", "", f"outputs/audit/{name}/part.json")
        for name in ("imbalance", "synthetic")
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    for text in errors:
        # a slow machine says what it is at, too
        said = [line for line in text.splitlines() if not re.search(r" INFO   .* MLflow \(\d+ s\)$", line)]
        assert len(said) == 1, f"only the step's own last line is said: {text}"
    found = runs(name="retort")
    assert len(found) == 3
    assert parent_of(found).info.status == "FINISHED"


def test_a_run_that_two_pods_made_at_once_becomes_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = tracking_uri(Registry())
    look = replay.only_run
    looked: list[str] = []

    def too_early(client: Any, experiment: str, stable_id: str) -> Any:
        """The second pod has looked before the first had made the run."""
        looked.append(stable_id)
        return None if len(looked) == 1 else look(client, experiment, stable_id)

    with step("ingest", params(), Path("outputs/ingest")) as first:
        first.tracker.dataset("digits", "ab" * 32, Path("images"), {"train": 8})
        first.tracker.summary({"rows": 8})
        first.tracker.metrics({"read": 8})
        monkeypatch.setenv("RETORT_STATE", os.fspath(tmp_path / "second pod"))
        record = run_identity.pipeline_run("weights", uri, "demo")
        run_identity.remember({**record, "started": record["started"] - 60_000})  # its clock is behind
        monkeypatch.setattr(replay, "only_run", too_early)
        run_step(params(), "weights", "outputs/weights")
        monkeypatch.delenv("RETORT_STATE")
        first.tracker.summary({"classes": 2})
    run_step(params(), "validate", "outputs/validate")

    found = runs()
    parent = parent_of(found)
    assert set(found) == {"ingest", "weights", "validate", parent.info.run_name}
    assert looked[0] == parent.data.tags["retort.id"]
    for name in ("ingest", "weights", "validate"):
        assert found[name].data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert parent.data.tags[f"step.{name}"] == f"FINISHED {found[name].info.run_id}"
    told = {"ingest.rows": 8, "ingest.classes": 2, "weights.top1": 0.75, "validate.top1": 0.75}
    assert parent.data.metrics == told
    assert [each.dataset.name for each in parent.inputs.dataset_inputs] == ["digits"]
    assert parent.info.status == "FINISHED"


def test_a_run_that_a_server_made_late_is_moved_into_the_one_that_is_used() -> None:
    """The request was given up, and done all the same."""
    with step("ingest", params(), Path("outputs/ingest")) as run:
        run.tracker.summary({"rows": 8})
        used = parent_of(runs())
        tags = {key: used.data.tags[key] for key in ("retort.id", "retort.key")}
        client().create_run(used.info.experiment_id, used.info.start_time - 1, tags, "late")
    found = runs()
    assert set(found) == {"late", "ingest"}
    assert found["ingest"].data.tags["mlflow.parentRunId"] == found["late"].info.run_id
    assert found["late"].data.metrics == {"ingest.rows": 8}
    assert found["late"].data.tags["step.ingest"] == f"FINISHED {found['ingest'].info.run_id}"
    assert found["late"].info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["a file", "a server"])
def test_eight_processes_that_start_at_once_share_one_parent(
    where: str, mlflow_server: Any, name: str, project: Path
) -> None:
    """Of a server: each with a state of its own, as pods have."""
    uri = SQLITE if where == "a file" else mlflow_server.uri
    script = Path("at_once.py")
    script.write_text(AT_ONCE)
    processes = []
    for number in range(8):
        more = {} if where == "a file" else {"RETORT_STATE": os.fspath(project / f"pod-{number}")}
        command = [sys.executable, script, str(number), uri, name]
        processes.append(
            subprocess.Popen(command, env=environment(**more), stderr=subprocess.PIPE, text=True)
        )
    while len(list(project.glob("ready-*"))) < 8:
        assert not [process.returncode for process in processes if process.poll()]
        time.sleep(0.1)
    Path("go").touch()
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, said
    for number in range(8):  # what a loaded machine's server did not take in time
        state = {} if where == "a file" else {"RETORT_STATE": os.fspath(project / f"pod-{number}")}
        with pytest.MonkeyPatch.context() as patch:
            for key, value in state.items():
                patch.setenv(key, value)
            assert sync(params(uri, name).registry)["running"] == 0
    found = runs(uri, name)
    parent = parent_of(found)
    assert len(found) == 9
    for number in range(8):
        own = found[f"step-{number}"]
        assert own.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert parent.data.tags[f"step.step-{number}"] == f"FINISHED {own.info.run_id}"
        assert own.data.params["global.seed"] == str(number)
        assert parent.data.metrics[f"step-{number}.number"] == number
    assert int(parent.data.params["global.seed"]) in range(8), "that of the first"
    assert parent.info.status == "FINISHED"


AT_ONCE = """
import sys, time
from pathlib import Path
from components.common.params import StepParams
from components.step import step
from components.tracking.client import connect

number, uri, name = sys.argv[1:4]
import mlflow
Path(f"ready-{number}").touch()
while not Path("go").exists():
    time.sleep(0.01)
given = {"registry": {"tracking_uri": uri, "name": name}, "global": {"seed": int(number)}}
params = StepParams.model_validate(given)
with step(f"step-{number}", params, Path(f"outputs/{number}")) as run:
    run.tracker.summary({"number": int(number)})
"""


def test_the_machine_is_watched_beside_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "EVERY_SECONDS", 0.05)
    before = set(threading.enumerate())  # other tests leave steps without an end
    with step("finetune", params(), Path("outputs/teacher")) as run:
        file = spooled()[0] / "events.jsonl"
        while file.read_text().count("system/cpu_utilization_percentage") < 3:
            time.sleep(0.05)
        run.tracker.metrics({"val_top1": 0.5})
    child = runs()["finetune"]
    names = (
        "cpu_utilization_percentage", "system_memory_usage_megabytes", "system_memory_usage_percentage",
        "disk_usage_percentage", "disk_usage_megabytes", "disk_available_megabytes",
        "network_receive_megabytes", "network_transmit_megabytes",
    )  # fmt: skip
    assert {f"system/{name}" for name in names} <= set(child.data.metrics)
    memory = history(child, "system/system_memory_usage_megabytes")
    assert [number for number, _ in memory] == list(range(len(memory)))
    assert 0 < memory[0][1] < psutil.virtual_memory().total / 1e6
    assert not [one for one in set(threading.enumerate()) - before if one.name == "machine"]


def test_a_driver_that_fails_ends_the_watch_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def collect_metrics(self) -> None:
            raise RuntimeError("driver gone")

    monkeypatch.setattr(machine, "monitors", lambda: [Broken()])
    run_step(params())
    assert runs()["finetune"].info.status == "FINISHED"
    assert "driver gone" in capsys.readouterr().err


def test_kubeflows_run_and_mlflows_point_at_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETORT_RUN", "5f2c")
    monkeypatch.setenv("RETORT_RUN_PAGE", "https://kubeflow.example/pipeline/#/runs/details/RUN?ns=ada")
    run_step(params())
    tags = parent_of(runs()).data.tags
    assert tags["kfp.run_id"] == "5f2c"
    assert tags["kfp.run_page"] == "https://kubeflow.example/pipeline/#/runs/details/5f2c?ns=ada"


def test_a_step_that_was_killed_is_closed_by_the_next() -> None:
    died = start_script("distill", "outputs/student", "", "dies")
    died.communicate()
    assert died.returncode == -signal.SIGKILL
    assert runs(name="retort")["distill"].info.status == "RUNNING"
    run_step(params(name="retort"), "export", "outputs/export")
    assert runs(name="retort")["distill"].info.status == "KILLED"
    assert spooled() == []


def test_a_partial_dvc_repro_opens_a_parent_that_names_the_steps_it_reused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("step.py").write_text(STEP_SCRIPT)
    stages = {
        "ingest": ("outputs/ingest", "", "data/manifest.parquet", "step.py"),
        "validate": ("outputs/validate", "data/manifest.parquet", "data/clean.parquet", ""),
        "finetune": ("outputs/teacher", "data/clean.parquet", "outputs/teacher/model.safetensors", "flavour"),
        "register": ("outputs/register", "outputs/teacher/model.safetensors", "outputs/register/r.json", ""),
    }
    lines = ["stages:"]
    for name, (out, reads, makes, more) in stages.items():
        deps = ", ".join(filter(None, (reads, more)))
        lines += [
            f"  {name}:",
            f"    cmd: FLAVOUR=$(cat flavour) python step.py {name} {out} '{reads}' {makes}",
            f"    deps: [{deps}]",
            f"    outs: [{out}{'' if makes.startswith(out) else f', {makes}'}]",
        ]
    Path("dvc.yaml").write_text("\n".join(lines))
    Path("flavour").write_text("vanilla")
    monkeypatch.delenv("RETORT_RUN")

    def dvc(*words: str) -> None:
        subprocess.run(["dvc", *words], env=environment(), check=True, capture_output=True)

    def parents() -> list[Any]:
        experiment = client().get_experiment_by_name("retort").experiment_id
        found = client().search_runs([experiment], order_by=["attributes.start_time ASC"])
        return [run for run in found if "mlflow.parentRunId" not in run.data.tags]

    dvc("init", "--no-scm", "--quiet")
    dvc("repro", "--quiet")
    Path("flavour").write_text("mint")
    dvc("repro", "--quiet", "finetune")

    whole, partial = parents()
    assert all(re.fullmatch(r"dvc repro \d\d-\d\d \d\d:\d\d", run.info.run_name) for run in (whole, partial))
    assert whole.info.run_id != partial.info.run_id
    verdicts = {key: value.split()[0] for key, value in whole.data.tags.items() if key.startswith("step.")}
    assert verdicts == {f"step.{name}": "FINISHED" for name in stages}
    tags = {key: value for key, value in partial.data.tags.items() if key.startswith("step.")}
    assert tags == {
        "step.ingest": f"reused {read_run_id(Path('outputs/ingest'))['run_id']}",
        "step.validate": f"reused {read_run_id(Path('outputs/validate'))['run_id']}",
        "step.finetune": f"FINISHED {read_run_id(Path('outputs/teacher'))['run_id']}",
    }  # register comes after it, and was neither run nor reused

    # dvc.lock and MLflow point at each other
    lock = yaml.safe_load(Path("dvc.lock").read_text())["stages"]
    for name in stages:
        kept = {f"dvc.{out['path']}": out["md5"] for out in lock[name]["outs"]}
        left = read_run_id(Path(stages[name][0]))["run_id"]
        tags = client().get_run(left).data.tags
        assert {key: value for key, value in tags.items() if key.startswith("dvc.")} == kept, name
    found = client().search_runs(
        [whole.info.experiment_id], f"tags.`dvc.outputs/teacher` = '{kept_teacher(lock)}'"
    )
    assert [run.info.run_name for run in found] == ["finetune"]


def kept_teacher(lock: dict[str, Any]) -> str:
    return next(out["md5"] for out in lock["finetune"]["outs"] if out["path"] == "outputs/teacher")


def test_a_database_that_was_left_half_made_is_made_anew(tmp_path: Path) -> None:
    database = tmp_path / "half/mlflow.db"
    database.parent.mkdir()
    made = sqlite3.connect(database)
    made.execute("create table datasets (a)")  # as MLflow's migrations left it on a full disk
    made.commit()
    made.close()
    (database.parent / "mlflow.db.making-0").touch()
    assert connect(f"sqlite:///{database}").search_experiments()
    assert not list(database.parent.glob("*.making-*"))
    connect.cache_clear()
    connect(f"sqlite:///{database}").create_experiment("kept")
    assert connect(f"sqlite:///{database}").get_experiment_by_name("kept")

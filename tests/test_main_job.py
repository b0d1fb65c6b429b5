"""The main job, end to end, on a smaller setting: through DVC, through KFP, and what a person sees of it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from components.common.storage import sha256_file
from pipelines.steps import MAIN
from tests.conftest import Checkout

pytestmark = [pytest.mark.timeout(1500), pytest.mark.large]

# small enough for a test, and still every step does its real work on real digits
SMALLER: dict[str, Any] = {
    "global": {"image_size": 32},
    "teacher": {"train": {"epochs": 3}},
    "student": {"train": {"epochs": 3}},
    "distill": {"min_teacher_accuracy": 0.5, "control": False},
    "export": {"min_accuracy": 0.3},
    "benchmark": {"time_budget_s": 6.0, "threads": [1], "batch_sizes": [1]},
}


def merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict):
            merge(values.setdefault(key, {}), value)
        else:
            values[key] = value


@pytest.fixture(scope="module")
def repro(checkout: Checkout) -> subprocess.CompletedProcess[str]:
    """``dvc repro`` from nothing, once for all tests of this file."""
    params = checkout.folder / "params.yaml"
    values = yaml.safe_load(params.read_text(encoding="utf-8"))
    merge(values, SMALLER)
    params.write_text(yaml.safe_dump(values), encoding="utf-8")
    done = checkout.run("dvc", "repro")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture
def outputs(repro: subprocess.CompletedProcess[str], checkout: Checkout) -> Path:
    return checkout.folder / "outputs"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_step_leaves_a_passed_report(outputs: Path) -> None:
    for stage in MAIN.stages:
        folder = outputs.parent / stage.folder
        report = read(folder / "report.json")
        assert report["passed"], stage.name
        assert report["schema_version"] == 1
        assert (folder / "report.html").exists()


def test_every_row_is_clean_or_quarantined(outputs: Path, checkout: Checkout) -> None:
    data = checkout.folder / "data"
    paths = {
        name: pq.read_table(data / f"{name}.parquet", columns=["path"])["path"].to_pylist()
        for name in ("manifest", "clean", "quarantine")
    }
    assert sorted(paths["clean"] + paths["quarantine"]) == sorted(paths["manifest"])


def test_the_audits_find_what_was_planted(outputs: Path) -> None:
    rules = {
        finding["rule"]
        for folder in ("audit/imbalance", "audit/synthetic")
        for finding in read(outputs / folder / "report.json")["findings"]
        if finding["level"] == "warning"
    }
    assert {"imbalance.ratio", "synthetic.blow_up", "synthetic.recognisable"} <= rules


def test_models_are_what_their_cards_say(outputs: Path) -> None:
    for folder in ("teacher", "student"):
        card = read(outputs / folder / "model.json")
        assert card["sha256"] == sha256_file(outputs / folder / "model.safetensors")
        assert card["class_names"] == [str(digit) for digit in range(10)]
        assert card["input_size"] == [3, 32, 32]
        metrics = read(outputs / folder / "metrics.json")
        assert read(outputs / folder / "summary.json")["val_top1"] == metrics["val"]["top1"]
        assert metrics["test"]["top1"] > 0.5, "far better than chance (0.1), even on the smaller setting"


def test_a_second_repro_does_nothing(outputs: Path, checkout: Checkout) -> None:
    for words in (
        ["add", "--all"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "1"],
    ):
        assert checkout.run("git", *words).returncode == 0  # dvc.lock with it
    again = checkout.run("dvc", "repro")
    assert again.returncode == 0
    assert "Running stage" not in again.stdout


def test_changing_the_benchmark_reruns_only_what_depends_on_it(outputs: Path, checkout: Checkout) -> None:
    params = checkout.folder / "params.yaml"
    before = params.read_text(encoding="utf-8")
    params.write_text(before.replace("time_budget_s: 6.0", "time_budget_s: 5.0"), encoding="utf-8")
    try:
        status = json.loads(checkout.run("dvc", "status", "--json").stdout)
        assert list(status) == ["benchmark"]
    finally:
        params.write_text(before, encoding="utf-8")


def test_mlflow_has_one_parent_with_a_child_a_step(outputs: Path, checkout: Checkout) -> None:
    from mlflow.tracking import MlflowClient

    database = checkout.folder / ".retort" / "mlflow" / "mlflow.db"
    uri = f"sqlite:///{database}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    experiment = client.get_experiment_by_name("retort-digits")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    names = {run.info.run_name for run in runs} - {parents[0].info.run_name}
    assert names >= {"finetune", "distill", "validate", "register", "export", "export-teacher"}
    assert parents[0].data.tags["alias"] == "champion"
    lock = yaml.safe_load((checkout.folder / "dvc.lock").read_text(encoding="utf-8"))["stages"]["distill"]
    (distill,) = (run for run in runs if run.info.run_name == "distill")
    assert {f"dvc.{out['path']}": out["md5"] for out in lock["outs"]}.items() <= distill.data.tags.items()
    version = client.get_model_version_by_alias("retort-digits", "champion")
    assert int(version.version) == 1


def test_the_page_is_one_file_without_network(outputs: Path, checkout: Checkout) -> None:
    assert checkout.retort("report").returncode == 0
    page = (outputs / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']+""", page)
    assert "<script" not in page
    for expected in ("Finetune the teacher", "Distil the student", "Benchmark", "Registered"):
        assert expected in page


@pytest.fixture(scope="module")
def through_kfp(repro: subprocess.CompletedProcess[str], checkout: Checkout) -> Path:
    """What KFP's local runner left: a folder a task below one of the run."""
    done = checkout.retort("submit", "--local", timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (run,) = (checkout.folder / ".retort" / "kfp" / "runs").iterdir()
    return run


def test_kfp_gives_the_same_student(through_kfp: Path, outputs: Path) -> None:
    wanted = sha256_file(outputs / "student" / "model.safetensors")
    made = list(through_kfp.rglob("model.safetensors"))
    assert wanted in {sha256_file(path) for path in made}


@pytest.mark.parametrize(("task", "model"), [("finetune", "teacher"), ("distill", "student")])
def test_kubeflow_shows_the_confusion_matrix_of_the_metrics(
    through_kfp: Path, outputs: Path, task: str, model: str
) -> None:
    written = read(through_kfp / task / "executor_output.json")["artifacts"]
    shown = {name: artifact["artifacts"][0]["metadata"] for name, artifact in written.items()}
    matrix = shown["confusion"]["confusionMatrix"]
    assert [each["displayName"] for each in matrix["annotationSpecs"]] == [*"0123456789"]
    counts = np.array([row["row"] for row in matrix["rows"]])
    validated = pq.read_table(outputs.parent / "data/clean.parquet", columns=["split", "label"]).to_pandas()
    labels = validated.loc[validated["split"] == "val", "label"]
    assert counts.sum(axis=1).tolist() == [(labels == label).sum() for label in range(10)]
    metrics = read(outputs / model / "metrics.json")["val"]
    assert np.trace(counts) / counts.sum() == pytest.approx(metrics["top1"], abs=1e-6)
    recalls = np.diag(counts) / counts.sum(axis=1)
    assert recalls.mean() == pytest.approx(metrics["macro_recall"], abs=1e-6)
    assert shown["metrics"]["val.top1"] == pytest.approx(metrics["top1"])

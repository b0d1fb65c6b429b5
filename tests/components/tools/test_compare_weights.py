"""Comparing start weights: the noise decides what may be claimed, and nothing is trained twice."""

from __future__ import annotations

import csv
import json
import shutil
from math import hypot, sqrt
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from components.common.errors import FindingsError, RetortError
from components.common.findings import read_report
from components.models.card import read_card
from components.step import StepContext
from components.tools.compare_weights import report
from components.tools.compare_weights.compare_weights import choose, compare_weights
from components.tools.params import CompareWeightsParams
from components.tracking.client import connect, tracking_uri
from components.tracking.tracker import Tracker
from components.training.paired import gain, interval
from components.training.params import DistillParams


def of(params: DistillParams, data: SimpleNamespace, **settings: object) -> CompareWeightsParams:
    values = params.model_dump(by_alias=True)
    values["teacher"]["weights"] = str(data.weights / "teacher.safetensors")
    values["ray"]["workers"] = 1
    return CompareWeightsParams.model_validate({**values, "compare_weights": settings})


def compare(params: CompareWeightsParams, data: SimpleNamespace, champion: Path | None = None) -> Path:
    out = Path("outputs/compare-weights")
    compare_weights(params, manifest=data.manifest, plan=data.plan, champion=champion, out=out)
    return out


# --- what may be claimed -----------------------------------------------------------------------------------


def test_the_interval_of_three_seeds_is_students() -> None:
    mean, half = interval([0.90, 0.92, 0.94])
    assert mean == pytest.approx(0.92)
    assert half == pytest.approx(4.302653 * 0.02 / sqrt(3), rel=1e-5)
    assert interval([0.9]) == (0.9, None)


def test_a_gain_is_paired_by_seed_and_image() -> None:
    actual = np.zeros(100, dtype=np.int64)
    ours, other = np.zeros((2, 100), np.int64), np.zeros((2, 100), np.int64)
    other[:, :30] = 1  # wrong on the same 30 images with each seed
    value, half = gain(actual, ours, other)
    assert value == pytest.approx(0.3)
    # two images are added that disagree (Agresti & Min, 2005)
    by_image = sqrt(31 - 30**2 / 102) / 102
    assert half == pytest.approx(1.96 * by_image, rel=1e-4), "seeds agree: what is left is which images"

    other[1, 30:40] = 1
    value, half = gain(actual, ours, other)
    assert value == pytest.approx(0.35)
    by_image = sqrt(30 + 10 * 0.25 + 1 - 35**2 / 102) / 102
    assert half == pytest.approx(hypot(12.7062 * 0.1 / sqrt(2) / sqrt(2), 1.96 * by_image), rel=1e-4)


@pytest.mark.parametrize(
    ("wrong", "seeds", "level", "said"),
    [
        (40, 3, "info", "above the noise"),
        (1, 3, "info", "within the noise, so nothing is claimed"),
        (40, 1, "info", "with one seed the noise is not known, so nothing is claimed"),
        (-40, 3, "warning", "above the noise"),
    ],
)
def test_no_claim_below_the_noise(
    wrong: int, seeds: int, level: str, said: str, data: SimpleNamespace, params: DistillParams
) -> None:
    actual = np.zeros(100, dtype=np.int64)
    ours, other = np.zeros((seeds, 100), np.int64), np.zeros((seeds, 100), np.int64)
    (other if wrong > 0 else ours)[:, : abs(wrong)] = 1
    given = of(params, data, seeds=seeds)
    run = StepContext("compare-weights", given, Path("out"), Tracker("compare-weights", given.registry))
    weights = {"configured": "a.pth", "random": "none"}
    value, half = gain(actual, ours, other)
    report.find_gain(run, "teacher", weights, "random", value, half, 100, given.compare_weights)
    (finding,) = run.report.findings
    assert (finding.rule, finding.row, finding.level) == ("weights.gain", "1.4", level)
    assert said in finding.message
    assert finding.message.startswith(f"{wrong:+.2f}% top-1 by starting from a.pth instead of none")


# --- who is compared ---------------------------------------------------------------------------------------


def test_what_is_compared(data: SimpleNamespace, params: DistillParams) -> None:
    given = of(params, data, candidates={"100k": "ResNet50_vd_10w_pretrained.tar"})
    run = StepContext("compare-weights", given, Path("out"), Tracker("compare-weights", given.registry))
    assert choose(run, given, given.teacher, data.teacher) == {
        "configured": str(data.weights / "teacher.safetensors"),
        "random": "none",
        "champion": str(data.teacher / "model.safetensors"),
        "100k": "ResNet50_vd_10w_pretrained.tar",
    }
    assert not run.report.findings

    card = read_card(data.teacher / "model.json")
    blocks = card.arch.model_copy(update={"blocks": "acb"})
    card.model_copy(update={"arch": blocks}).write(data.teacher / "model.json")
    assert "champion" in choose(run, given, given.teacher, data.teacher)  # its plain backbone is

    other = card.arch.model_copy(update={"name": "resnet18"})
    card.model_copy(update={"arch": other}).write(data.teacher / "model.json")
    assert "champion" not in choose(run, given, given.teacher, data.teacher)
    assert "the champion is a resnet18" in run.report.findings[0].message


@pytest.mark.parametrize(
    ("settings", "weights", "message"),
    [
        ({"candidates": {"random": "a.pth"}}, "b.pth", r"'random' is the name of weights that are compared"),
        ({}, "none", r"nothing to compare with, since teacher\.weights is none"),
    ],
)
def test_bad_candidates(
    settings: dict[str, object], weights: str, message: str, data: SimpleNamespace, params: DistillParams
) -> None:
    given = of(params, data, **settings)
    given = given.model_copy(update={"teacher": given.teacher.model_copy(update={"weights": weights})})
    with pytest.raises(RetortError, match=message):
        compare(given, data)


def test_weights_that_cover_too_little_name_the_networks_own_keys(
    data: SimpleNamespace, params: DistillParams
) -> None:
    tensors = dict(list(load_file(str(data.weights / "teacher.safetensors")).items())[:5])
    save_file(tensors, "part.safetensors")
    with pytest.raises(FindingsError, match=r"See teacher\.arch\.name\. teacher\.coverage is the share"):
        compare(of(params, data, seeds=1, candidates={"part": "part.safetensors"}), data)


# --- on Ray ------------------------------------------------------------------------------------------------


def test_finished_finetunes_are_kept(
    data: SimpleNamespace, params: DistillParams, capsys: pytest.CaptureFixture[str]
) -> None:
    given = of(params, data, seeds=1, epochs=1)
    out = compare(given, data)
    said = capsys.readouterr().err
    assert "2 candidates x 1 seeds = 2 finetunes of 1 epochs, 0 of them finished" in said
    assert "the other 1 will take about" in said
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [(row["candidate"], row["seed"]) for row in rows] == [("configured", "3"), ("random", "3")]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["gain"]["random"]["half_width"] is None
    top1 = {row["candidate"]: float(row["val_top1"]) for row in rows}
    assert metrics["gain"]["random"]["top1"] == pytest.approx(top1["configured"] - top1["random"])
    assert metrics["choice"]["candidate"] == max(top1, key=lambda name: top1[name])
    page = (out / "report.html").read_text()
    assert "Accuracy by start weights" in page
    assert not Path(".retort/compare-weights/weights").exists(), "prepared weights are made again when needed"

    client = connect(tracking_uri(given.registry))
    experiment = client.get_experiment_by_name(f"{given.registry.name}-compare-weights")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    finetune = runs["random seed 3"]
    assert finetune.data.tags["candidate"] == "random"
    assert finetune.data.tags["mlflow.parentRunId"] == runs["compare-weights"].data.tags["mlflow.parentRunId"]
    history = client.get_metric_history(finetune.info.run_id, "finetune.val_top1")
    assert [(metric.step, metric.value) for metric in history] == [(1, pytest.approx(top1["random"]))]

    before = {path.name: path.read_bytes() for path in out.glob("*.csv")}
    shutil.rmtree(out)
    compare(given, data)
    said = capsys.readouterr().err
    assert "2 of them finished by an earlier run" in said
    assert "epoch 1" not in said, "nothing is trained again"
    assert {path.name: path.read_bytes() for path in out.glob("*.csv")} == before


@pytest.mark.slow
def test_weights_that_learnt_the_data_gain_over_random_ones(
    data: SimpleNamespace, params: DistillParams
) -> None:
    given = of(
        params, data, seeds=2, epochs=1, candidates={"again": str(data.weights / "teacher.safetensors")}
    )
    out = compare(given, data, champion=data.teacher)
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["candidates"]) == {"configured", "random", "champion", "again"}
    again, configured = (metrics["candidates"][name]["by_seed"] for name in ("again", "configured"))
    assert again == configured, "the same weights, the same seeds"
    assert metrics["gain"]["again"]["top1"] == 0.0
    assert metrics["gain"]["again"]["half_width"] > 0, "other images might tell them apart"
    random = metrics["gain"]["random"]
    assert random["top1"] > 0
    rules = [
        finding for finding in read_report(out / "report.json").findings if finding.rule == "weights.gain"
    ]
    assert len(rules) == 3
    assert len(list(csv.DictReader((out / "history.csv").open()))) == 4 * 2 * 1

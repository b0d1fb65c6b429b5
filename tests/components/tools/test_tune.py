"""Tuning: what is tried, what is chosen, and that nothing is claimed that the noise could have done."""

from __future__ import annotations

import csv
import json
from math import hypot, sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from components.common.errors import RetortError
from components.common.findings import read_report
from components.models.params import Net
from components.step import StepContext
from components.tools.params import Tune, TuneParams
from components.tools.tune import report
from components.tools.tune.report import macro_gain
from components.tools.tune.space import Axis, Tried, applied, axes, choose, proposals, snippet
from components.tools.tune.tune import tune
from components.tracking.client import connect, tracking_uri
from components.tracking.tracker import Tracker
from components.training.params import DistillParams
from components.training.spec import TrainSpec
from components.training.state import TrainResult
from pipelines.params import build
from tests.components.training import local


def of(params: DistillParams, **settings: object) -> TuneParams:
    values = params.model_dump(by_alias=True)
    values["ray"]["workers"] = 1
    return TuneParams.model_validate({**values, "tune": settings})


# --- what is tried -----------------------------------------------------------------------------------------


def test_recipes_lie_evenly_in_the_space_and_follow_from_the_seed() -> None:
    net = Net.model_validate({"lr": {"initial": 0.01}})
    space = axes(Tune(), net)
    assert [axis.key for axis in space] == [
        "lr.initial", "optimizer.weight_decay", "train.label_smoothing", "train.mixup", "train.augment",
    ]  # fmt: skip
    found = proposals(space, 33, seed=7)
    assert found == proposals(space, 33, seed=7)
    assert found != proposals(space, 33, seed=8)
    assert found[0] == {}, "the fixed recipe takes part"
    rates = np.array([values["lr.initial"] for values in found[1:]])
    assert rates.min() >= 0.001
    assert rates.max() <= 0.1
    below = np.mean(rates < 0.01)
    assert 0.4 <= below <= 0.6, "half of them below the middle of a logarithmic scale"
    recipes = [values["train.augment"] for values in found[1:]]
    assert all(8 <= recipes.count(name) <= 13 for name in ("light", "standard", "strong"))


def test_the_ends_of_an_axis() -> None:
    assert Axis("x", 1e-5, 1e-1, log=True).at(0.5) == pytest.approx(1e-3)
    assert Axis("x", 0.0, 0.2).at(1.0) == 0.2
    choices = Axis("x", choices=("a", "b", "c"))
    assert [choices.at(share) for share in (0.0, 0.34, 0.99, 1.0)] == ["a", "b", "c", "c"]


def test_a_key_that_is_empty_is_leftidentity_collate() -> None:
    only = Tune.model_validate({"lr": [], "weight_decay": [], "label_smoothing": [], "augment": []})
    assert [axis.key for axis in axes(only, Net())] == ["train.mixup"]
    with pytest.raises(RetortError, match=r"every key is \[\]"):
        axes(only.model_copy(update={"mixup": []}), Net())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": [10, 0.1]}, "must not be above"),
        ({"lr": [0, 1]}, "greater than 0"),
        ({"mixup": [0, 2]}, "less than or equal to 1"),
        ({"augment": ["sepia"]}, "'sepia' is none of none, light"),
        ({"lr": [1]}, "expected two numbers"),
        ({"trials": 1}, "greater than or equal to 2"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Tune.model_validate(settings)


def test_values_take_their_place_in_the_network() -> None:
    net = applied(Net(), {"lr.initial": 0.5, "train.mixup": 0.3, "optimizer.weight_decay": 0.1})
    assert (net.lr.initial, net.train.mixup, net.optimizer.weight_decay) == (0.5, 0.3, 0.1)
    assert net.lr.schedule == Net().lr.schedule


def test_the_snippet_can_be_put_into_params_and_typed() -> None:
    values = {"lr.initial": 0.005, "train.mixup": 0.3, "train.augment": "strong"}
    text = snippet("student", values, "better")
    net = build(yaml.safe_load(text)).student
    assert (net.lr.initial, net.train.mixup, net.train.augment) == (0.005, 0.3, "strong")
    typed = [line.removeprefix("#   -o ") for line in text.splitlines() if "-o student" in line]
    assert build({}, typed).student == net
    assert yaml.safe_load(snippet("student", {}, "fixed")) is None


# --- what is chosen ----------------------------------------------------------------------------------------


def rows(*scores: float) -> list[dict[str, Any]]:
    return [{"epoch": i + 1, "val_macro_recall": score, "val_top1": score} for i, score in enumerate(scores)]


def test_a_trial_is_chosen_by_the_epoch_that_training_would_keep_and_only_if_it_ended() -> None:
    tried = [
        Tried(0, {}, rows(0.5, 0.7), "done"),
        Tried(1, {"lr.initial": 1.0}, rows(0.9), "stopped"),
        Tried(2, {"lr.initial": 2.0}, rows(0.8, 0.6), "done"),
        Tried(3, {"lr.initial": 3.0}, rows(0.8, 0.8), "done"),
    ]
    assert choose(tried).number == 2, "of equal ones the first"
    tried[3].rows[0]["val_macro_recall"] = tried[2].rows[0]["val_macro_recall"] = 0.7
    tried[3].rows[1]["val_macro_recall"] = 0.7
    assert choose(tried).number == 0, "nothing did better than the fixed one"
    with pytest.raises(RetortError, match="no trial came to its end \\(the loss became nan\\)"):
        choose([Tried(0, {}, [], "the loss became nan"), Tried(1, {}, rows(0.1), "stopped")])


def test_a_gain_of_macro_recall_counts_classes_alike_and_both_kinds_of_noise() -> None:
    actual = np.repeat([0, 1], [90, 10])
    ours, other = np.tile(actual, (2, 1)), np.tile(actual, (2, 1))
    other[:, 90:95] = 0  # half of the rare class, with each seed
    value, half = macro_gain(actual, ours, other)
    assert value == pytest.approx(0.25), "top-1 would say 5 points"
    assert half == pytest.approx(1.96 * sqrt(0.25 / 10 / 4)), "seeds agree: what is left is which images"

    other[1, 95:97] = 0  # seed 2: 7 of 10
    value, half = macro_gain(actual, ours, other)
    assert value == pytest.approx(0.30)
    variance = np.array([1.0] * 5 + [0.5] * 2 + [0.0] * 3).var()
    by_seed = 12.7062 * (0.1 / sqrt(2)) / sqrt(2)  # Student's t with one degree of freedom; 0.25 and 0.35
    assert half == pytest.approx(hypot(by_seed, 1.96 * sqrt(variance / 10 / 4)), rel=1e-4)
    assert macro_gain(actual, ours[:1], other[:1])[1] is None


@pytest.mark.parametrize(
    ("gains", "verdict", "said"),
    [
        ({"val": (0.03, 0.01), "test": (0.02, 0.03)}, "better", "95 % interval +2.00% to +4.00%: above the"),
        ({"val": (0.01, 0.03)}, "not told apart", "within the noise: not told apart"),
        ({"val": (-0.03, 0.01)}, "worse", "above the noise"),
        ({"val": (0.5, None)}, "not told apart", "with one seed the noise is not known"),
        ({}, "fixed", "no recipe of 16 did better than the fixed one"),
    ],
)
def test_no_claim_below_the_noise(
    gains: dict[str, Any], verdict: str, said: str, data: SimpleNamespace, params: DistillParams
) -> None:
    given = of(params)
    run = StepContext("tune", given, Path("out"), Tracker("tune", given.registry))
    assert report.find(run, given.tune, Tried(3, {"train.mixup": 0.2}), gains, 32) == verdict
    (finding,) = run.report.findings
    assert (finding.rule, finding.level) == ("tune.gain", "info")
    assert said in finding.message
    assert ("best.yaml" in finding.advice) == (verdict == "better"), "only what is better is recommended"
    assert ("on test, which decides nothing, +2.00% ± 3.00%" in finding.message) == ("test" in gains)


# --- on Ray ------------------------------------------------------------------------------------------------


def fit_here(run: StepContext, spec: TrainSpec, ray: Any, folder: Path) -> TrainResult:
    """As ``driver.fit``, without the seconds that Ray takes for each training."""
    return local.run(spec).result


@pytest.mark.parametrize("ray", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_search_and_its_comparison(
    ray: bool, data: SimpleNamespace, params: DistillParams, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The fixed rate learns nothing, so a better one is found; a second run finds all of it done."""
    if not ray:  # the trials are Ray's anyway
        monkeypatch.setattr("components.training.driver.fit", fit_here)
    weak = {"student": {**params.student.model_dump(), "lr": {"initial": 1e-6}}}
    given = of(
        DistillParams.model_validate({**params.model_dump(by_alias=True), **weak}),
        trials=4, epochs=2, seeds=2, reduction=2, lr=[1e3, 1e5], augment=[], mixup=[],
        label_smoothing=[], weight_decay=[],
    )  # fmt: skip
    out = Path("outputs/tune")

    def search() -> dict[str, Any]:
        tune(given, manifest=data.manifest, plan=data.plan, weights=data.weights, out=out)
        return json.loads((out / "metrics.json").read_text())

    metrics = search()
    said = capsys.readouterr().err
    assert "4 recipes x up to 2 epochs, 1 at a time" in said
    assert metrics["best"]["trial"] > 0
    assert metrics["best"]["val_macro_recall"] > metrics["fixed"]["val_macro_recall"]
    assert metrics["tuned"]["val_mean"] > metrics["fixed"]["val_mean"]
    table = list(csv.DictReader((out / "results.csv").open()))
    assert [row["trial"] for row in table] == ["0", "1", "2", "3"]
    assert {row["end"] for row in table} == {"done", "stopped"}
    assert all(int(row["epochs"]) == 2 for row in table if row["end"] == "done")
    stopped = [float(row["val_macro_recall"]) for row in table if row["end"] == "stopped"]
    assert max(stopped) <= metrics["best"]["val_macro_recall"]
    seeds = list(csv.DictReader((out / "seeds.csv").open()))
    assert [(row["recipe"], row["seed"]) for row in seeds] == [
        ("fixed", "4"), ("tuned", "4"), ("fixed", "5"), ("tuned", "5"),
    ], "none that a trial has had"  # fmt: skip
    assert float(yaml.safe_load((out / "best.yaml").read_text())["student"]["lr"]["initial"]) >= 1e-3
    assert "Trials by epoch" in (out / "report.html").read_text()
    assert not list(Path(".retort/tune").rglob("*.pt")), "checkpoints of trials are gone"

    client = connect(tracking_uri(given.registry))
    experiment = client.get_experiment_by_name(f"{given.registry.name}-tune")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    trial = runs["trial 1"]
    assert trial.data.tags["mlflow.parentRunId"] == runs["tune"].data.tags["mlflow.parentRunId"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    history = client.get_metric_history(trial.info.run_id, "val_macro_recall")
    assert max(metric.value for metric in history) == pytest.approx(float(table[1]["val_macro_recall"]))
    assert "tuned seed 5" in runs

    again = search()
    said = capsys.readouterr().err
    assert "4 trials were finished by an earlier run" in said
    assert "4 of them finished by an earlier run" in said
    assert again == metrics
    rules = {finding.rule for finding in read_report(out / "report.json").findings}
    assert "tune.gain" in rules

"""The student alone: trained before distillation, kept, taken from there; and the teacher beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from components.audit.plan_schema import read_plan
from components.common.errors import FindingsError
from components.common.findings import Finding, read_report
from components.common.storage import sha256_file
from components.models import checkpoint
from components.step import StepContext
from components.tracking.tracker import Tracker
from components.training import budget, control, driver, gate, preflight
from components.training.budget import Forecast
from components.training.check import check
from components.training.control import Trained
from components.training.margin import Margin
from components.training.params import CheckParams, DistillParams
from components.training.spec import TrainSpec
from components.training.state import TrainResult
from tests.components.training import local

OUT = Path("outputs/check")


def changed(params: DistillParams, **settings: Any) -> CheckParams:
    values = params.model_dump(by_alias=True)
    values["distill"] |= settings
    return CheckParams.model_validate(values)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TrainSpec]:
    """Trainings run in this process, without Ray; those that were."""
    specs: list[TrainSpec] = []

    def train(run: StepContext, spec: TrainSpec, ray: Any, folder: Path) -> TrainResult:
        specs.append(spec)
        return local.run(spec).result

    monkeypatch.setattr(driver, "train", train)
    monkeypatch.setattr(preflight, "preflight", lambda *_: None)
    monkeypatch.setattr(budget, "expected", lambda spec, ray: Forecast(1.0, 0.0, (("control", 1, 1.0),), 0.0))
    return specs


def run_check(params: CheckParams, data: SimpleNamespace) -> dict[str, Finding]:
    check(params, manifest=data.manifest, plan=data.plan, teacher=data.teacher, weights=data.weights, out=OUT)
    return {finding.rule: finding for finding in read_report(OUT / "report.json").findings}


def spec_of(params: CheckParams, data: SimpleNamespace, epochs: int) -> TrainSpec:
    plan = read_plan(data.plan)
    student = control.student_spec(params, data.manifest, plan, data.teacher, data.weights)
    return control.control_spec(params, student, epochs)


def test_the_check_trains_the_student_alone_and_compares_the_teacher(
    data: SimpleNamespace, params: DistillParams, trained: list[TrainSpec]
) -> None:
    wanted = changed(params)
    found = run_check(wanted, data)
    (spec,) = trained
    assert [phase.name for phase in spec.phases] == ["control", "control, labelled"]
    assert {phase.task for phase in spec.phases} == {"labels"}
    assert spec.phases[0].match_budget, "as many steps as with the unlabelled images"
    assert spec.who == "student", "advice names its section of params.yaml"

    margin = json.loads((OUT / "margin.json").read_text())
    said = found["distill.teacher_margin"]
    assert said.measured["top1"] == margin["top1"]["value"]
    assert margin["top1"]["value"] == pytest.approx(margin["teacher"]["top1"] - margin["alone"]["top1"])
    assert margin["top1"]["low"] < margin["top1"]["value"] < margin["top1"]["high"]
    assert margin["forecast"]["low"] < margin["forecast"]["high"]
    assert margin["images"] == 32
    assert 4 <= margin["chosen"] <= 8

    module, card = checkpoint.load(OUT / control.FOLDER)
    assert card.lineage[-1].source.endswith("start.safetensors"), "no teacher had a part in it"
    kept = control.read(OUT / control.FOLDER, spec_of(wanted, data, 3))
    assert isinstance(kept, Trained)
    assert len(kept.predictions["val"]) == 32
    known = Margin.read(OUT)
    assert known.alone == pytest.approx((kept.predictions["val"] == truth(data)).mean(), abs=1e-6)
    del module


def truth(data: SimpleNamespace) -> np.ndarray:
    from components.training.inputs.index import open_index

    index = open_index(data.manifest)
    return np.asarray(index.labels[index.rows("val")])


def test_what_decides_nothing_of_it_does_not_train_it_again(
    data: SimpleNamespace, params: DistillParams, trained: list[TrainSpec]
) -> None:
    run_check(changed(params), data)
    first = sha256_file(OUT / control.FOLDER / "model.safetensors")
    run_check(changed(params, keep="student", seeds=3, label_share=0.3, crops=7, method="kd"), data)
    assert len(trained) == 1
    assert sha256_file(OUT / control.FOLDER / "model.safetensors") == first
    run_check(changed(params, finetune_lr=0.5), data)
    assert len(trained) == 2


def test_the_teacher_decides_only_how_many_steps_it_takes(
    data: SimpleNamespace, params: DistillParams, trained: list[TrainSpec]
) -> None:
    alone = spec_of(changed(params, unlabeled_per_class=0), data, 3)
    assert alone.teacher is None
    assert alone.distill is None
    beside = spec_of(changed(params), data, 3)
    assert beside.teacher is not None
    result = local.run(beside).result
    assert result.chosen > 0
    labels = Path(".retort/cache/soft_labels")
    # the pool, and the training and validation images that it is compared with
    assert len(list(labels.iterdir())) == 3, "no view that is trained on is asked about"


def test_a_control_that_goes_wrong_ends_nothing(
    data: SimpleNamespace, params: DistillParams, monkeypatch: pytest.MonkeyPatch, trained: list[TrainSpec]
) -> None:
    def train(run: StepContext, spec: TrainSpec, ray: Any, folder: Path) -> TrainResult:
        run.add_finding("train.finite", "error", "check", "control: the loss became nan", waivable=False)
        run.stop_on_errors()
        raise AssertionError

    monkeypatch.setattr(driver, "train", train)
    found = run_check(changed(params), data)
    said = found["distill.teacher_margin"]
    assert said.level == "warning"
    assert "unknown: the student alone was stopped by train.finite" in said.message
    assert (OUT / gate.FILE).exists()
    assert Margin.read(OUT).failed == spec_of(changed(params), data, 3).key()


def test_what_distillation_would_meet_too_stops_the_check(
    data: SimpleNamespace, params: DistillParams, monkeypatch: pytest.MonkeyPatch, trained: list[TrainSpec]
) -> None:
    def full(run: StepContext, *_: Any) -> None:
        run.add_finding("preflight.disk", "error", "student", "no room")
        run.stop_on_errors()

    monkeypatch.setattr(preflight, "preflight", full)
    with pytest.raises(FindingsError, match=r"preflight\.disk"):
        run_check(changed(params), data)
    assert not (OUT / gate.FILE).exists()


def test_nothing_is_trained_where_a_rule_has_failed(
    data: SimpleNamespace, params: DistillParams, trained: list[TrainSpec]
) -> None:
    with pytest.raises(FindingsError, match=r"distill\.teacher_accuracy"):
        run_check(changed(params, min_teacher_accuracy=1.0), data)
    assert not trained


def test_switched_off_nothing_is_known(
    data: SimpleNamespace, params: DistillParams, trained: list[TrainSpec]
) -> None:
    said = run_check(changed(params, control=False), data)["distill.teacher_margin"]
    assert said.level == "info", "a person has asked for it"
    assert "unknown: distill.control is false" in said.message
    assert not trained
    assert Margin.read(OUT).alone is None


def seconds(spec: TrainSpec, each: float) -> Forecast:
    return Forecast(30.0, 0.0, ((spec.phases[0].name, spec.phases[0].epochs, each),), 0.0)


@pytest.mark.parametrize(
    ("each", "epochs"), [(1.0, 50), (100.0, 5), (20.0, 10), (5_000.0, 1)],
    ids=["a minute: all", "what ten minutes hold", "a fifth at most", "one at least"],
)  # fmt: skip
def test_a_long_control_is_a_short_one_first(
    each: float, epochs: int, data: SimpleNamespace, params: DistillParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = changed(params)
    plan = read_plan(data.plan)
    student = control.student_spec(wanted, data.manifest, plan, data.teacher, data.weights)
    run = StepContext("check", wanted, Path("out"), Tracker("check", wanted.registry))
    monkeypatch.setattr(budget, "expected", lambda spec, ray: seconds(spec, each))
    assert control.control_epochs(run, wanted, student, 50) == epochs
    monkeypatch.setattr(budget, "expected", lambda spec, ray: seconds(spec, 1.0))
    assert control.control_epochs(run, wanted, student, 50) == epochs, "decided once"
    assert control.control_epochs(run, changed(params, control_epochs=7), student, 50) == 7


def test_another_control_is_not_taken_for_it(data: SimpleNamespace, params: DistillParams) -> None:
    spec = spec_of(changed(params, unlabeled_per_class=0), data, 1)
    folder = Path("kept")
    assert control.read(folder, spec) == "there is none yet"
    trained = Trained.of(local.run(spec).result, control.NET)
    control.write(folder, trained, spec, [], {"epochs": 1})
    again = control.read(folder, spec)
    assert isinstance(again, Trained)
    assert again.history == trained.history
    assert control.read(folder, spec_of(changed(params, unlabeled_per_class=0), data, 3)) == (
        "it had 1 epoch, and 3 are asked for"
    )
    assert control.read(folder, replace(spec, seed=9)) == "it was trained on other data, weights or values"
    (folder / control.PREDICTIONS).write_bytes(b"x")
    assert "predictions.npz has 1 bytes" in str(control.read(folder, spec))


def test_a_finetune_at_a_larger_size_is_the_same_for_both(
    data: SimpleNamespace, params: DistillParams
) -> None:
    """Plain images at that size, at the published hundredth of the rate; another job than without."""
    given = changed(params, finetune_size=48, finetune_epochs=3)
    student = control.student_phases(given, 2, "ssld")[-1]
    alone = control.control_phases(given, 2)[-1]
    assert replace(alone, name=student.name, net=student.net) == student
    assert (student.size, student.augment, student.epochs) == (48, "none", 3)
    assert student.lr.initial == pytest.approx(params.student.lr.initial / 100)
    assert [phase.size for phase in control.student_phases(given, 2, "ssld")] == [None, 48]
    usual = changed(params, finetune_epochs=3)
    assert control.control_phases(usual, 2)[-1].augment is None
    assert spec_of(given, data, 2).key() != spec_of(usual, data, 2).key()

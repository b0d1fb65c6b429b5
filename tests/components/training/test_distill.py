"""The step ``distill`` without Ray: which trainings it does, what it keeps, and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.common.errors import RetortError
from components.common.findings import Finding, read_report
from components.models import checkpoint
from components.step import StepContext
from components.training import budget, cluster, control, driver, preflight, shipped
from components.training.budget import Forecast
from components.training.check import check
from components.training.distill import distill
from components.training.params import CheckParams, DistillParams
from components.training.shipped import Kept
from components.training.spec import TrainSpec
from components.training.state import TrainResult
from tests.components.training import local

CHECK, OUT = Path("outputs/check"), Path("outputs/student")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Trainings run in this process; the network and the seed of each."""
    done: list[tuple[str, int]] = []

    def fit(run: StepContext, spec: TrainSpec, *_: Any) -> TrainResult:
        done.append((spec.phases[0].net, spec.seed))
        return local.run(spec).result

    monkeypatch.setattr(driver, "train", fit)
    monkeypatch.setattr(driver, "fit", fit)
    monkeypatch.setattr(cluster, "running", lambda ray: nullcontext())
    monkeypatch.setattr(preflight, "preflight", lambda *_: None)
    monkeypatch.setattr(budget, "expected", lambda spec, ray: Forecast(1.0, 0.0, (("control", 1, 1.0),), 0.0))
    return done


@pytest.fixture
def steps(data: SimpleNamespace, params: DistillParams) -> Callable[..., dict[str, Finding]]:
    """Check, then distill, with some settings; the findings of the latter by rule."""

    def run(checked: bool = True, **settings: Any) -> dict[str, Finding]:
        values = params.model_dump(by_alias=True)
        values["distill"] |= {"crops": 1, "epochs": 1, **settings}
        made = {
            "manifest": data.manifest,
            "plan": data.plan,
            "teacher": data.teacher,
            "weights": data.weights,
        }
        if checked:
            check(CheckParams.model_validate(values), **made, out=CHECK)
        distill(DistillParams.model_validate(values), **made, check=CHECK, out=OUT)
        return {finding.rule: finding for finding in read_report(OUT / "report.json").findings}

    return run


def metrics() -> dict[str, Any]:
    return json.loads((OUT / "metrics.json").read_text())


def test_the_control_of_the_check_is_taken(
    steps: Callable[..., dict[str, Finding]],
    trained: list[tuple[str, int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps()
    assert trained == [("control", 3), ("student", 3)]
    assert "the student alone is the one that the check trained" in capsys.readouterr().err


def test_where_the_budgets_are_not_equal_it_is_said(
    steps: Callable[..., dict[str, Finding]], trained: list[tuple[str, int]]
) -> None:
    """SGD learns from JS at a higher rate; one cached view serves two epochs."""
    found = steps(epochs=2, method="js", label_share=0.0)
    said = found["distill.gain"].message
    assert "the student saw 1 view of each image again and again" in said
    assert "times the control's, for the gradient of its loss is" in said


def test_each_seed_has_a_student_and_a_control(
    steps: Callable[..., dict[str, Finding]], trained: list[tuple[str, int]]
) -> None:
    found = steps(seeds=3)
    assert trained == [
        ("control", 3), ("student", 3), ("student", 4), ("control", 4), ("student", 5), ("control", 5),
    ]  # fmt: skip
    assert "over 3 seeds and 32 validation images" in found["distill.gain"].message
    assert metrics()["gain"]["seeds"] == 3
    assert metrics()["seed"] in (3, 4, 5)
    phases = (OUT / "history.csv").read_text()
    assert "control, labelled, seed 4" in phases
    left = list(Path(".retort/cache/trained").iterdir())
    assert len(left) == 1, "the check's control may be asked for again; what was trained here may not"


def test_a_short_control_is_trained_whole_here(
    steps: Callable[..., dict[str, Finding]],
    trained: list[tuple[str, int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps(control_epochs=1, epochs=2)
    assert trained == [("control", 3), ("student", 3), ("control", 3)]
    assert "of the check's, it had 1 epoch, and 2 are asked for" in capsys.readouterr().err


def test_what_is_finished_is_not_repeated(
    steps: Callable[..., dict[str, Finding]], trained: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Kept:
        raise RetortError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(shipped, "choose", broken)
        with pytest.raises(RetortError, match="the power went"):
            steps(seeds=2)
    before = len(trained)
    steps(checked=False, seeds=2)
    assert len(trained) == before


@pytest.mark.parametrize("net", ["student", "control"])
def test_what_is_shipped_says_where_it_came_from(
    net: str, steps: Callable[..., dict[str, Finding]], trained: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def choose(keep: str, actual: Any, pairs: Any) -> Kept:
        return Kept(net, 3, getattr(pairs[0], net), f"The {net} it is.")

    monkeypatch.setattr(shipped, "choose", choose)
    found = steps()
    assert found["distill.kept"].level == ("info" if net == "student" else "warning")
    said = metrics()
    assert said["kept"] == net
    assert said["val"] == said["distilled" if net == "student" else "control"]["val"]
    _, card = checkpoint.load(OUT)
    last = card.lineage[-1]
    assert last.source.startswith("teacher: " if net == "student" else "control: the student alone")
    same = checkpoint.read_card(CHECK / control.FOLDER / "model.json").sha256
    assert (last.sha256 == same) is (net == "control")
    assert (card.sha256 == same) is (net == "control"), "the same bytes"
    sections = json.loads((OUT / "page.json").read_text())
    assert sections[0]["title"] == "What is shipped"
    assert f"The {net} it is." in sections[0]["html"]


def test_without_a_control_nothing_is_compared(
    steps: Callable[..., dict[str, Finding]], trained: list[tuple[str, int]]
) -> None:
    found = steps(control=False)
    assert trained == [("student", 3)]
    assert "distill.gain" not in found
    assert found["distill.kept"].level == "info"
    assert "control" not in metrics()

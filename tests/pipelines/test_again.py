"""``retort retrain`` here: which stages run, which were done before, and what a budget leaves out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components.retraining.decision import Decision
from pipelines import again
from pipelines.params import Params, build
from pipelines.retraining import BESIDE, DECIDE, RETRAIN
from pipelines.steps import Pipeline
from tests.pipelines.longer import LONGER


def test_never_leaves_out_the_run_from_start_weights_and_what_would_be_read_of_it() -> None:
    whole = RETRAIN.of(Params())
    assert whole == RETRAIN
    short = RETRAIN.of(build({"retrain": {"from_original": "never"}}))
    assert [stage.name for stage in whole.stages if stage not in short.stages] == [*BESIDE, "retrain-choose"]
    choose = short["retrain-choose"]
    assert set(whole["retrain-choose"].inputs) - set(choose.inputs) == {"distilled", "passed"}
    arguments = choose.step.arguments(short.places(choose))
    assert arguments["distilled"] is None
    assert arguments["updated"] == Path("outputs/retrain/updated")


@pytest.mark.parametrize(
    ("settings", "way", "seconds", "affordable"),
    [
        ({}, "update", 1e9, True),
        ({"budget_minutes": 10.0}, "update", 60.0, True),
        ({"budget_minutes": 10.0}, "update", 100.0, False),
        ({"budget_minutes": 10.0, "from_original": "always"}, "update", 100.0, True),
        ({"budget_minutes": 10.0}, "original", 100.0, True),
    ],
    ids=["no budget", "time enough", "too little", "always", "nothing else to start from"],
)
def test_the_budget_decides_by_how_long_the_champion_took(
    settings: dict[str, Any], way: Any, seconds: float, affordable: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    one = again._Again(build({"retrain": settings}))
    monkeypatch.setattr(again, "_times_longer", lambda params: 8.0)  # 8 min of 60 s, 13 of 100
    monkeypatch.setattr(one._done, "seconds", lambda stage: seconds)
    assert one._affordable(Decision(go_on=True, reason="", way=way)) is affordable


def test_teacher_control_and_student_count_with_their_epochs_and_their_cost() -> None:
    net = {"arch": {"name": "test_efficientnet"}, "train": {"epochs": 6}}
    values: dict[str, Any] = {"global": {"image_size": 32}, "teacher": net, "student": net}
    # three networks of one kind: 6 epochs of the teacher, and 6 + 1 of student and control each
    assert again._times_longer(build(values)) == pytest.approx((6 + 7 + 7) / 6)
    alone = {**values, "distill": {"control": False}, "retrain": {"epochs": 2}}
    assert again._times_longer(build(alone)) == pytest.approx((6 + 7) / 2)


def test_a_stage_is_done_again_only_for_other_inputs_or_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = LONGER.path("validate.clean")
    manifest.parent.mkdir()
    manifest.write_bytes(b"12345")
    stage = replace(LONGER["again"], when=DECIDE)
    ran: list[str] = []
    run = Pipeline.run

    def counted(self: Pipeline, name: str, params: Params) -> None:
        ran.append(name)
        run(self, name, params)

    monkeypatch.setattr(Pipeline, "run", counted)
    params = build({"registry": {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}})
    for change in (lambda: None, lambda: None, lambda: manifest.write_bytes(b"1"), lambda: None):
        change()
        again._Done(params).run(LONGER, stage)
    assert len(ran) == 2, "first, and when its input had changed"
    again._Done(build({"global": {"seed": 8}})).run(LONGER, stage)
    assert len(ran) == 3

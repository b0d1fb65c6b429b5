"""Kept soft labels that are not what the teacher says: each cause planted, and stopped before it teaches."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from components.audit.plan_schema import read_plan
from components.models.params import Train
from components.training import augmentation, driver, health, replay, seals, soft_labels
from components.training.group import Group
from components.training.label_form import LabelForm
from components.training.params import DistillParams
from components.training.precision import Precision
from components.training.spec import Phase, TrainSpec
from tests.components.training import local

LABELS = Path("labels")


@pytest.fixture
def distilling(data: SimpleNamespace, params: DistillParams, weights: Path) -> TrainSpec:
    spec = driver.make_spec(
        params, params.teacher, params.ray, params.data, data.manifest, read_plan(data.plan),
        weights / "teacher.safetensors",
        (Phase("distil", "student", 2, params.student.lr, task="ssld"),),
    )  # fmt: skip
    settings = params.distill.model_copy(update={"crops": 1})
    return replace(spec, teacher=data.teacher, distill=settings, soft_labels=LABELS.resolve())


def caches() -> dict[int, Path]:
    """Folders of soft labels by their number of rows: the pool's, and those that are learnt from."""
    return {len(np.load(folder / "rows.npy")): folder for folder in LABELS.iterdir()}


def change(folder: Path, how: Callable[[np.ndarray], np.ndarray]) -> None:
    """Labels that somebody has changed, and sealed again."""
    np.save(folder / "00000.npy", how(np.load(folder / "00000.npy")))
    seals.write(folder / soft_labels.SEAL, [*folder.glob("*.npy"), folder / soft_labels.ABOUT])


def stopped(outcome: local.Outcome) -> str:
    (told,) = outcome.said("stopped")
    assert told["rule"] == "distill.labels_drift"
    return told["message"]


def test_what_is_replayed_is_compared_before_a_run(distilling: TrainSpec, data: SimpleNamespace) -> None:
    assert not local.run(distilling).said("stopped")
    assert not local.run(distilling).said("stopped"), "kept ones are what the teacher says"
    folder = caches()[104]
    rows = np.load(folder / "rows.npy")

    def turned(labels: np.ndarray) -> np.ndarray:
        labels[17] = np.roll(labels[17].view(np.float16), 1).view(np.uint8)
        return labels

    change(folder, turned)
    message = stopped(local.run(distilling))
    assert str(folder) in message
    assert "1 of " in message
    assert f"row {rows[17]} ({data.paths[rows[17]]})" in message
    assert stopped(local.run_group(distilling, 2)) == message, "all workers stop, whoever has found it"


def test_the_answers_by_which_unlabelled_images_are_chosen_are_compared(distilling: TrainSpec) -> None:
    local.run(distilling)
    folder = caches()[16]
    change(folder, lambda labels: labels[::-1].copy())
    assert str(folder) in stopped(local.run(distilling))


def test_code_that_makes_other_views_without_saying_so(
    distilling: TrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.run(distilling)
    uniforms = augmentation.uniforms
    monkeypatch.setattr(
        augmentation, "uniforms", lambda seed, views, rows, count: uniforms(seed, views + 1, rows, count)
    )
    assert "the code that makes its view" in stopped(local.run(distilling))


def test_labels_that_drift_while_a_student_learns_from_them(
    distilling: TrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, send = soft_labels.SoftLabels.take, local.LocalContext.send
    drifted = False

    def drift(self: local.LocalContext, kind: str, **values: Any) -> None:
        nonlocal drifted
        drifted = drifted or kind == "epoch"
        send(self, kind, **values)

    monkeypatch.setattr(local.LocalContext, "send", drift)
    monkeypatch.setattr(
        soft_labels.SoftLabels, "take",
        lambda self, rows: np.roll(take(self, rows), 1 if drifted else 0, axis=0),
    )  # fmt: skip
    outcome = local.run(distilling)
    assert f"of {replay.AGAIN} soft labels" in stopped(outcome)
    assert len(outcome.said("epoch")) == 1, "before the second one learns from them"


def test_on_a_card_a_few_labels_may_differ_and_many_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    index = SimpleNamespace(path=lambda row: f"{row}.png")
    labels = SimpleNamespace(folder="labels", rows=np.arange(100))
    card = Precision.of(Train(precision="bf16"), torch.device("cpu"))

    def judged(wrong: int, nats: float, precision: Precision) -> bool:
        made = replay.Replay(index, Group(0, 1, True), precision)  # type: ignore[arg-type]
        made.add(labels, None)  # type: ignore[arg-type]
        try:
            made._judge([replay._Apart(0, row, nats if row < wrong else 0.0) for row in range(100)])
        except health.Stop:
            return False
        return True

    cpu = Precision.of(Train(precision="float32"), torch.device("cpu"))
    assert judged(1, 0.04, cpu)
    assert not judged(1, 0.06, cpu)
    assert not judged(1, float("nan"), cpu)
    assert judged(10, 3.0, card)
    assert not judged(11, 3.0, card)
    assert judged(100, 0.9, card)


def test_rows_are_spread_evenly_and_others_come_next() -> None:
    rows = np.arange(1000) * 3
    first, second = replay._spread(rows, 8, 0), replay._spread(rows, 8, 1)
    assert first.tolist() == [0, 375, 750, 1125, 1500, 1875, 2250, 2625]
    assert not np.isin(second, first).any()
    assert (np.diff(second) == 375).all()
    assert replay._spread(rows[:5], 8, 3).tolist() == rows[:5].tolist()


@pytest.mark.parametrize("form", [LabelForm(300, 300), LabelForm(300, 20)])
def test_how_far_two_answers_are_apart(form: Any) -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(3))
    same = form.encode(logits)
    assert form.apart(same, same).max() == 0
    assert form.apart(same, form.encode(logits + 1e-3 * torch.rand(6, 300))).max() < replay.EXACT
    other = logits.clone()
    other[2] = 3 * other[2].roll(1)
    apart = form.apart(same, form.encode(other))
    assert apart[2] > 0.5
    assert apart[[0, 1, 3, 4, 5]].max() == 0

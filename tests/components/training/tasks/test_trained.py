"""Each method in the training loop: it learns, with one worker or two, and leaves the network alone."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch

from components.audit.plan_schema import read_plan
from components.models import build, checkpoint
from components.models.card import read_card
from components.models.params import Arch, LearningRate, Optimizer
from components.training import driver
from components.training.inputs.index import open_index
from components.training.normalise import Normalise
from components.training.params import Distill, DistillParams
from components.training.spec import Phase, TrainSpec
from components.training.trainer import create_network
from tests.components.training import local
from tests.components.training.conftest import plain

DEIT = Arch(name="deit_tiny_distilled_patch16_224")
SETTINGS: dict[str, dict[str, Any]] = {
    "ssld": {"label_share": 0.5},
    "kd": {"label_share": 0.2, "temperature": 2.0},
    "dkd": {"label_share": 0.5},
    "dist": {"label_share": 1 / 3},
    "feature": {"label_share": 0.2, "teacher_labels": "online"},
    "deit": {"label_share": 0.5},
    "deit_soft": {"label_share": 0.9, "temperature": 3.0},
}


@pytest.fixture
def distilling(data: SimpleNamespace, params: DistillParams, weights: Path) -> TrainSpec:
    spec = driver.make_spec(
        params, params.student, params.ray, params.data, data.manifest, read_plan(data.plan),
        weights / "student.safetensors", (),
    )  # fmt: skip
    return replace(spec, teacher=data.teacher, soft_labels=Path("labels").resolve())


def by(name: str, spec: TrainSpec, *more: Phase, **settings: Any) -> TrainSpec:
    """A distillation by one method; DeiT's with a student of its own."""
    asked = {"crops": 2, "unlabeled_per_class": 2, "method": name, **SETTINGS[name], **settings}
    phases = (Phase("distil", "student", 2, LearningRate(initial=0.02), task=name), *more)
    spec = replace(spec, distill=Distill.model_validate(asked), phases=phases, allow_flat_loss=True)
    if name.startswith("deit"):
        slow = (replace(phases[0], lr=LearningRate(initial=5e-4)), *more)
        return replace(spec, arch=DEIT, start=None, optimizer=Optimizer(name="adamw"), phases=slow)
    return spec


def tensors(outcome: local.Outcome) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in outcome.result.nets["student"].items()}


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "feature"])
def test_it_learns(name: str, distilling: TrainSpec) -> None:
    outcome = local.run(by(name, distilling))
    assert outcome.result.history[-1]["val_top1"] > 0.4
    assert outcome.result.chosen > 0
    names = set(build.create(distilling.arch, len(distilling.class_names)).state_dict())
    assert set(outcome.result.nets["student"]) == names, "a projector is no part of it"


@pytest.mark.parametrize("name", ["deit", "deit_soft"])
def test_a_transformer_with_two_heads_is_saved_and_answers_with_their_mean(
    name: str, distilling: TrainSpec, tmp_path: Path
) -> None:
    short = Phase("labelled", "student", 1, LearningRate(initial=5e-5))
    spec = by(name, distilling, short)
    outcome = local.run(spec)
    assert outcome.result.history[-1]["phase"] == "labelled"
    learnt = outcome.result.nets["student"]
    begun = create_network(DEIT, len(spec.class_names), None, spec.seed).state_dict()
    assert set(learnt) == set(timm.create_model(DEIT.name, num_classes=4).state_dict()), "timm's names"
    for head in ("head", "head_dist"):
        assert not torch.equal(learnt[f"{head}.weight"], begun[f"{head}.weight"]), "both learn"
    assert not torch.equal(learnt["head.weight"], learnt["head_dist.weight"])

    module = build.create(DEIT, len(spec.class_names))
    module.load_state_dict(learnt)
    teacher = read_card(distilling.teacher / "model.json")  # type: ignore[operator]
    mean, std = build.preprocessing(DEIT)
    card = teacher.model_copy(update={"arch": DEIT, "mean": list(mean), "std": list(std)})
    checkpoint.save(tmp_path / "model.safetensors", tmp_path / "model.json", module.eval(), card)
    again: Any = checkpoint.load(tmp_path)[0]
    index = open_index(spec.manifest)
    inputs = Normalise(mean, std, torch.device("cpu"))(plain(index, spec.root, index.rows("val").tolist()))
    with torch.no_grad():
        answer = again(inputs)
        own, taught = again.forward_features(inputs)[:, :2].unbind(1)
        torch.testing.assert_close(answer, (again.head(own) + again.head_dist(taught)) / 2)
    assert np.array_equal(answer.argmax(1).numpy(), outcome.result.predictions["student"]["val"])


def test_mixed_images_and_labels_learn_together(distilling: TrainSpec) -> None:
    for name in ("dkd", "deit"):
        spec = by(name, distilling)
        mixed = replace(spec, train=spec.train.model_copy(update={"mixup": 0.8, "cutmix": 1.0, "epochs": 1}))
        history = local.run(mixed).result.history
        assert history[-1]["train_loss"] < history[0]["train_loss"] * 1.1


@pytest.mark.parametrize("name", ["feature", pytest.param("deit", marks=pytest.mark.slow)])
def test_two_workers_wait_for_no_gradient_that_does_not_come(name: str, distilling: TrainSpec) -> None:
    spec = by(name, distilling)
    spec = replace(spec, train=spec.train.model_copy(update={"batch_size": 2}))  # some have no label at all
    outcome = local.run_group(spec, 2)
    assert len(outcome.result.history) == 2


def test_a_projector_goes_on_where_it_was(distilling: TrainSpec) -> None:
    spec = by("feature", distilling)
    whole = local.run(spec)
    stopped = local.run(spec, stop_when=lambda steps: steps >= 3)
    kept = stopped.state["learner"]["task"]
    assert "projector.weight" in kept
    rest = local.run(spec, checkpoint=stopped.context.checkpoint)
    assert tensors(rest) == tensors(whole)


def test_several_teachers_teach_and_their_labels_are_kept_apart(
    distilling: TrainSpec, tmp_path: Path
) -> None:
    assert distilling.teacher is not None
    other = tmp_path / "other"
    shutil.copytree(distilling.teacher, other)
    card = read_card(other / "model.json")
    card.model_copy(update={"std": [0.3, 0.3, 0.3]}).write(other / "model.json")
    spec = by("ssld", distilling)
    one = local.run(spec)
    folders = set(Path("labels").iterdir())
    several = local.run(replace(spec, teachers=(other,)))
    assert tensors(one) != tensors(several)
    assert len(set(Path("labels").iterdir()) - folders) == len(folders), "none was taken for another's"
    assert several.result.history[-1]["val_top1"] > 0.4
    assert replace(spec, teachers=(other,)).key() != spec.key()

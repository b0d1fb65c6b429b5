"""What names a job: exactly what decides its weights."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from components.audit.plan_schema import Plan, read_plan
from components.common.storage import read_json, write_json
from components.models.params import Optimizer
from components.training import augmentation, driver
from components.training.params import DistillParams
from components.training.spec import Phase, TrainSpec
from components.training.trainer import create_network


def make_spec(data: SimpleNamespace, params: DistillParams, start: Path | None) -> TrainSpec:
    return driver.make_spec(
        params, params.teacher, params.ray, params.data, data.manifest, read_plan(data.plan), start,
        (Phase("finetune", "teacher", 3, params.teacher.lr),),
    )  # fmt: skip


def test_checkpoints_belong_to_exactly_one_job(
    data: SimpleNamespace, params: DistillParams, weights: Path, monkeypatch
) -> None:
    spec = make_spec(data, params, weights / "teacher.safetensors")
    assert make_spec(data, params, weights / "teacher.safetensors").key() == spec.key()
    others = [
        replace(spec, seed=4),
        replace(spec, start=None),
        replace(spec, workers=3),
        replace(spec, plan=Plan()),
        replace(spec, optimizer=Optimizer(momentum=0.8)),
        replace(spec, phases=(Phase("finetune", "teacher", 4, params.teacher.lr),)),
        replace(spec, phases=(Phase("finetune", "teacher", 3, params.teacher.lr, task="ssld"),)),
        replace(spec, phases=(replace(spec.phases[0], size=48),)),
        replace(spec, phases=(replace(spec.phases[0], augment="flip"),)),
        replace(spec, phases=(replace(spec.phases[0], optimizer=Optimizer(name="adamw")),)),
        replace(spec, train=spec.train.model_copy(update={"ema": 0.9})),
    ]
    keys = {spec.key(), *(other.key() for other in others)}
    monkeypatch.setattr(augmentation, "VERSION", -1)
    keys.add(spec.key())
    assert len(keys) == len(others) + 2


def test_the_same_seed_gives_the_same_network(
    data: SimpleNamespace, params: DistillParams, weights: Path
) -> None:
    def tensors(seed: int, start: Path | None) -> list[torch.Tensor]:
        return list(create_network(params.student.arch, 4, start, seed).state_dict().values())

    start = weights / "student.safetensors"
    torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(tensors(1, start), tensors(1, start), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(tensors(1, start), tensors(2, start), strict=True))


def test_settings_take_the_place_of_the_recipes_own(
    data: SimpleNamespace, params: DistillParams, weights: Path
) -> None:
    spec = make_spec(data, params, None)
    strong = replace(spec, train=spec.train.model_copy(update={"augment": "deit", "mixup": 0.0}))
    assert augmentation.RECIPES["deit"].mixup > 0
    assert strong.recipe().mixup == 0
    assert strong.recipe().cutmix == augmentation.RECIPES["deit"].cutmix


def test_a_phase_may_have_a_size_an_optimizer_and_an_augmentation_of_its_own(
    data: SimpleNamespace, params: DistillParams
) -> None:
    spec = make_spec(data, params, None)
    train = spec.train.model_copy(update={"image_size": 24, "mixup": 0.5, "augment": "standard"})
    spec = replace(spec, train=train)
    plain = spec.phases[0]
    own = replace(plain, size=spec.size * 3 // 2, optimizer=Optimizer(name="lamb"), augment="flip")
    assert (spec.learn_size(plain), spec.size_of(plain)) == (24, spec.size)
    assert (spec.learn_size(own), spec.size_of(own)) == (spec.size * 3 // 2,) * 2, "FixRes: both alike"
    assert spec.recipe(plain).mixup == spec.recipe().mixup == 0.5
    assert spec.recipe(own) == augmentation.RECIPES["flip"], "as it is published"
    assert spec.optimizer_of(plain) == spec.optimizer
    assert spec.optimizer_of(own).name == "lamb"
    both = replace(spec, phases=(plain, own))
    assert both.largest() == spec.size * 3 // 2
    assert both.costs(plain) == (1.0, 1.0)
    assert both.costs(own) == ((spec.size * 1.5 / 24) ** 2, 2.25)
    assert both.judging_costs() == {"teacher": 2.25}, "that of its last phase"


def test_start_weights_that_were_distilled_learn_by_stages(
    data: SimpleNamespace, params: DistillParams, weights: Path, capsys
) -> None:
    """By their name, or by what their lineage says; not where a person has decided."""

    def spec_of(**teacher: object) -> TrainSpec:
        net = params.teacher.model_copy(update=teacher)
        given = params.model_copy(update={"teacher": net})
        return make_spec(data, given, weights / "teacher.safetensors")

    plain = spec_of()
    assert plain.optimizer.stage_rates is None
    capsys.readouterr()
    named = spec_of(weights="ResNet50_vd_ssld_pretrained.tar")
    assert named.optimizer.stage_rates == [0.25, 0.25, 0.5, 0.5, 0.75]
    assert "ResNet50_vd_ssld_pretrained.tar: weights that were distilled learn at" in capsys.readouterr().err
    assert named.key() != plain.key()
    for own in (Optimizer(stage_rates=[]), Optimizer(layer_decay=0.7)):
        assert spec_of(weights="x_ssld.tar", optimizer=own).optimizer == own
    record = weights / "teacher.json"
    content = read_json(record)
    content["lineage"].append({"source": "teacher: outputs/teacher/model.safetensors", "sha256": "0"})
    write_json(record, content)
    assert spec_of().optimizer.stage_rates == named.optimizer.stage_rates

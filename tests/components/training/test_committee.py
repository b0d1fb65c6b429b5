"""The committee: when there is one, that its members differ, and what distillation makes of it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from components.audit.plan_schema import read_plan
from components.common.findings import read_report
from components.common.storage import read_json
from components.models.card import read_card
from components.training import control
from components.training.params import DistillParams
from components.training.spec import Phase, TrainSpec
from tests.components.training import local
from tests.components.training.test_training import open_gate, run_distill


def changed(params: DistillParams, **distill: object) -> DistillParams:
    return params.model_copy(update={"distill": params.distill.model_copy(update=distill)})


def student(params: DistillParams, data: SimpleNamespace) -> TrainSpec:
    plan = read_plan(data.plan, None)
    return control.student_spec(params, data.manifest, plan, data.teacher, data.weights)


@pytest.mark.parametrize("unlabelled", [4, 0])  # of each class, beside 96 labelled images
def test_few_unlabelled_images_need_no_committee(
    data: SimpleNamespace, params: DistillParams, unlabelled: int
) -> None:
    some = changed(params, unlabeled_per_class=unlabelled)
    assert control.members(some, student(some, data), 3) == 0


def test_a_pool_larger_than_the_labelled_images_has_one(
    data: SimpleNamespace, params: DistillParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = student(params, data)
    monkeypatch.setattr(control, "training_rows", lambda index, plan: index.rows("train")[:5])
    # 8 unlabelled images may be chosen: the student learns from 3 x (5 + 8), a member from 3 x 5
    assert control.members(params, spec, 3) == 2
    assert control.members(params, spec, 30) == control.MEMBERS
    assert control.members(changed(params, committee=1), spec, 30) == 1
    assert control.members(changed(params, committee=0), spec, 30) == 0


def test_networks_of_other_streams_are_others(data: SimpleNamespace, params: DistillParams) -> None:
    spec = student(params, data)
    phases = tuple(
        Phase(f"phase {n}", f"net {n}", 1, params.student.lr, stream=stream)
        for n, stream in enumerate((0, 0, 1))
    )
    spec = replace(spec, phases=phases, teacher=None, distill=None, soft_labels=None)
    outcome = local.run(spec)
    first, same, other = (outcome.result.nets[f"net {n}"] for n in range(3))
    kernels = [name for name, tensor in first.items() if tensor.ndim > 1]
    assert all(not torch.equal(first[name], other[name]) for name in kernels)
    assert first["conv_stem.weight"].shape == same["conv_stem.weight"].shape
    assert [row["epoch"] for row in outcome.result.history] == [1, 1, 1]
    with_streams = [replace(phase, stream=3) for phase in phases]
    assert replace(spec, phases=tuple(with_streams)).key() != spec.key()


def test_distillation_learns_from_the_committee_where_it_is_more_often_right(
    data: SimpleNamespace, params: DistillParams
) -> None:
    two = changed(params, committee=2, control=False)
    open_gate(two, data)
    out = Path("outputs/student")
    run_distill(two, data, out)

    found = next(one for one in read_report(out / "report.json").findings if one.rule == "distill.committee")
    assert isinstance(found.measured, float)
    assert isinstance(found.limit, float)
    sources = [entry.source for entry in read_card(out / "model.json").lineage]
    members = [source for source in sources if source.startswith("committee")]
    assert len(members) == (2 if found.measured > found.limit else 0)
    assert read_json(out / "metrics.json")["kept"] == "student"
    # trained once: the same step again takes them from where they are kept
    kept = list((Path(".retort") / "cache" / "trained").glob("*-[12]/model.safetensors"))
    assert len(kept) == 2
    assert kept[0].read_bytes() != kept[1].read_bytes()

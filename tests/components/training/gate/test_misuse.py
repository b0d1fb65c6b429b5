"""Each misuse of row 2.3 by itself and several in one run: each is named, with its file or tensor."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.common.errors import FindingsError, RetortError
from components.common.findings import Finding, read_report
from components.common.storage import read_json, sha256_file, write_json
from components.models import build, checkpoint
from components.models.card import Lineage, read_card
from components.step import StepContext
from components.tracking.tracker import Tracker
from components.training import gate
from components.training.check import check, rules
from components.training.params import CheckParams, DistillParams
from tests.components.training.conftest import write_start

Judge = Callable[..., list[Finding]]


def changed(params: DistillParams, **sections: dict[str, Any]) -> CheckParams:
    values = params.model_dump(by_alias=True)
    for section, change in sections.items():
        values[section] = {**values[section], **change}
    return CheckParams.model_validate(values)


@pytest.fixture
def faults(data: SimpleNamespace, params: DistillParams, tmp_path: Path) -> Judge:
    """The errors that the rules find, all of them."""

    def run(**sections: dict[str, Any]) -> list[Finding]:
        asked = changed(params, **sections)
        judged = StepContext("check", asked, tmp_path / "outputs/check", Tracker("check", asked.registry))
        rules(judged, asked, manifest=data.manifest, teacher=data.teacher, weights=data.weights)
        return judged.report.errors()

    return run


def said(found: list[Finding], rule: str) -> str:
    return "\n".join(finding.message for finding in found if finding.rule == f"distill.{rule}")


def keep_record(path: Path, tensors: dict[str, Any]) -> None:
    """Replace start weights, and the digest in their record with them: only what they hold can tell."""
    save_file(tensors, str(path))
    record = path.with_suffix(".json")
    write_json(record, {**read_json(record), "sha256": sha256_file(path)})


def random_kernels(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(t.shape, generator=generator) * t.std() + t.mean() if t.ndim > 1 else t
        for name, t in tensors.items()
    }


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], **card: Any) -> None:
    """A teacher whose files fit each other, with other tensors or another card."""
    module, own = checkpoint.load(folder)
    module.load_state_dict({**module.state_dict(), **tensors})
    own = own.model_copy(update=card)
    checkpoint.save(folder / "model.safetensors", folder / "model.json", module, own)


def test_random_kernels_under_trained_norms_whose_source_is_random_as_well(
    faults: Judge, weights: Path
) -> None:
    """Record, lineage and source all agree: the norms tell."""
    write_start(weights, "student", random_kernels(load_file(weights / "student.safetensors")))
    found = faults()
    assert {finding.rule for finding in found} == {"distill.student_weights"}
    assert "batch norms remember other inputs than their kernels give" in said(found, "student_weights")


def test_random_kernels_with_a_record_to_match(faults: Judge, weights: Path) -> None:
    path = weights / "student.safetensors"
    keep_record(path, random_kernels(load_file(path)))
    text = said(faults(), "student_weights")
    assert "tensors are not those of student-start.safetensors" in text
    assert "batch norms remember other inputs" in text


def test_a_file_that_its_record_does_not_name(faults: Judge, weights: Path) -> None:
    path = weights / "student.safetensors"
    save_file(random_kernels(load_file(path)), str(path))
    text = said(faults(), "student_weights")
    assert "student.json beside it names" in text
    assert "batch norms remember other inputs" in text


def test_a_lineage_edited_by_hand_is_named_for_teacher_and_student(faults: Judge, weights: Path) -> None:
    for who in ("teacher", "student"):
        record = read_json(weights / f"{who}.json")
        record["lineage"][0]["sha256"] = "ab" * 32
        write_json(weights / f"{who}.json", record)
    found = faults()
    for who in ("teacher", "student"):
        assert f"outputs/weights/{who}.safetensors: {who}.json says that it was made of" in said(
            found, f"{who}_weights"
        )
    assert "its model.json says that it came from" in said(found, "teacher_weights")


def test_a_teacher_that_is_the_student(faults: Judge, teacher: Path, weights: Path) -> None:
    tensors = load_file(weights / "student.safetensors")
    other = {name: t + 0.01 * torch.randn_like(t) if t.ndim > 1 else t for name, t in tensors.items()}
    write_start(weights, "student", other)
    rewrite(teacher, other)
    text = said(faults(distill={"min_teacher_accuracy": 0.0}), "teacher_weights")
    assert "every kernel is the student's start weights'" in text


def test_a_teacher_that_was_itself_distilled(faults: Judge, teacher: Path) -> None:
    card = read_card(teacher / "model.json")
    taught = Lineage(source="teacher: outputs/teacher/model.safetensors", sha256="00", coverage=0.0)
    rewrite(teacher, {}, lineage=[*card.lineage, taught])
    assert "it is the student" in said(faults(), "teacher_weights")


def test_a_teacher_of_other_images_of_the_same_classes(faults: Judge, teacher: Path) -> None:
    """Names and counts agree: its fingerprint tells, and so does what its training measured."""
    rewrite(teacher, {}, data_fingerprint="0" * 64)
    write_json(teacher / "metrics.json", {"val": {"top1": 0.2}})
    found = faults()
    assert "says that it was trained on other data (fingerprint 000000000000..." in said(
        found, "teacher_weights"
    )
    assert "metrics.json says that its training measured 20.0%" in said(found, "teacher_accuracy")


def test_what_its_training_measured_may_differ_by_chance(faults: Judge, teacher: Path) -> None:
    write_json(teacher / "metrics.json", {"val": {"top1": 0.9}})
    assert not faults()


def test_more_teachers_pass_the_same_rules_and_are_named(
    faults: Judge, teacher: Path, tmp_path: Path
) -> None:
    shutil.copytree(teacher, tmp_path / "second")
    assert not faults(distill={"teachers": ["second"]})
    card = read_card(teacher / "model.json")
    rewrite(tmp_path / "second", {}, data_fingerprint="0" * 64, class_names=card.class_names[::-1])
    found = faults(distill={"teachers": ["second"]})
    assert {finding.subject for finding in found} == {"teacher second"}
    assert {finding.rule for finding in found} == {"model.class_names", "distill.teacher_weights"}
    assert all("second/model.json" in finding.message for finding in found)


def test_three_misuses_in_one_run_are_all_named(
    data: SimpleNamespace, params: DistillParams, tmp_path: Path
) -> None:
    start = load_file(data.weights / "student.safetensors")
    keep_record(data.weights / "student.safetensors", random_kernels(start))
    torch.manual_seed(9)
    untrained = build.create(params.teacher.arch, 4).state_dict()
    rewrite(data.teacher, untrained, data_fingerprint="0" * 64)
    asked = changed(params, student={"lr": {"initial": 1.298}}, distill={"min_teacher_accuracy": 0.8})
    out = tmp_path / "outputs/check"
    with pytest.raises(FindingsError):
        check(
            asked, manifest=data.manifest, plan=data.plan, teacher=data.teacher, weights=data.weights, out=out
        )
    found = read_report(out / "report.json").errors()
    assert {finding.rule.removeprefix("distill.") for finding in found} == {
        "teacher_accuracy", "teacher_weights", "student_weights", "initial_lr",
    }  # fmt: skip
    text = said(found, "teacher_weights")
    assert "other data" in text
    assert "never trained" in text
    assert "do not resemble the weights that it is said to come from" in text
    assert not (out / gate.FILE).exists()
    page = (out / "report.html").read_text()
    assert "batch norms against their inputs" in page
    assert "student-start.safetensors" in page


@pytest.mark.parametrize(
    "sections",
    [
        {"student": {"optimizer": {"name": "adamw"}}},
        {"student": {"lr": {"initial": 0.02, "schedule": "constant"}}},
        {"student": {"train": {"epochs": 4, "batch_size": 12}}},
        {"distill": {"method": "kd"}},
        {"distill": {"label_share": 0.3}},
        {"distill": {"teachers": ["second"]}},
        {"distill": {"crops": 3}},
        {"global": {"seed": 4}},
    ],
)
def test_what_is_trained_is_what_was_judged(
    data: SimpleNamespace, params: DistillParams, tmp_path: Path, sections: dict[str, Any]
) -> None:
    folder = tmp_path / "outputs/check"
    files = gate.inputs(data.manifest, data.plan, data.teacher, data.weights)
    write_json(folder / "report.json", {"schema_version": 1, "step": "check", "passed": True})
    gate.write(folder / gate.FILE, params, files)
    gate.require_passed(folder, params, files)
    base = params.model_dump(by_alias=True)
    sections = {name: {**base[name], **change} for name, change in sections.items()}
    with pytest.raises(RetortError, match=r"the check before distillation passed with .* run 'retort check'"):
        gate.require_passed(folder, changed(params, **sections), files)


def test_a_plan_that_was_edited_since_closes_the_gate(
    data: SimpleNamespace, params: DistillParams, tmp_path: Path
) -> None:
    folder = tmp_path / "outputs/check"
    files = gate.inputs(data.manifest, data.plan, data.teacher, data.weights)
    write_json(folder / "report.json", {"schema_version": 1, "step": "check", "passed": True})
    gate.write(folder / gate.FILE, params, files)
    data.plan.write_text(data.plan.read_text().replace("1.5", "2.5"))
    with pytest.raises(RetortError, match=r"outputs/audit/plan\.json: not the file that passed"):
        gate.require_passed(folder, params, files)

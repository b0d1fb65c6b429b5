"""The step ``check``: the gate before distillation. Teachers, student and learning rate, judged now."""

from __future__ import annotations

from pathlib import Path

from components.common.progress import at
from components.common.storage import need
from components.step import StepContext, step
from components.training import driver, gate, margin
from components.training.gate import images, rate, report, student
from components.training.gate import teacher as teachers
from components.training.gate.teacher import Subject
from components.training.params import CheckParams


def check(
    params: CheckParams, *, manifest: Path, plan: Path, teacher: Path, weights: Path, out: Path
) -> None:
    """Judge what distillation would start from; writes ``gate.json`` when nothing is wrong.

    All rules are asked before the step stops, so that one run names every fault.

    Args:
        manifest: the clean manifest.
        plan: ``plan.json`` of the audits.
        teacher: folder of the finetuned teacher.
        weights: folder with ``teacher.safetensors`` and ``student.safetensors``.

    Raises:
        FindingsError: model.class_names, distill.teacher_accuracy, distill.teacher_weights,
            distill.student_weights or distill.initial_lr.
        RetortError: a file is missing or not what it should be.
    """
    files = gate.inputs(manifest, plan, teacher, weights, params.distill.teachers)
    with step("check", params, out, files) as run:
        need(manifest, "validate")
        rules(run, params, manifest=manifest, teacher=teacher, weights=weights)
        found = margin.judge(
            run, params, manifest=manifest, plan=plan, teacher=teacher, weights=weights, out=out
        )
        gate.write(run.product(out / gate.FILE), params, files, found)


def rules(run: StepContext, params: CheckParams, *, manifest: Path, teacher: Path, weights: Path) -> None:
    """Ask every rule, whatever the others find; each fault is a finding of its own."""
    subjects = [Subject("teacher", teacher)]
    subjects += [Subject(f"teacher {each}", Path(each), main=False) for each in params.distill.teachers]
    for subject in subjects:
        need(subject.folder / "model.json", "finetune")
    names = driver.class_names(params, manifest)
    judged = images.judged(params, manifest)
    for subject in subjects:
        at(f"judging {subject.name}")
        teachers.judge(run, params, subject, manifest=manifest, weights=weights, images=judged, names=names)
    at("judging the student's start weights")
    student.judge(run, params, weights, judged)
    rate.judge(run, params)
    report.show_rules(run)

"""The step ``distill``: SSLD. The student learns from the teacher, then shortly from the labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from components.audit.plan import Plan
from components.common.progress import say
from components.common.step import Run, step
from components.common.storage import human_bytes, need, need_disk, state_dir, write_json
from components.dataset import manifest as manifests
from components.models.card import Lineage, read_card
from components.models.params import LearningRate
from components.training import budget, driver, gate, preflight, results, soft_labels
from components.training.metrics import evaluate
from components.training.params import Distill, DistillParams
from components.training.spec import Phase, TrainSpec
from components.training.state import TrainResult

CONTROL = "control"


def distill(
    params: DistillParams,
    *,
    manifest: Path,
    plan: Path,
    teacher: Path,
    weights: Path,
    check: Path,
    out: Path,
) -> None:
    """Distil the student; writes its model, metrics, history and confusion matrix into ``out``.

    Phases: ``distil`` (JS divergence from the frozen teacher, on labelled and on chosen unlabelled images),
    ``labelled`` (a short finetune on labels), and the same student without a teacher, on the same number of
    steps (``control``, when ``distill.control``), to tell what distillation gained.

    Args:
        manifest: the clean manifest.
        plan: ``plan.json`` of the audits.
        teacher: folder of the finetuned teacher.
        weights: folder with ``student.safetensors``.
        check: folder of the gate, passed for exactly these files and values.

    Raises:
        FindingsError: preflight.shm, train.finite or train.learns.
        RetortError: the gate did not pass these inputs; a file, the plan, Ray or a worker is at fault.
    """
    judged = gate.inputs(manifest, plan, teacher, weights, params.distill.teachers)
    inputs = {**judged, "outputs/check/gate.json": check / gate.FILE}
    with step("distill", params, out, inputs=inputs) as run:
        need(manifest, "validate")
        gate.demand(check, params, judged)
        whole = _spec(params, manifest, driver.audited(run, plan), teacher, weights)
        train = params.student.train
        spec = budget.within(
            run,
            lambda epochs: replace(whole, phases=_phases(params, epochs)),
            params.ray, "student", params.distill.epochs or train.epochs, train.time_budget_minutes,
        )  # fmt: skip
        preflight.preflight(run, spec, params.ray, "student")
        _say_disk(run, params, spec)
        folder = driver.checkpoints("distill", spec)
        result = driver.train(run, spec, params.ray, folder)
        _write(run, params, spec, result, teacher, weights, out)
    driver.forget(folder)


def _spec(params: DistillParams, manifest: Path, plan: Plan, teacher: Path, weights: Path) -> TrainSpec:
    """All but the phases."""
    student = params.student
    spec = driver.make_spec(
        params, student, params.ray, params.data, manifest, plan,
        driver.start_weights(weights, "student", student), (),
    )  # fmt: skip
    return replace(
        spec,
        teacher=teacher.resolve(),
        teachers=tuple(Path(folder).resolve() for folder in params.distill.teachers),
        distill=params.distill,
        soft_labels=state_dir("cache", "soft_labels").resolve(),
    )


def _phases(params: DistillParams, epochs: int) -> tuple[Phase, ...]:
    settings, student = params.distill, params.student
    short = labelled_rate(student.lr, settings)
    phases = [
        Phase("distil", "student", epochs, student.lr, task="ssld"),
        Phase("labelled", "student", settings.finetune_epochs, short),
    ]
    if settings.control:
        phases += [
            Phase("control", CONTROL, epochs, student.lr, matched=True),
            Phase("control, labelled", CONTROL, settings.finetune_epochs, short),
        ]
    return tuple(phase for phase in phases if phase.epochs)


def labelled_rate(lr: LearningRate, settings: Distill) -> LearningRate:
    """The learning rate of the short finetune on labels: a share of ``lr``, with a warm-up of its own.

    Its optimizer begins anew, and AdamW's first steps are of full size however small the gradient is. At most
    half of the phase warms up.
    """
    return lr.model_copy(
        update={
            "initial": lr.initial * settings.finetune_lr,
            "warmup_epochs": min(lr.warmup_epochs, settings.finetune_epochs / 2),
        }
    )


def _say_disk(run: Run, params: DistillParams, spec: TrainSpec) -> None:
    if params.distill.teacher_labels != "cached":
        return
    assert spec.soft_labels is not None
    splits = manifests.read(spec.manifest, ["split"])["split"].to_pylist()
    count = splits.count("train") * params.distill.crops + splits.count("unlabeled")
    wanted = soft_labels.stored_bytes(count, len(spec.class_names), params.distill.top_k_labels)
    need_disk(spec.soft_labels, wanted, "soft labels")
    say(
        f"{run.name}: soft labels of {count:,} images take {human_bytes(wanted)} of disk, kept for later runs"
    )


def _write(
    run: Run,
    params: DistillParams,
    spec: TrainSpec,
    result: TrainResult,
    teacher: Path,
    weights: Path,
    out: Path,
) -> None:
    names = spec.class_names
    actual = {split: driver.truth(spec, split) for split in ("val", "test")}
    metrics: dict[str, Any] = {}
    for net, predictions in result.predictions.items():
        metrics[net] = {split: evaluate(actual[split], predictions[split], names) for split in actual}
    student = metrics.pop("student")
    written = {**student, **metrics, "unlabelled_images": result.chosen}
    if CONTROL in metrics:
        written["gain"] = _gain(run, actual, result.predictions)
    card = read_card(teacher / "model.json")
    lineage = [
        *driver.start_lineage(weights, "student", params.student),
        # the teacher gave its answers, not its tensors: it covers none of the student's
        Lineage(source="teacher: outputs/teacher/model.safetensors", sha256=card.sha256, coverage=0.0),
    ]
    driver.write_model(run, spec, result.nets["student"], lineage, out, result.sizes["student"])
    write_json(run.product(out / "metrics.json"), written)
    results.write_history(run.product(out / "history.csv"), result.history)
    said = result.predictions["student"]["val"]
    results.write_confusion(run.product(out / "confusion.csv"), actual["val"], said, names)
    results.show_curves(run.page, "Training curves of the student", result.history)
    results.show_recall(run.page, "The student's recall per class", student)
    results.show_confusion(run.page, "The student's confusion matrix", actual["val"], said, names)
    run.tracker.summary(results.headline(student))


def _gain(run: Run, actual: dict[str, np.ndarray], said: dict[str, Any]) -> dict[str, float]:
    """What distillation gained over the same student without a teacher, at the end of the schedule."""
    gain, half = results.paired_gain(actual["val"], said["student"]["val"], said[CONTROL]["val"])
    worse = gain + half < 0
    run.find(
        "distill.gain", "warning" if worse else "info", "student",
        f"with the teacher {gain:+.2%} top-1 on the same {len(actual['val'])} validation images as the same "
        f"student without one, on as many steps (95 % interval {gain - half:+.2%} to {gain + half:+.2%})",
        measured=round(gain, 6), limit=0.0, row="2.3",
        advice="The teacher does harm here. A better teacher (see distill.teacher_accuracy), more "
        "distill.epochs or more unlabelled images may turn that; or do without: set teacher.arch to the "
        "student's network, run 'retort finetune' and use 'retort export --of teacher'."
        if worse else "",
    )  # fmt: skip
    run.tracker.summary({"gain_val": gain})
    written = {"val_top1": gain, "val_half_width": half}
    if len(actual["test"]):  # own splits may have none
        test, test_half = results.paired_gain(actual["test"], said["student"]["test"], said[CONTROL]["test"])
        run.tracker.summary({"gain_test": test})
        written |= {"test_top1": test, "test_half_width": test_half}
    return written

"""The committee: more teachers, where labels are few beside unlabelled images.

What a student gains then is what it is told about the unlabelled images, and one network that learnt from a
few labels is wrong about many of them. Several that began and drew otherwise are wrong about different ones:
their mean is right more often (Lakshminarayanan et al., "Simple and Scalable Predictive Uncertainty
Estimation using Deep Ensembles", 2017). From few labels each is trained in a moment.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from components.common.findings import Finding
from components.common.progress import at, counted
from components.common.storage import remove, state_dir
from components.models import checkpoint
from components.models.card import Lineage, read_card
from components.step import StepContext
from components.training import control, driver, margin, preflight
from components.training.control import Trained
from components.training.params import DistillParams
from components.training.spec import TrainSpec

log = logging.getLogger(__name__)

RULE = "distill.committee"


def join(
    run: StepContext, params: DistillParams, student: TrainSpec, epochs: int, chosen: int | None
) -> tuple[Path, ...]:
    """The folders of the members, trained now or before; none where the teacher alone is more often right.

    Members are networks of the student's kind, trained as the teacher was: its epochs, batch and
    augmentation, with the student's rate and optimizer. Validation images tell whether they help. Members
    that a finding of training stops are done without: the teacher needs none.

    Args:
        epochs: of the student.
        chosen: unlabelled images that it will learn from; None: as many as may be.

    Raises:
        FindingsError: something is missing that training needs.
        RetortError: Ray or a worker is at fault.
    """
    count = control.members(params, student, epochs, chosen)
    if not count or student.teacher is None:
        return ()
    spec = replace(
        student, phases=control.committee_phases(params, count), train=params.teacher.train, teacher=None,
        teachers=(), distill=None, soft_labels=None,
    )  # fmt: skip
    folders = _trained(run, params, spec)
    if isinstance(folders, Finding):
        message = f"the teacher teaches alone: its committee was stopped by {folders.rule}: {folders.message}"
        log.info(f"{run.name}: {message}")
        run.add_finding(RULE, "warning", "teacher", message, row="2.3", advice=folders.advice)
        return ()
    at("asking the committee")
    images, alone = margin.recognised(params, student.manifest, [student.teacher, *student.teachers])
    _, together = margin.recognised(
        params, student.manifest, [student.teacher, *student.teachers, *folders]
    )  # fmt: skip
    helps = together > alone
    verdict = "their mean answer is learnt" if helps else "the teacher alone is learnt from"
    message = (
        f"{counted(count, 'network')} of the student's kind, trained on labels, beside the teacher: together "
        f"they recognise {together:.1%} of {counted(images, 'validation image')}, the teacher {alone:.1%}; "
        f"{verdict}"
    )
    log.info(f"{run.name}: {message}")
    run.add_finding(
        RULE, "info", "teacher", message, measured=round(together, 6), limit=round(alone, 6), row="2.3"
    )
    return folders if helps else ()


def _trained(run: StepContext, params: DistillParams, spec: TrainSpec) -> tuple[Path, ...] | Finding:
    """All members in one job, each kept in a folder of its own."""
    folders = tuple(
        state_dir("cache", "trained").resolve() / f"{spec.key()[:32]}-{n}"
        for n in range(1, len(spec.phases) + 1)
    )
    if all(isinstance(control.read(folder, spec), Trained) for folder in folders):
        log.info(f"{run.name}: the committee was trained before, by the same values: it is taken")
        return folders
    place = driver.checkpoints("committee", spec)
    preflight.preflight(run, spec, params.ray, "student")
    result = control.attempt(run, spec, lambda own, spec: driver.train(own, spec, params.ray, place))
    if isinstance(result, Finding):
        driver.forget(place)
        return result
    for phase, folder in zip(spec.phases, folders, strict=True):
        remove(folder)
        rows = [row for row in result.history if row["phase"] == phase.name]
        trained = replace(Trained.of(result, phase.net), history=rows)
        control.write(folder, trained, spec, [], {"epochs": phase.epochs})
    driver.forget(place)
    return folders


def lineage(folders: tuple[Path, ...]) -> list[Lineage]:
    """Its members, whose answers the student has, and none of whose tensors."""
    return [
        Lineage(
            source=f"committee: {number} of {len(folders)} networks like the student, trained on labels",
            sha256=read_card(folder / checkpoint.CARD).sha256,
            coverage=0.0,
        )
        for number, folder in enumerate(folders, start=1)
    ]

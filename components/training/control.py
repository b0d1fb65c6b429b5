"""The control: the student alone, without a teacher, on the budget that distilling it will have.

It is trained before distillation, in the step ``check``, since nothing else shows what a teacher is worth.
Distillation takes its network from there.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from components.audit.plan_schema import Plan
from components.common import shared
from components.common.errors import FindingsError
from components.common.findings import Finding
from components.common.progress import counted
from components.common.storage import atomic_path, read_json, remove, state_dir, write_json
from components.models import checkpoint
from components.models.card import Lineage, read_card
from components.models.params import LearningRate
from components.step import StepContext
from components.training import budget, driver, method, report, seals
from components.training.inputs.index import open_index
from components.training.params import CheckParams, Distill
from components.training.sampling import training_rows
from components.training.spec import Phase, TrainSpec
from components.training.state import Tensors, TrainResult

log = logging.getLogger(__name__)

NET = "control"
FOLDER = "control"  # in the folder of the check
FILE, PREDICTIONS, SEAL = "control.json", "predictions.npz", "seal.json"
SCHEMA_VERSION = 1
ASKED = "asked-"  # before a name in PREDICTIONS
MINUTES = 10.0  # a control that is expected to take longer is a short one at first
PART = 5  # ... of one epoch in so many
MEMBERS = 4  # of a committee, beside the teacher: each further one adds less
# keys of ``distill`` that decide nothing of a network that is trained without a teacher
TEACHERS = (
    "method", "label_share", "temperature", "keep", "seeds", "teacher_labels", "crops", "top_k_labels",
    "epochs", "finetune_epochs", "finetune_lr", "finetune_size", "min_teacher_accuracy", "reference_lr",
    "reference_batch", "reference_optimizer", "control", "control_epochs", "committee",
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A network when its training is over.

    Attributes:
        tensors: of the plain module, by name.
        history: one row an epoch.
        predictions: classes int64 [n] by split (val, test), in the order of the manifest's rows.
        chosen: unlabelled images that its steps were matched to, or that it learnt from.
        size: pixels a side of the images that it is made for.
        sha256: of the file where it is kept.
        asked: what else it says when all is done, by name; see ``state.State``.
    """

    tensors: Tensors
    history: list[dict[str, Any]]
    predictions: dict[str, np.ndarray]
    chosen: int
    size: int
    sha256: str = ""
    asked: dict[str, np.ndarray] = field(default_factory=dict)

    def result(self, net: str) -> TrainResult:
        """As a job has it that trained this network alone."""
        return TrainResult(
            nets={net: self.tensors}, history=self.history, predictions={net: self.predictions},
            chosen=self.chosen, sizes={net: self.size}, asked={net: self.asked},
        )  # fmt: skip

    @staticmethod
    def of(result: TrainResult, net: str) -> Trained:
        """One network of a job."""
        return Trained(
            result.nets[net], result.history, result.predictions[net], result.chosen,
            result.sizes[net], asked=result.asked.get(net, {}),
        )  # fmt: skip


# --- what is trained ----------------------------------------------------------------------------------------


def student_spec(params: CheckParams, manifest: Path, plan: Plan, teacher: Path, weights: Path) -> TrainSpec:
    """What distillation has to do with the student, all but its phases."""
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
        who="student",
    )


def student_phases(params: CheckParams, epochs: int, task: str) -> tuple[Phase, ...]:
    """Learning from the teacher, then shortly from labels."""
    student = params.student
    phases = (
        Phase("distil", "student", epochs, student.lr, task=task),
        labelled(params, "labelled", "student"),
    )
    return tuple(phase for phase in phases if phase.epochs)


def control_phases(params: CheckParams, epochs: int) -> tuple[Phase, ...]:
    """The same from labels alone: as many steps, at the same rates."""
    student = params.student
    phases = (
        Phase("control", NET, epochs, student.lr, match_budget=True),
        labelled(params, "control, labelled", NET),
    )
    return tuple(phase for phase in phases if phase.epochs)


def members(params: CheckParams, student: TrainSpec, epochs: int, chosen: int | None = None) -> int:
    """How many networks the committee has beside the teacher, where ``distill.committee`` leaves it open.

    None, unless more unlabelled images than labelled ones are learnt from; else as many as learn from no more
    images than the student will, and ``MEMBERS`` at most.

    Args:
        epochs: of the student.
        chosen: unlabelled images that will be learnt from; None: as many as may be.
    """
    asked = params.distill.committee
    if asked is not None:
        return asked
    index = open_index(student.manifest)
    labelled = len(training_rows(index, student.plan))
    if chosen is None:
        most = params.distill.unlabeled_per_class * len(student.class_names)
        chosen = min(index.count("unlabeled"), most)
    if chosen <= labelled:
        return 0
    return min(MEMBERS, epochs * (labelled + chosen) // (params.teacher.train.epochs * labelled))


def committee_phases(params: CheckParams, count: int) -> tuple[Phase, ...]:
    """One network each, from labels alone, for as many epochs as the teacher had."""
    epochs, rate = params.teacher.train.epochs, params.student.lr
    return tuple(Phase(f"committee {n}", f"member {n}", epochs, rate, stream=n) for n in range(1, count + 1))


def labelled(params: CheckParams, name: str, net: str) -> Phase:
    """The short finetune on labels.

    At a size of its own it sees images as the network will be used on: plain ones. That is how SSLD's 83.7 %
    at a larger size became 84.0 % (PaddleClas, "Fix strategy"; Touvron et al., "Fixing the train-test
    resolution discrepancy", 2019, sec. 4).
    """
    settings, size = params.distill, params.distill.finetune_size
    rate = labelled_rate(params.student.lr, settings)
    return Phase(
        name, net, settings.finetune_epochs, rate, size=size, augment=None if size is None else "none"
    )


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


def control_spec(params: CheckParams, student: TrainSpec, epochs: int, seed: int | None = None) -> TrainSpec:
    """The control's training. Its key is what decides its bytes, so that nothing else trains it again.

    The teacher is in it only where it chooses unlabelled images: their number is that of the steps.

    Args:
        student: the specification that distillation has.
        seed: another one than the student's.
    """
    settings = params.distill
    spec = replace(
        student,
        phases=control_phases(params, epochs),
        seed=student.seed if seed is None else seed,
    )
    if not (settings.unlabeled_per_class and open_index(student.manifest).count("unlabeled")):
        return replace(spec, teacher=None, teachers=(), distill=None, soft_labels=None)
    default = Distill()
    fixed = {key: getattr(default, key) for key in TEACHERS if key in Distill.model_fields}
    fixed |= {"method": "ssld", "label_share": 0.0, "temperature": 1.0}
    return replace(spec, distill=settings.model_copy(update=fixed))


def whole(params: CheckParams, student: TrainSpec, epochs: int) -> TrainSpec:
    """All that both networks are trained with, as one job would: what a time budget is for."""
    phases = student_phases(params, epochs, "ssld")
    if params.distill.control:
        phases += control_phases(params, epochs)
    return replace(student, phases=(*phases, *committee_phases(params, members(params, student, epochs))))


def planned(run: StepContext, params: CheckParams, student: TrainSpec, check: Path | None = None) -> int:
    """Epochs of the main phase, within ``student.train.time_budget_minutes`` where it is given.

    Args:
        check: folder of the gate, whose decision holds: another machine would come to another one.
    """
    train, most = params.student.train, params.distill.epochs or params.student.train.epochs
    minutes = train.time_budget_minutes
    if check is not None and minutes is not None and (check / FILE).exists():
        told = read_json(check / FILE)
        if told.get("minutes") == minutes and told.get("most") == most:
            return int(told["planned"])
    spec = budget.within(
        run, lambda epochs: whole(params, student, epochs), params.ray, "student", most, minutes
    )
    return spec.phases[0].epochs


def control_epochs(run: StepContext, params: CheckParams, student: TrainSpec, planned: int) -> int:
    """How many epochs the control takes before the verdict: all of them, if that is a matter of minutes.

    A short one has a schedule of its own that ends: a network in mid-schedule says little of its end. What
    was decided is kept below ``.retort/budgets``, so that an interrupted control goes on.
    """
    asked = params.distill.control_epochs
    if asked is not None:
        return min(asked, planned)
    spec = control_spec(params, student, planned)
    kept = state_dir("budgets") / f"control-{spec.key()[:24]}.json"
    if shared.bring(kept):
        return int(read_json(kept)["epochs"])
    one, two = (budget.expected(control_spec(params, student, epochs), params.ray) for epochs in (1, 2))
    if one is None or two is None:
        epochs = max(1, planned // PART)
        why = f"how fast {params.ray.address} trains is not known yet"
    else:
        each = two.seconds - one.seconds
        fixed = one.seconds - each
        if fixed + planned * each <= 60 * MINUTES:
            return planned
        epochs = budget.fit_epochs(60 * MINUTES, fixed, each, max(1, planned // PART))
        why = f"all of them would take {(fixed + planned * each) / 60:.0f} min"
    if one is not None:  # else the next run knows the speed
        write_json(kept, {"epochs": epochs})
        shared.keep(kept)
    if epochs < planned:
        log.info(
            f"{run.name}: a short control of {counted(epochs, 'epoch')} of {planned} comes first, since "
            f"{why}; distill trains the whole one"
        )
    return epochs


def known(
    params: CheckParams,
    student: TrainSpec,
    chosen: int,
    images: int,
    teacher_score: float | None,
    alone_score: float | None,
) -> method.Known:
    """What the method of distillation is chosen by.

    Args:
        chosen: unlabelled images that will be learnt from.
        images: of validation, that both scores (top-1, 0..1) are of.
    """
    assert student.teacher is not None
    return method.Known(
        classes=len(student.class_names),
        labelled=len(training_rows(open_index(student.manifest), student.plan)),
        pool=chosen,
        student=params.student.arch,
        teacher=read_card(student.teacher / checkpoint.CARD).arch,
        optimizer=params.student.optimizer.name,
        teacher_score=teacher_score,
        alone_score=alone_score,
        images=images,
    )


# --- trained networks that are kept -------------------------------------------------------------------------


def store(key: str) -> Path:
    """Where what came of the training of that key is kept, so that it need not be trained again."""
    return state_dir("cache", "trained") / key[:32]


def _in_store(folder: Path) -> bool:
    """Whether it is a place of the store, not where a step leaves its products."""
    return folder.parent.resolve() == state_dir("cache", "trained").resolve()


def write(
    folder: Path, trained: Trained, spec: TrainSpec, lineage: list[Lineage], about: dict[str, Any]
) -> None:
    """Write a network with all that came of its training into a folder, sealed, whole or not at all.

    Args:
        about: more that ``control.json`` is to say.
    """
    with atomic_path(folder) as partial:
        partial.mkdir(parents=True)
        driver.save_model(
            spec, trained.tensors, lineage, partial / checkpoint.FILE, partial / checkpoint.CARD, trained.size
        )
        report.write_history(partial / "history.csv", trained.history)
        with (partial / PREDICTIONS).open("wb") as file:
            arrays = {**trained.predictions, **{ASKED + name: part for name, part in trained.asked.items()}}
            np.savez(file, **arrays)  # type: ignore[arg-type]
        content = {"key": spec.key(), "chosen": trained.chosen, "history": trained.history, **about}
        write_json(partial / FILE, {"schema_version": SCHEMA_VERSION, **content})
        files = [path for path in partial.iterdir() if path.name != SEAL]
        seals.write(partial / SEAL, files)
    if _in_store(folder):
        shared.keep(folder)


def read(folder: Path, spec: TrainSpec, key: str = "") -> Trained | str:
    """What came of exactly this training, from the folder where it was kept; else why not, in words.

    Args:
        key: of ``spec``, where it is known already.
    """
    if _in_store(folder):
        shared.bring(folder, folder=True)
    if not (folder / FILE).exists():
        return "there is none yet"
    if fault := seals.fault(folder / SEAL, folder):
        return fault
    content = read_json(folder / FILE)
    if content.get("schema_version") != SCHEMA_VERSION:
        return "it is of another version of this program"
    if content["key"] != (key or spec.key()):
        have, want = content.get("epochs"), sum(phase.epochs for phase in spec.phases[:1])
        if have is not None and have != want:
            return f"it had {counted(have, 'epoch')}, and {want} are asked for"
        return "it was trained on other data, weights or values"
    module, card = checkpoint.load(folder)
    with np.load(folder / PREDICTIONS) as arrays:
        predictions = {name: arrays[name] for name in arrays.files if not name.startswith(ASKED)}
        asked = {name.removeprefix(ASKED): arrays[name] for name in arrays.files if name.startswith(ASKED)}
    return Trained(
        module.state_dict(), content["history"], predictions, content["chosen"], card.input_size[1],
        card.sha256, asked,
    )  # fmt: skip


def hand_on(folder: Path, product: Path) -> None:
    """Copy a kept network to where a step leaves its products."""
    shutil.copytree(folder, product)


# --- training -----------------------------------------------------------------------------------------------

Fit = Callable[[StepContext, TrainSpec], TrainResult]


def attempt(run: StepContext, spec: TrainSpec, fit: Fit) -> TrainResult | Finding:
    """Train; the finding that stopped it, where a loss was no number or nothing was learnt: no error here.

    Raises:
        FindingsError: something else is wrong, that training the student would meet too.
    """
    own = StepContext(run.name, run.params, run.out, run.tracker)
    own.report.findings += run.report.findings  # the estimate is among them
    before = len(run.report.findings)
    try:
        result = fit(own, spec)
    except FindingsError:
        found = own.report.findings[before:]
        errors = [finding for finding in found if finding.level == "error"]
        if not errors or not all(finding.rule.startswith("train.") for finding in errors):
            run.report.findings += found
            run.report.passed = own.report.passed
            raise
        return errors[0]
    run.report.findings += own.report.findings[before:]
    return result


def obtain(
    run: StepContext, spec: TrainSpec, lineage: list[Lineage], about: dict[str, Any], fit: Fit
) -> Path | Finding:
    """The folder of the control that was trained by ``spec``, now or before; or why there is none."""
    key = spec.key()
    folder = store(key)
    if isinstance(read(folder, spec, key), Trained):
        log.info(f"{run.name}: the student alone was trained before, by the same values: that one is taken")
        return folder
    remove(folder)
    result = attempt(run, spec, fit)
    if isinstance(result, Finding):
        return result
    write(folder, Trained.of(result, NET), spec, lineage, about)
    driver.forget(driver.checkpoints(NET, spec))
    return folder

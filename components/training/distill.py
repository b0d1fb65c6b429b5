"""The step ``distill``: SSLD. The student learns from the teacher, then shortly from the labels."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from time import monotonic

from components.common import shared
from components.common.findings import Finding
from components.common.progress import at, counted
from components.common.storage import human_bytes, need, need_disk, remove
from components.dataset import manifest as manifests
from components.models.card import Lineage, read_card
from components.step import StepContext, name_of, step
from components.training import (
    advice,
    budget,
    cluster,
    committee,
    control,
    driver,
    gate,
    listener,
    method,
    preflight,
    report,
    shipped,
    soft_labels,
)
from components.training.control import NET as CONTROL
from components.training.control import Trained
from components.training.inputs.index import open_index
from components.training.margin import Margin
from components.training.params import DistillParams
from components.training.shipped import Pair
from components.training.spec import TrainSpec
from components.training.state import TrainResult

log = logging.getLogger(__name__)

ALONE = "control: the student alone, trained on labels without a teacher"


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
    """Distil the student; writes the better of it and its control, with metrics and history, into ``out``.

    Phases: ``distil`` (what the frozen teacher says, on labelled and on chosen unlabelled images) and
    ``labelled`` (a short finetune on labels). The control, the same student without a teacher on the same
    number of steps, comes from the check; it is trained here where that one was shorter, or another. With
    ``distill.seeds`` both are trained with so many seeds. What is finished is kept until the step is done.

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
    with step("distill", params, out, [*judged, check / gate.FILE]) as run:
        need(manifest, "validate")
        gate.require_passed(check, params, judged)
        base = control.student_spec(params, manifest, driver.load_plan(run, plan, manifest), teacher, weights)
        epochs = control.planned(run, params, base, check / control.FOLDER)
        margin = Margin.read(check)
        how = _method(run, params, base, margin)
        members = committee.join(run, params, base, epochs, margin.chosen)
        spec = replace(
            base,
            teachers=(*base.teachers, *members),
            distill=method.resolved(params.distill, how),
            phases=control.student_phases(params, epochs, how.method),
        )
        jobs = _Jobs(run, params, spec, control.control_spec(params, base, epochs), weights, check)
        preflight.preflight(run, spec, params.ray, "student", max(1, jobs.left()))
        _say_disk(run, params, spec)
        pairs = jobs.run_all()
        _write(run, params, spec, pairs, margin, how, teacher, members, weights, out)
    jobs.forget()


def _method(run: StepContext, params: DistillParams, base: TrainSpec, margin: Margin) -> method.Chosen:
    """What the student will learn of the teacher; said, with the reason."""
    chosen = margin.chosen
    if chosen is None:
        pool = open_index(base.manifest).count("unlabeled")
        chosen = min(pool, params.distill.unlabeled_per_class * len(base.class_names))
    known = control.known(params, base, chosen, margin.images, margin.teacher, margin.alone)
    how = method.choose(params.distill, known)
    log.info(f"{run.name}: {how.why}")
    return how


@dataclass
class _Job:
    """One training. ``key`` names it: to work it out reads the networks that it starts from."""

    spec: TrainSpec
    net: str
    key: str
    done: Trained | None = None
    failed: bool = False

    @staticmethod
    def of(spec: TrainSpec, net: str) -> _Job:
        """With what an earlier run of this step, or the check on this machine, has finished."""
        job = _Job(spec, net, spec.key())
        job.look(job.folder)
        return job

    @property
    def folder(self) -> Path:
        """Where what came of it is kept."""
        return control.store(self.key)

    @property
    def left(self) -> bool:
        return self.done is None and not self.failed

    def look(self, folder: Path) -> str:
        """Take what a folder holds of exactly this training; else why not, in words."""
        found = control.read(folder, self.spec, self.key)
        if isinstance(found, str):
            return found
        self.done = found
        return ""


class _Jobs:
    """The trainings of student and control, with each seed; one Ray cluster for those that are not done."""

    def __init__(
        self,
        run: StepContext,
        params: DistillParams,
        spec: TrainSpec,
        alone: TrainSpec,
        weights: Path,
        check: Path,
    ) -> None:
        self._run, self._params = run, params
        self._lineage = driver.start_lineage(weights, "student", params.student)
        seeds = [spec.seed + number for number in range(params.distill.seeds)]
        self._students = [_Job.of(_seeded(spec, seed), "student") for seed in seeds]
        self._controls: list[_Job] = []
        if params.distill.control:
            self._controls = [_Job.of(_seeded(alone, seed), CONTROL) for seed in seeds]
            self._take_from_check(self._controls[0], check)

    def _take_from_check(self, job: _Job, check: Path) -> None:
        name = self._run.name
        if Margin.read(check).failed == job.key:
            job.failed = True
            log.warning(
                f"{name}: the student alone was stopped in the check, so there is nothing to compare with"
            )
            return
        fault = job.look(check / control.FOLDER)
        if not fault:
            log.info(f"{name}: the student alone is the one that the check trained")
        elif job.left:
            log.info(f"{name}: the student alone is trained here: of the check's, {fault}")

    def _to_do(self) -> list[_Job]:
        """Seed by seed, so that what is broken off has compared something."""
        each = zip_longest(self._students, self._controls)
        return [job for pair in each for job in pair if job is not None and job.left]

    def left(self) -> int:
        """How many trainings are to be done."""
        return len(self._to_do())

    def run_all(self) -> list[Pair]:
        """Train what is left; a control that is stopped ends nothing."""
        jobs, ray = self._to_do(), self._params.ray
        if jobs:
            started = monotonic()
            at("starting Ray" if not ray.address else f"connecting to Ray at {ray.address}")
            with cluster.running(ray):
                for number, job in enumerate(jobs):
                    self._train(job, started)
                    left = len(jobs) - number - 1
                    if number == 0 and left:
                        taken = listener.duration(monotonic() - started)
                        log.info(
                            f"{self._run.name}: it took {taken}; {counted(left, 'training')} like it to go"
                        )
                    started = monotonic()
        pairs = []
        for student, alone in zip_longest(self._students, self._controls):
            assert student.done is not None
            pairs.append(Pair(student.spec.seed, student.done, None if alone is None else alone.done))
        return pairs

    def _train(self, job: _Job, started: float) -> None:
        ray, heard = self._params.ray, listener.Listener(self._run)
        checkpoints = driver.checkpoints(job.net, job.spec)

        def fit(run: StepContext, spec: TrainSpec) -> TrainResult:
            return driver.fit(run, spec, ray, checkpoints, heard)

        if job.net == CONTROL:
            result = control.attempt(self._run, job.spec, fit)
            if isinstance(result, Finding):
                job.failed = True
                log.warning(f"{self._run.name}: the student alone was stopped: {result.message}")
                return
        else:
            result = fit(self._run, job.spec)
            budget.learn(self._run, job.spec, ray, heard, monotonic() - started)
        about = {"epochs": job.spec.phases[0].epochs}
        control.write(job.folder, Trained.of(result, job.net), job.spec, self._lineage, about)
        driver.forget(checkpoints)
        fault = job.look(job.folder)
        assert not fault, fault

    def forget(self) -> None:
        """The step is done: only the check's control may be asked for again."""
        for job in [*self._students, *self._controls[1:]]:
            remove(job.folder)
            shared.drop(job.folder)


def _seeded(spec: TrainSpec, seed: int) -> TrainSpec:
    """With another seed, and phases whose names tell it from the first."""
    if seed == spec.seed:
        return spec
    return replace(
        spec,
        seed=seed,
        phases=tuple(replace(phase, name=f"{phase.name}, seed {seed}") for phase in spec.phases),
    )


def _say_disk(run: StepContext, params: DistillParams, spec: TrainSpec) -> None:
    if params.distill.teacher_labels != "cached":
        return
    assert spec.soft_labels is not None
    splits = manifests.read(spec.manifest, ["split"])["split"].to_pylist()
    views = params.distill.crops * params.distill.seeds
    count = splits.count("train") * views + splits.count("unlabeled")
    wanted = soft_labels.stored_bytes(count, len(spec.class_names), params.distill.top_k_labels)
    need_disk(spec.soft_labels, wanted, "soft labels")
    log.info(
        f"{run.name}: soft labels of {count:,} images take {human_bytes(wanted)} of disk, kept for later runs"
    )


def _write(
    run: StepContext,
    params: DistillParams,
    spec: TrainSpec,
    pairs: list[Pair],
    margin: Margin,
    how: method.Chosen,
    teacher: Path,
    members: tuple[Path, ...],
    weights: Path,
    out: Path,
) -> None:
    names = spec.class_names
    actual = {split: driver.labels(spec, split) for split in ("val", "test")}
    kept = shipped.choose(params.distill.keep, actual["val"], pairs)
    shipped.say_kept(run, kept)
    metrics = shipped.measured(run, params, spec, actual, pairs, kept, names)
    network = kept.network
    lineage = driver.start_lineage(weights, "student", params.student)
    if kept.net == CONTROL:
        lineage.append(Lineage(source=ALONE, sha256=network.sha256, coverage=1.0))
    else:  # the teacher gave its answers, not its tensors: it covers none of the student's
        card = read_card(teacher / "model.json")
        source = f"teacher: {name_of(teacher / 'model.safetensors')}"
        lineage.append(Lineage(source=source, sha256=card.sha256, coverage=0.0))
        lineage += committee.lineage(members)
    driver.save_model(
        spec, network.tensors, lineage, run.product(out / "model.safetensors"),
        run.product(out / "model.json"), network.size,
    )  # fmt: skip
    run.page.text("What the student learnt", how.why)
    report.write_network(
        run, out, "the student", metrics={**metrics, "method": how.method},
        history=[row for pair in pairs for one in pair.networks() for row in one.history],
        actual=actual["val"], predicted=network.predictions["val"], class_names=names,
    )  # fmt: skip
    if kept.network.asked:
        phases = (
            spec.phases if kept.net == "student" else control.control_phases(params, spec.phases[0].epochs)
        )
        own = _seeded(replace(spec, phases=phases), kept.seed)
        known = advice.facts(own, network.result(kept.net), kept.net, "student", margin.teacher_recall)
        advice.tell(run, known)
    run.tracker.tags({"kept": kept.net, "method": how.method})

"""``distill.teacher_margin``: is this teacher worth distilling? Judged beside the student alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from components.common.errors import RetortError
from components.common.findings import Finding
from components.common.progress import at, counted, track
from components.common.storage import need, read_json, write_json
from components.models.params import Train
from components.step import StepContext
from components.training import control, driver, forecast, method, paired, preflight, report
from components.training.augmentation import NO_AUGMENT, Augment
from components.training.forecast import Said, Setting
from components.training.inputs.feed import open_feed
from components.training.inputs.index import Index, open_index
from components.training.inputs.pictures import JUDGE, open_store
from components.training.metrics import evaluate
from components.training.paired import Difference
from components.training.params import CheckParams
from components.training.precision import Precision
from components.training.sampling import in_order, some, training_rows
from components.training.spec import TrainSpec
from components.training.teacher import Teacher, Teachers

log = logging.getLogger(__name__)

RULE = "distill.teacher_margin"
ROW = "2.3"
FILE = "margin.json"
SCHEMA_VERSION = 2  # 2: which share of its epochs the control had, by a key of its own
LEARNT = 1_000  # training images that the teacher is asked about
JUDGED = 10_000  # validation images, evenly over them: more make the interval no narrower than a point
WAYS_OUT = (
    "train the teacher by the student's own optimizer and rate (teacher.optimizer, teacher.lr.initial); "
    "train it longer (teacher.train.epochs); take a larger one (teacher.arch.name); start it from weights of "
    "100,000 classes (teacher.weights); mix the labels in (distill.label_share: 0.5); add unlabelled images "
    "(data.unlabeled)"
)


@dataclass(frozen=True)
class Margin:
    """What ``margin.json`` holds: top-1 of both networks, 0..1; None: there was no (whole) control.

    ``chosen``: unlabelled images that are learnt from; None: they were not chosen yet.
    """

    images: int
    teacher: float | None = None
    alone: float | None = None
    why: str = ""
    failed: str = ""  # the key of the control that was stopped
    teacher_recall: float | None = None  # its macro recall
    chosen: int | None = None

    @staticmethod
    def read(folder: Path) -> Margin:
        """Of a passed check, whose gate vouches for the file.

        Raises:
            RetortError: the file is missing, or of another version of this program.
        """
        path = folder / FILE
        found = read_json(need(path, "check"))
        if not isinstance(found, dict) or found.get("schema_version") != SCHEMA_VERSION:
            raise RetortError(f"{path}: not of this program; run 'retort check' again")
        teacher, alone = found.get("teacher", {}), found.get("alone", {})
        return Margin(
            found["images"],
            teacher.get("top1"),
            alone.get("top1") if found.get("control_share") == 1 else None,
            why=found["why"],
            failed=found["failed"],
            teacher_recall=teacher.get("macro_recall"),
            chosen=found.get("chosen"),
        )


def judge(
    run: StepContext,
    params: CheckParams,
    *,
    manifest: Path,
    plan: Path,
    teacher: Path,
    weights: Path,
    out: Path,
) -> dict[str, Path]:
    """Train the control, compare the teacher with it, and find ``distill.teacher_margin``.

    Writes ``margin.json``, and the control into ``control/``. Nothing is trained where a rule has failed.

    Returns:
        What the gate has to vouch for, by its path in ``out``, and where it lies until the step has passed.

    Raises:
        FindingsError: an earlier rule failed, or something that training needs is missing.
        RetortError: the plan, Ray or a worker is at fault.
    """
    run.stop_on_errors()
    student = control.student_spec(params, manifest, driver.load_plan(run, plan, manifest), teacher, weights)
    method.choose(
        params.distill, control.known(params, student, 0, 0, None, None)
    )  # refused before the hours
    if not params.distill.control:
        why = "distill.control is false, so there is no student alone to compare the teacher with"
        return _unknown(run, out, why, "Set distill.control to true.")
    planned = control.planned(run, params, student)
    epochs = control.control_epochs(run, params, student, planned)
    spec = control.control_spec(params, student, epochs)
    about = {
        "epochs": epochs,
        "planned": planned,
        "most": params.distill.epochs or params.student.train.epochs,
        "minutes": params.student.train.time_budget_minutes,
    }
    lineage = driver.start_lineage(weights, "student", params.student)

    def fit(own: StepContext, spec: TrainSpec) -> Any:
        preflight.preflight(own, spec, params.ray, "student")
        return driver.train(own, spec, params.ray, driver.checkpoints(control.NET, spec))

    found = control.obtain(run, spec, lineage, about, fit)
    if isinstance(found, Finding):
        why = f"the student alone was stopped by {found.rule}: {found.message}"
        return _unknown(run, out, why, found.advice, failed=spec.key())
    kept = run.product(out / control.FOLDER)
    control.hand_on(found, kept)
    at("comparing teacher and student alone")
    said = ask(params, manifest, [teacher, *student.teachers], found)
    learnt = agreeing(params, manifest, [teacher, *student.teachers], student)
    chosen = read_json(found / control.FILE)["chosen"]
    file = _find(run, params, student, said, learnt, chosen, epochs / planned, planned, out)
    return {FILE: file, f"{control.FOLDER}/{control.SEAL}": kept / control.SEAL}


def ask(params: CheckParams, manifest: Path, teachers: list[Path], alone: Path) -> Said:
    """What both networks say of validation images, of JUDGED at most."""
    index = open_index(manifest)
    rows = index.rows("val")
    rows = rows[:: -(-len(rows) // JUDGED)]
    batch = params.student.valid.batch_size
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("teacher", "alone", "sure")}
    feeds = [_answers(index, params, folders, rows, batch) for folders in (teachers, [alone])]
    asked = track(
        zip(*feeds, strict=True), "check: teacher and student alone (batches)", -(-len(rows) // batch)
    )
    for ours, theirs in asked:
        parts["teacher"].append(ours.argmax(1))
        parts["alone"].append(theirs.argmax(1))
        parts["sure"].append(ours.max(1))
    actual = np.asarray(index.labels[rows], dtype=np.int64)
    return Said(actual, **{name: np.concatenate(values) for name, values in parts.items()})


def recognised(params: CheckParams, manifest: Path, folders: list[Path]) -> tuple[int, float]:
    """How many validation images (``JUDGED`` at most), and the top-1 of the networks' mean answer to them."""
    index = open_index(manifest)
    rows = index.rows("val")
    rows = rows[:: -(-len(rows) // JUDGED)]
    batch = params.student.valid.batch_size
    said = np.concatenate([part.argmax(1) for part in _answers(index, params, folders, rows, batch)])
    return len(rows), float((said == index.labels[rows]).mean())


def agreeing(params: CheckParams, manifest: Path, teachers: list[Path], student: TrainSpec) -> float:
    """On which share of the training images the teacher and the label agree; of LEARNT of them."""
    index = open_index(manifest)
    rows = some(training_rows(index, student.plan), LEARNT, student.seed)
    said = [
        each.argmax(1)
        for each in _answers(index, params, teachers, rows, params.student.valid.batch_size, learn=True)
    ]
    return float((np.concatenate(said) == index.labels[rows]).mean())


def _answers(
    index: Index,
    params: CheckParams,
    folders: list[Path],
    rows: np.ndarray,
    batch: int,
    learn: bool = False,
) -> Iterator[np.ndarray]:
    """Mean probabilities float32 [B, C] of the rows, batch by batch, at the networks' own input size."""
    device = torch.device("cpu")
    networks = [Teacher(folder, Precision.of(Train(), device)) for folder in folders]
    network = Teachers(networks)
    size = network.card.input_size[1]
    store = open_store(
        index, params.data.root, size, splits=JUDGE
    )  # others are decoded as they are asked for
    part = store.learn if learn else store.judge
    with open_feed(part, Augment("none", 0, size), device) as feed:
        for each in feed(in_order(rows, batch, NO_AUGMENT)):
            yield network(each.pixels).probabilities.numpy()


# --- the verdict --------------------------------------------------------------------------------------------


def _unknown(run: StepContext, out: Path, why: str, advice: str, failed: str = "") -> dict[str, Path]:
    """Nothing is known of the teacher's worth: that is said, and stops nothing."""
    run.add_finding(
        RULE, "warning" if failed else "info", "teacher",  # switched off: a person knows
        f"whether the teacher is worth distilling is unknown: {why}",
        row=ROW, advice=advice,
    )  # fmt: skip
    file = run.product(out / FILE)
    write_json(file, {"schema_version": SCHEMA_VERSION, "images": 0, "why": why, "failed": failed})
    return {FILE: file}


def _find(
    run: StepContext,
    params: CheckParams,
    student: TrainSpec,
    said: Said,
    learnt: float,
    chosen: int,
    done: float,
    planned: int,
    out: Path,
) -> Path:
    index = open_index(student.manifest)
    images = len(said.actual)
    tops = {
        who: evaluate(said.actual, getattr(said, who), student.class_names) for who in ("teacher", "alone")
    }
    top1 = paired.top1(said.actual, said.teacher, said.alone)
    recall = paired.macro_recall(said.actual, said.teacher, said.alone)
    labelled = len(training_rows(index, student.plan))
    pool = index.count("unlabeled") if params.distill.unlabeled_per_class else 0
    how = method.choose(
        params.distill,
        control.known(
            params,
            student,
            chosen,
            images,
            tops["teacher"]["top1"],
            tops["alone"]["top1"] if done == 1 else None,
        ),
    )
    members = control.members(params, student, planned, chosen)
    setting = Setting(
        len(student.class_names), labelled, pool, chosen, how.label_share, learnt, done, members
    )
    gain = forecast.forecast(said, setting)
    level = _level(top1, recall, gain)
    short = f", after {done:.0%} of its epochs" if done < 1 else ""
    beside = f" and {counted(members, 'network')} beside the teacher" if members else ""
    message = (
        f"the teacher recognises {tops['teacher']['top1']:.1%} of {counted(images, 'validation image')}, the "
        f"student alone {tops['alone']['top1']:.1%}{short}: {top1}; macro recall {recall}. Forecast of what "
        f"distilling by {how.method} with a label share of {how.label_share:.2g}{beside} changes: {gain}"
    )
    run.add_finding(
        RULE, level, "teacher", message,
        measured={"top1": round(top1.value, 6), "macro_recall": round(recall.value, 6)},
        limit={"forecast": round(gain.value, 6), "to": round(gain.high, 6)}, row=ROW,
        advice=_advice(level, chosen, how.label_share),
    )  # fmt: skip
    log.info(f"{run.name}: {message}")
    content = {who: {name: round(tops[who][name], 6) for name in ("top1", "macro_recall")} for who in tops}
    file = run.product(out / FILE)
    write_json(
        file,
        {
            "schema_version": SCHEMA_VERSION, "images": images, "why": "", "failed": "", **content,
            "top1": top1.rounded(), "macro_recall": recall.rounded(), "forecast": gain.rounded(),
            "label_share": how.label_share, "method": how.method, "labelled": labelled, "chosen": chosen,
            "learnt": round(learnt, 6),
            "control_share": round(done, 6),
        },
    )  # fmt: skip
    run.tracker.summary({"teacher_margin": top1.value, "forecast_gain": gain.value})
    report.show_margin(run.page, tops, top1, recall, gain)
    return file


def _level(top1: Difference, recall: Difference, gain: Difference) -> Any:
    """An error only where even the best that is forecast is a loss."""
    if gain.high < 0:
        return "error"
    return "info" if top1.value >= 0 and recall.high >= 0 else "warning"


def _advice(level: str, chosen: int, share: float) -> str:
    if level == "info":
        return ""
    if level == "error":
        return f"Distilling would make the student worse. In this order: {WAYS_OUT}."
    makes_up = " and ".join(
        part
        for part in (
            counted(chosen, "unlabelled image") if chosen else "",
            f"labels with a share of {share:.2g} of the loss" if share else "",
        )
        if part
    )
    made_up = f"{makes_up[:1].upper()}{makes_up[1:]} may make up for it. " if makes_up else ""
    return f"{made_up}A better teacher teaches more. In this order: {WAYS_OUT}."

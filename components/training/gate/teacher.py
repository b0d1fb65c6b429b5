"""The rules on a teacher: it is whole, of this data, better than guessing, trained, and not the student.

Its kernels are not examined as the student's are (``evidence.examine``): it answers the validation images
here, and what it recognises is compared with what its training measured. Random kernels, and kernels in one
another's places, lose that; the statistics would say nothing new.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.common.errors import RetortError
from components.common.progress import track
from components.common.storage import need, read_json, sha256_file
from components.dataset import manifest as manifests
from components.models import checkpoint
from components.models.card import ModelCard, names_finding, read_card
from components.models.params import Arch, Train
from components.step import StepContext, name_of
from components.training.gate.evidence import UNTRAINED, constant_share
from components.training.gate.images import Judged
from components.training.gate.student import judge_source
from components.training.metrics import evaluate
from components.training.params import CheckParams
from components.training.precision import Precision
from components.training.teacher import Teacher
from components.weights.load import another

ROW = "2.3"
ACCURACY, WEIGHTS = "distill.teacher_accuracy", "distill.teacher_weights"
ABOVE_CHANCE = 0.2  # of the way from chance to 1 a teacher must have gone, if nothing else is asked
RELATED = 0.1  # correlation below which two kernels have nothing to do with each other
TOLD = 0.02  # of top-1 that precision and other kernels may explain between two measurements
DISTILLED = "teacher: "  # how the lineage of a distilled network names who taught it


@dataclass(frozen=True)
class Subject:
    """A teacher that is judged: ``name`` as findings call it; ``main``: the one that finetune made."""

    name: str
    folder: Path
    main: bool = True


def judge(
    run: StepContext,
    params: CheckParams,
    subject: Subject,
    *,
    manifest: Path,
    weights: Path,
    images: Judged,
    names: tuple[str, ...],
) -> None:
    """Every rule on one teacher; each fault is a finding of its own.

    Args:
        weights: folder of the step ``weights``: what the teacher, and the student, start from.
        names: of the classes, by label.
    """
    card = read_card(subject.folder / "model.json", changed=True)
    fits = _classes(run, params, card, subject, manifest, names)
    _data(run, card, subject, manifest)
    loaded = _loaded(run, subject)
    if loaded is not None and fits:
        _accuracy(run, params, loaded, subject, images, names)
    if _readable(subject):
        _weights(run, params, card, subject, weights)
    if subject.main and params.teacher.weights != "none" and not another(weights, "teacher"):
        judge_source(run, params, "teacher", weights)


def _readable(subject: Subject) -> bool:
    """Whether its tensors can be read at all; what is wrong with them was said when it was loaded."""
    try:
        checkpoint.read_tensors(subject.folder / checkpoint.FILE)
    except RetortError:
        return False
    return True


def _file(subject: Subject, name: str = "model.json") -> str:
    return name_of(subject.folder / name)


def _classes(
    run: StepContext,
    params: CheckParams,
    card: ModelCard,
    subject: Subject,
    manifest: Path,
    names: tuple[str, ...],
) -> bool:
    """That it calls its classes what the data call them, in their order, and takes images of this size."""
    data = manifests.names_by_label(manifests.read(manifest, ["label", "class_name"]))
    again = (
        "Run 'retort finetune' on this data, or read the data again that the teacher was trained on."
        if subject.main
        else "Take it out of distill.teachers, or train it on this data."
    )
    found = names_finding(
        card.class_names, data, subject.name, _file(subject), f"A student would learn wrong names. {again}"
    )
    good = found["level"] != "error"
    if not good:
        run.add_finding(**found)
    elif len(card.class_names) != len(names):
        good = False
        run.add_finding(
            "model.class_names", "error", subject.name,
            f"{_file(subject)} was trained for {len(card.class_names)} classes, this data has {len(names)} "
            "(or "
            "global.class_num asks for them)",
            measured=len(card.class_names), limit=len(names), row="1.1", advice=again,
        )  # fmt: skip
    size = params.general.image_size
    if card.input_size[1:] != [size, size]:
        good = False
        run.add_finding(
            WEIGHTS, "error", subject.name,
            f"{_file(subject)}: trained at {card.input_size[1]} px, global.image_size is {size}: student and "
            "teacher are to see the same view",
            measured=card.input_size[1], limit=size, row=ROW, advice="Run 'retort finetune' again.",
            waivable=False,
        )  # fmt: skip
    return good


def _data(run: StepContext, card: ModelCard, subject: Subject, manifest: Path) -> None:
    """That its card was written for exactly these images and labels."""
    own = manifests.fingerprint(manifest)
    if card.data_fingerprint == own:
        return
    run.add_finding(
        WEIGHTS, "error", subject.name,
        f"{_file(subject)} says that it was trained on other data (fingerprint "
        f"{card.data_fingerprint[:12]}..., "
        f"{name_of(manifest)} has {own[:12]}...): names and counts of classes may agree, its images and "
        "labels "
        "do not",
        measured=card.data_fingerprint[:12], limit=own[:12], row=ROW,
        advice="Run 'retort finetune' on this data.",
    )  # fmt: skip


def _loaded(run: StepContext, subject: Subject) -> Teacher | None:
    """The teacher, when its file is the one that its card names, and whole."""
    try:
        return Teacher(subject.folder, Precision.of(Train(), torch.device("cpu")))
    except RetortError as error:
        run.add_finding(
            WEIGHTS, "error", subject.name, str(error), row=ROW,
            advice="Run 'retort finetune' again." if subject.main else "Restore it, or take it out.",
            waivable=False,  # without a teacher there is nothing to learn from
        )  # fmt: skip
        return None


# --- what it says of images -----------------------------------------------------------------------------


def chance(labels: np.ndarray) -> float:
    """What a guess reaches, 0..1, in top-1 and in macro recall: one in as many as there are classes.

    Always naming the commonest class reaches more top-1, but the same macro recall. Where it is 95 % of the
    images, a teacher that knows both classes may well have a top-1 below that.

    Args:
        labels: of the validation split, int64 [n].
    """
    return 1 / max(2, len(np.unique(labels)))


def above(level: float) -> float:
    """What is well above a level of chance."""
    return level + ABOVE_CHANCE * (1 - level)


def _accuracy(
    run: StepContext,
    params: CheckParams,
    teacher: Teacher,
    subject: Subject,
    images: Judged,
    names: tuple[str, ...],
) -> None:
    """The teacher's top-1 and macro recall on the validation split, measured now and not read from a file."""
    teacher.assert_frozen()
    batches = images.batches(params.teacher.valid.batch_size)
    asked = track(
        batches, f"check: asking {subject.name} (batches)", images.count(params.teacher.valid.batch_size)
    )
    said = [teacher(pixels).logits.argmax(1).numpy() for pixels in asked]
    metrics = evaluate(images.labels, np.concatenate(said), names)
    judge_accuracy(run, params, metrics, images.labels, subject)
    _as_told(run, metrics, subject)
    run.tracker.summary({"teacher_val_top1" if subject.main else f"{subject.name}_val_top1": metrics["top1"]})


def judge_accuracy(
    run: StepContext, params: CheckParams, metrics: dict[str, Any], labels: np.ndarray, subject: Subject
) -> None:
    """Top-1 against what is asked for; and macro recall, so that naming the commonest class is not enough."""
    asked = params.distill.min_teacher_accuracy
    by_chance = chance(labels)
    limit = above(by_chance) if asked is None else asked
    macro_limit = min(limit, above(by_chance))
    top1, macro = metrics["top1"], metrics["macro_recall"]
    why = f" (well above chance, {by_chance:.1%} here)" if asked is None else ""
    one_sided = top1 >= limit and macro < macro_limit
    good = top1 >= limit and not one_sided
    run.add_finding(
        ACCURACY, "info" if good else "error", subject.name,
        f"the teacher recognises {top1:.1%} of the {metrics['images']} validation images, measured now; "
        f"at least {limit:.1%} is asked for{why}. Its mean recall over the classes is {macro:.1%}, of at "
        f"least {macro_limit:.1%}",
        measured=round(macro if one_sided else top1, 6), limit=round(macro_limit if one_sided else limit, 6),
        row=ROW,
        advice="" if good
        else "It names the commonest class and little else: see the audit of imbalance, and its plan."
        if one_sided
        else "A student learns what its teacher says: train the teacher longer or better first, or lower "
        "distill.min_teacher_accuracy.",
    )  # fmt: skip


def _as_told(run: StepContext, metrics: dict[str, Any], subject: Subject) -> None:
    """That it recognises as much as its training measured; else these are other images, or it is another."""
    path = subject.folder / "metrics.json"
    told = read_json(path).get("val", {}).get("top1") if path.is_file() else None
    if not isinstance(told, (int, float)):
        return
    spread = (max(told * (1 - told), 0.25 / metrics["images"]) / metrics["images"]) ** 0.5
    limit = TOLD + 3 * spread
    gap = abs(metrics["top1"] - told)
    if gap <= limit:
        return
    run.add_finding(
        ACCURACY, "error", subject.name,
        f"{_file(subject, 'metrics.json')} says that its training measured {told:.1%} on the validation "
        "images; "
        f"it is {metrics['top1']:.1%} now: it was measured on other images, or is another network",
        measured=round(gap, 6), limit=round(limit, 6), row=ROW, advice="Run 'retort finetune' on this data.",
    )  # fmt: skip


# --- what its tensors say -------------------------------------------------------------------------------


def correlations(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> list[float]:
    """Correlation of each kernel or matrix with the one of the same name and shape."""
    found = []
    for name, tensor in tensors.items():
        other = others.get(name)
        if tensor.ndim < 2 or other is None or other.shape != tensor.shape:
            continue
        a, b = (t.double().flatten() - t.double().mean() for t in (tensor, other))
        norms = float(a.norm() * b.norm())
        found.append(float(a @ b) / norms if norms else 0.0)
    return found


def equal_kernels(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Whether every kernel and matrix of ``others`` is in ``tensors``, value for value."""
    kernels = [name for name, tensor in others.items() if tensor.ndim > 1]
    return bool(kernels) and all(
        name in tensors and torch.equal(tensors[name], others[name]) for name in kernels
    )


def _weights(run: StepContext, params: CheckParams, card: ModelCard, subject: Subject, weights: Path) -> None:
    """That it carries weights trained on this data: neither random, nor its start, nor the student's."""
    tensors = checkpoint.read_tensors(subject.folder / checkpoint.FILE)
    faults: list[str] = []
    measured: dict[str, Any] = {"constant": round(constant_share(tensors), 4)}
    if measured["constant"] > UNTRAINED:
        faults.append(
            f"{measured['constant']:.0%} of its norms and biases still have their initial values, "
            "so it was never trained"
        )
    faults += _is_student(params, card, subject, tensors, weights)
    advice = "Run 'retort finetune' on this data."
    moved = "trained on this data"
    if subject.main:
        more, advice, moved = _descent(params, card, tensors, weights, measured)
        faults += more
    for fault in faults:
        run.add_finding(
            WEIGHTS, "error", subject.name, f"{_file(subject, checkpoint.FILE)}: {fault}",
            measured=measured, limit={"constant": UNTRAINED, "correlation": RELATED}, row=ROW, advice=advice,
        )  # fmt: skip
    if not faults:
        run.add_finding(
            WEIGHTS, "info", subject.name,
            f"the teacher's tensors are neither random nor the student's: {moved}",
            measured=measured, limit={"constant": UNTRAINED, "correlation": RELATED}, row=ROW,
        )  # fmt: skip


def _is_student(
    params: CheckParams, card: ModelCard, subject: Subject, tensors: dict[str, Tensor], weights: Path
) -> list[str]:
    """Whether the teacher is the student: what it starts from, or what an earlier distillation made."""
    taught = [entry.source for entry in card.lineage if entry.source.startswith(DISTILLED)]
    if taught and card.arch == params.student.arch:
        return [
            f"its model.json says that it was itself distilled ({taught[0]}) and it has the student's "
            "architecture: it is the student"
        ]
    path = weights / "student.safetensors"
    if params.student.weights == "none" or another(weights, "student"):
        return []  # what is wrong with the student's file is said of the student
    if sha256_file(path) == sha256_file(subject.folder / checkpoint.FILE):
        return [f"it is the file {name_of(path)}: the student's start weights"]
    if equal_kernels(tensors, checkpoint.read_tensors(path)):
        return ["every kernel is the student's start weights': the student would be taught by itself"]
    return []


def _descent(
    params: CheckParams, card: ModelCard, tensors: dict[str, Tensor], weights: Path, measured: dict[str, Any]
) -> tuple[list[str], str, str]:
    """Whether it comes from its start weights and moved on: faults, advice, and what to say without any."""
    advice = "Run 'retort finetune' on this data."
    if card.arch != params.teacher.arch:
        return [
            f"it is a {described(card.arch)}, teacher.arch is {described(params.teacher.arch)}: another "
            "network's folder, which cannot be compared with the start weights"
        ], advice, ""  # fmt: skip
    if params.teacher.weights == "none":
        said = "from random weights (teacher.weights is none), so there is nothing to compare them with"
        return [], advice, said
    if fault := another(weights, "teacher"):
        return [f"{fault}, so the teacher was not compared with it"], "Run 'retort weights' again.", ""
    faults = []
    before = checkpoint.read_tensors(weights / "teacher.safetensors")
    related = correlations(tensors, before)
    same = [name for name, t in before.items() if name in tensors and torch.equal(tensors[name], t)]
    measured["correlation"] = round(float(np.median(related)), 4) if related else None
    measured["unchanged"] = f"{len(same)} of {len(before)} tensors"
    if related and measured["correlation"] < RELATED:
        faults.append(
            f"its kernels do not resemble the weights that it is said to come from (median correlation "
            f"{measured['correlation']:.2f})"
        )
    if equal_kernels(tensors, before):
        faults.append("its backbone is still what it started from: it was not trained on this data")
    start = weights / "teacher.json"
    record = read_json(need(start, "weights")).get("lineage", [])
    own = [entry.model_dump(mode="json") for entry in card.lineage]
    if not own:
        faults.append("its model.json names no weights that it came from")
    elif own[: len(record)] != record:  # 'expand' adds an entry of its own
        faults.append(
            f"its model.json says that it came from {own[0]['source']} (sha256 {own[0]['sha256'][:12]}...), "
            f"{name_of(start)} names {_first(record)}"
        )
    return faults, advice, "they descend from its start weights and moved on"


def _first(record: list[dict[str, Any]]) -> str:
    return f"{record[0].get('source')} (sha256 {str(record[0].get('sha256'))[:12]}...)" if record else "none"


def described(arch: Arch) -> str:
    """An architecture in a few words: its name, and what was changed about it."""
    changed = arch.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
    return arch.name + "".join(f", {key}: {value}" for key, value in changed.items())

"""The step ``check``: the gate before distillation. Teacher, student and learning rate, judged now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.common.errors import RetortError
from components.common.findings import Finding
from components.common.progress import at, track
from components.common.step import Run, step
from components.common.storage import need, read_json
from components.dataset import manifest as manifests
from components.models import build, checkpoint
from components.models.card import ModelCard, names_finding, read_card
from components.models.params import Arch, Train
from components.training import driver, gate
from components.training.augmentation import PLAIN, Augment
from components.training.inputs.feed import open_feed
from components.training.inputs.index import open_index
from components.training.inputs.pictures import open_store
from components.training.metrics import evaluate
from components.training.params import CheckParams
from components.training.precision import Precision
from components.training.sampling import in_order
from components.training.teacher import Teacher, need_same_classes
from components.weights.load import another, load_backbone

RECIPES = Path(__file__).with_name("recipes.json")
ABOVE_CHANCE = 0.2  # of the way from chance to 1 a teacher must have gone, if nothing else is asked
UNTRAINED = 0.5  # share of constant one-dimensional tensors above which a network was never trained
RELATED = 0.1  # correlation below which two kernels have nothing to do with each other
ROW = "2.3"


def check(
    params: CheckParams, *, manifest: Path, plan: Path, teacher: Path, weights: Path, out: Path
) -> None:
    """Judge what distillation would start from; writes ``gate.json`` when nothing is wrong.

    Args:
        manifest: the clean manifest.
        plan: ``plan.json`` of the audits.
        teacher: folder of the finetuned teacher.
        weights: folder with ``teacher.safetensors`` and ``student.safetensors``.

    Raises:
        FindingsError: distill.teacher_accuracy, distill.teacher_weights, distill.student_weights or
            distill.initial_lr.
        RetortError: a file is missing or not what it should be.
    """
    files = gate.inputs(manifest, plan, teacher, weights)
    with step("check", params, out, inputs=files) as run:
        need(manifest, "validate")
        need(teacher / "model.json", "finetune")
        names = driver.class_names(params, manifest)
        at("loading the teacher")
        answers = _teacher(run, params, manifest, teacher)
        need_same_classes(answers.card, list(names), params.general.image_size)
        _teacher_accuracy(run, params, answers, manifest, names)
        at("comparing weights")
        _teacher_weights(run, params, answers.card, manifest, teacher, weights)
        _student_weights(run, params, weights)
        _initial_lr(run, params)
        run.page.table(
            "The gate before distillation", ["rule", "verdict", "measured", "limit"],
            [
                [f.rule, _verdict(f), _said(f.measured), _said(f.limit)]
                for f in run.report.findings
            ],
            note="Distillation runs only with exactly the files and values that passed here.",
        )  # fmt: skip
        gate.write(run.product(out / gate.FILE), params, files)


def _teacher(run: Run, params: CheckParams, manifest: Path, folder: Path) -> Teacher:
    """The teacher, when it is whole and calls its classes what the data call them."""
    card = read_card(folder / "model.json", changed=True)
    data = manifests.names_by_label(manifests.read(manifest, ["label", "class_name"]))
    found = names_finding(
        card.class_names, data, "teacher", "outputs/teacher/model.json",
        "A student would learn wrong names. Run 'retort finetune' on this data, or read the data again that "
        "the teacher was trained on.",
    )  # fmt: skip
    if found["level"] == "error":
        run.find(**found)
        run.stop_on_errors()
    try:
        return Teacher(folder, Precision.of(Train(), torch.device("cpu")))
    except RetortError as error:
        run.find(
            "distill.teacher_weights", "error", "teacher", str(error), row=ROW,
            advice="Run 'retort finetune' again.",
            waivable=False,  # without a teacher there is nothing to learn from
        )  # fmt: skip
        run.stop_on_errors()
        raise


def _verdict(finding: Finding) -> str:
    if finding.waived:
        return "waived"
    return {"info": "passed", "warning": "unknown"}.get(finding.level, "failed")


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_said(part)}" for name, part in value.items())
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _teacher_accuracy(
    run: Run, params: CheckParams, teacher: Teacher, manifest: Path, names: tuple[str, ...]
) -> None:
    """The teacher's top-1 on the validation split, measured now and not read from a file."""
    size, batch = params.general.image_size, params.teacher.valid.batch_size
    index = open_index(manifest)
    rows = index.rows("val")
    if not len(rows):
        raise RetortError(f"{manifest}: no rows in the split 'val'; see data.splits")
    judge = open_store(index, params.data.root, size).judge
    teacher.assert_frozen()
    with open_feed(judge, Augment("none", 0, size), torch.device("cpu")) as feed:
        asked = track(
            feed(in_order(rows, batch, PLAIN)), "check: asking the teacher (batches)", -(-len(rows) // batch)
        )
        said = [teacher(each.pixels).logits.argmax(1).numpy() for each in asked]
    actual = index.labels[rows].astype(np.int64)
    metrics = evaluate(actual, np.concatenate(said), names)
    _judge_accuracy(run, params, metrics, actual)
    run.tracker.summary({"teacher_val_top1": metrics["top1"]})


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


def _judge_accuracy(run: Run, params: CheckParams, metrics: dict[str, Any], labels: np.ndarray) -> None:
    """Top-1 against what is asked for; and macro recall, so that naming the commonest class is not enough."""
    asked = params.distill.min_teacher_accuracy
    by_chance = chance(labels)
    limit = above(by_chance) if asked is None else asked
    macro_limit = min(limit, above(by_chance))
    top1, macro = metrics["top1"], metrics["macro_recall"]
    why = f" (well above chance, {by_chance:.1%} here)" if asked is None else ""
    one_sided = top1 >= limit and macro < macro_limit
    good = top1 >= limit and not one_sided
    run.find(
        "distill.teacher_accuracy", "info" if good else "error", "teacher",
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


def constant_share(tensors: dict[str, Tensor]) -> float:
    """Share of the one-dimensional tensors (norms, biases, running statistics) with one value throughout.

    Networks begin with scales of 1, shifts of 0, means of 0 and variances of 1; training ends that.
    """
    vectors = [t for t in tensors.values() if t.ndim == 1 and t.numel() > 1 and t.is_floating_point()]
    if not vectors:
        return 0.0
    return sum(bool((t == t[0]).all()) for t in vectors) / len(vectors)


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


def _teacher_weights(
    run: Run, params: CheckParams, card: ModelCard, manifest: Path, teacher: Path, weights: Path
) -> None:
    """That the teacher carries weights trained on this data: neither random nor merely what it began with."""
    tensors = checkpoint.read_tensors(teacher / "model.safetensors")
    faults: list[str] = []
    measured: dict[str, Any] = {"constant": round(constant_share(tensors), 4)}
    if measured["constant"] > UNTRAINED:
        faults.append(
            f"{measured['constant']:.0%} of its norms and biases still have their initial values, "
            "so it was never trained"
        )
    if card.data_fingerprint != manifests.fingerprint(manifest):
        faults.append("its model.json says that it was trained on other data")
    advice = "Run 'retort finetune' on this data."
    moved = "they descend from its start weights and moved on"
    if card.arch != params.teacher.arch:
        faults.append(
            f"it is a {_described(card.arch)}, teacher.arch is {_described(params.teacher.arch)}: another "
            "network's folder, which cannot be compared with the start weights"
        )
    elif params.teacher.weights == "none":
        moved = "from random weights (teacher.weights is none), so there is nothing to compare them with"
    elif fault := another(weights, "teacher"):
        faults.append(f"{fault}, so the teacher was not compared with it")
        advice = "Run 'retort weights' again."
    else:
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
        kernels = [name for name in before if before[name].ndim > 1 and name in tensors]
        if kernels and set(kernels) <= set(same):
            faults.append("its backbone is still what it started from: it was not trained on this data")
        if not card.lineage:
            faults.append("its model.json names no weights that it came from")
    run.find(
        "distill.teacher_weights", "error" if faults else "info", "teacher",
        "; ".join(faults) if faults else f"the teacher's tensors were trained on this data: {moved}",
        measured=measured, limit={"constant": UNTRAINED, "correlation": RELATED}, row=ROW,
        advice=advice if faults else "",
    )  # fmt: skip


def _described(arch: Arch) -> str:
    """An architecture in a few words: its name, and what was changed about it."""
    changed = arch.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
    return arch.name + "".join(f", {key}: {value}" for key, value in changed.items())


def _student_weights(run: Run, params: CheckParams, weights: Path) -> None:
    """That the student starts from trained weights: loaded as distillation will, values compared."""
    rule, subject = "distill.student_weights", "student"
    if params.student.weights == "none":
        run.find(
            rule, "error", subject, "student.weights is none: the student would start from random weights",
            measured="none", row=ROW,
            advice="Give weights trained on ImageNet-1k, such as package:NAME or a file.",
        )  # fmt: skip
        return
    path = weights / "student.safetensors"
    if fault := another(weights, "student"):
        run.find(
            rule, "error", subject, fault, row=ROW, advice="Run 'retort weights' again.",
            waivable=False,  # distillation does not start from it either
        )  # fmt: skip
        return
    tensors = checkpoint.read_tensors(path)
    module = build.plain(params.student.arch, 0)
    coverage = load_backbone(module, path)
    loaded = module.state_dict()
    faults = []
    unequal = [
        name for name, tensor in loaded.items()
        if name in tensors and not torch.equal(tensor, tensors[name].to(tensor.dtype))
    ]  # fmt: skip
    missing = [name for name in loaded if name not in tensors]
    constant = constant_share(tensors)
    if missing:
        faults.append(f"{len(missing)} of its {len(loaded)} tensors are not in the file: {missing[0]}, ...")
    if unequal:
        faults.append(f"{len(unequal)} tensors differ from the file after loading: {unequal[0]}, ...")
    if bad := checkpoint.not_finite(tensors):
        faults.append(f"its file holds NaN or infinite values: {bad}")
    if constant > UNTRAINED:
        faults.append(
            f"{constant:.0%} of its norms and biases have initial values: these are not trained weights"
        )
    run.find(
        rule, "error" if faults else "info", subject,
        "; ".join(faults) if faults else
        f"all {len(loaded)} tensors of the student's backbone hold the values of its weights file",
        measured={"coverage": coverage.share, "constant": round(constant, 4)},
        limit={"coverage": 1.0, "constant": UNTRAINED}, row=ROW,
        advice="Run 'retort weights' with weights made for this architecture." if faults else "",
    )  # fmt: skip


def reference(params: CheckParams) -> tuple[float, int, str] | None:
    """Initial learning rate, total batch and origin of the student's training on ImageNet-1k, if known.

    Raises:
        RetortError: when only one of the two parameters is given.
    """
    lr, batch = params.distill.reference_lr, params.distill.reference_batch
    if (lr is None) != (batch is None):
        raise RetortError("distill.reference_lr and distill.reference_batch go together: give both or none")
    if lr is not None and batch is not None:
        return lr, batch, "distill.reference_lr and reference_batch"
    name = params.student.arch.name.partition(".")[0]  # timm appends the weights' tag after a point
    for recipe in read_json(RECIPES)["recipes"]:
        timm = recipe["timm"]
        if name in {timm, f"{timm}_paddle", recipe["paddle"].lower()} - {None}:
            total = recipe["batch_per_card"] * recipe["cards"]
            return recipe["initial_lr"], total, f"the recipe of {recipe['paddle']} ({recipe['optimizer']})"
    return None


def _initial_lr(run: Run, params: CheckParams) -> None:
    """That the learning rate is not above that of ImageNet-1k training, for the same number of images."""
    student = params.student
    total = student.train.batch_size * params.ray.workers
    rule, subject = "distill.initial_lr", "student.lr.initial"
    known = reference(params)
    if known is None:
        run.find(
            rule, "warning", subject,
            f"{student.arch.name}: it is not known with which learning rate it was trained on ImageNet-1k, "
            f"so {student.lr.initial:g} has no known limit",
            measured=student.lr.initial, row=ROW,
            advice="Give distill.reference_lr and distill.reference_batch, if you know them.",
        )  # fmt: skip
        return
    lr, batch, origin = known
    limit = lr * total / batch
    good = student.lr.initial <= limit * (1 + 1e-9)
    run.find(
        rule, "info" if good else "error", subject,
        f"{student.lr.initial:g} at a total batch of {total}; ImageNet-1k training used {lr:g} at {batch}, "
        f"which is {limit:.4g} at {total} ({origin})",
        measured=student.lr.initial, limit=limit, row=ROW,
        advice="" if good else f"Set student.lr.initial to {limit:.4g} or less, or raise the total batch.",
    )  # fmt: skip

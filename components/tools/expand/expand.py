"""The command ``expand``: a trained classifier learns classes that are new to it, and keeps the old ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from components.audit.plan_schema import Plan
from components.common import progress
from components.common.errors import RetortError
from components.common.storage import atomic_path, need, remove, state_dir
from components.dataset import manifest as manifests
from components.models import build, checkpoint
from components.models.card import RULE, Lineage, ModelCard
from components.models.params import Net
from components.step import StepContext, step
from components.tools.expand import report
from components.tools.expand.classes import Classes, choose, relabel, remap, some
from components.tools.expand.report import ROW, WAYS
from components.tools.params import ExpandParams
from components.training import class_expansion, driver, paired, preflight, sampling
from components.training.augmentation import NO_AUGMENT, Augment
from components.training.inputs.feed import open_feed
from components.training.inputs.index import Index, open_index
from components.training.inputs.pictures import open_store
from components.training.metrics import evaluate
from components.training.normalise import Normalise
from components.training.report import write_network
from components.training.sampling import in_order
from components.training.spec import Phase, TrainSpec
from components.training.state import TrainResult

PER_CLASS = 200  # training images that a class mean is taken over: its error is then 1/14 of the spread
OLD_IMAGES = 20_000  # of all old classes together: their means only say where new rows must not reach
EXCHANGED = 0.2  # top-1 that an exchange of class names may gain before it is taken for the truth
MOST_EXCHANGED = 2_000  # classes among which the best exchange is sought


def expand(
    params: ExpandParams, *, manifest: Path, plan: Path, model: Path, out: Path, of: str = "student"
) -> None:
    """Add the manifest's new classes to a trained classifier, and train it on old and new images.

    Writes the expanded network like a trained one (``model.safetensors``, ``model.json``, ``metrics.json``,
    ``history.csv``) and ``clean.parquet``: the manifest with that network's labels.

    Args:
        manifest: the clean manifest; classes are told apart by their names.
        plan: ``plan.json`` of the audits, made for that manifest.
        model: folder of the trained classifier.
        of: the section, ``student`` or ``teacher``, whose training settings are used; the architecture and
            the image size are the classifier's own.

    Raises:
        FindingsError: preflight.shm, train.finite or train.learns.
        RetortError: there is no new class, or one without training images; ``expand.old_classes`` names an
            unknown one; the network has no classifier with a row a class; a file, Ray or a worker is at
            fault.
    """
    weights = model / checkpoint.FILE
    with step("expand", params, out, [manifest, plan, weights]) as run:
        table = manifests.read(need(manifest, "validate"))
        old, card = checkpoint.load(model)
        _need_classifier(old, model)
        classes = choose(card.class_names, table, params.expand.old_classes, manifest, model)
        remapped, labels = remap(table, classes)
        _find_classes(run, card, classes, table.num_rows - remapped.num_rows)
        folder = state_dir("expand")
        manifests.write(remapped, folder / "clean.parquet")
        spec = _spec(
            params,
            of,
            card,
            classes,
            folder / "clean.parquet",
            relabel(driver.load_plan(run, plan, manifest), labels),
        )
        preflight.preflight(run, spec, params.ray, of, 1 + params.expand.control)
        index = open_index(spec.manifest)
        training = sampling.training_rows(index, spec.plan)
        counts = np.bincount(index.labels[training], minlength=len(classes.names))
        _need_images(manifest, classes, counts)
        with _threads(spec):
            grown = _grow(spec, old, classes, index, training)
            before = {
                "old": _translated(_predict(spec, old, index), card, classes),
                "start": _predict(spec, grown, index),
            }
        _check_names(run, classes, index.labels[index.rows("val")].astype(np.int64), before["old"], model)
        spec = replace(spec, start=_save(grown, folder / "start.safetensors"), full_checkpoint=True)
        checkpoints = driver.checkpoints("expand", spec)
        result = driver.train(run, spec, params.ray, checkpoints)
        _write(run, params, spec, classes, counts, before, result, card, weights, out)
        manifests.write(remapped, run.product(out / "clean.parquet"))
    driver.forget(checkpoints)
    remove(folder)


# --- what must be there ---------------------------------------------------------------------------------


def _need_classifier(module: nn.Module, model: Path) -> None:
    try:
        class_expansion.classifiers(module)
    except RetortError as error:
        raise RetortError(
            f"{model}: {error}; it cannot be expanded: run 'retort finetune' on all classes"
        ) from None


def _need_images(manifest: Path, classes: Classes, counts: np.ndarray) -> None:
    bare = [classes.names[label] for label in classes.new if not counts[label]]
    if bare:
        raise RetortError(
            f"{manifest}: no training images of {some(bare)}: a new class needs some in the split 'train' "
            "(see data.splits, and what the plan leaves out)"
        )


def _find_classes(run: StepContext, card: ModelCard, classes: Classes, left_out: int) -> None:
    dropped = len(card.class_names) - len(classes.kept)
    said = f"{len(classes.kept)} old classes" + (
        f" ({dropped} left out, with {left_out} images)" if dropped else ""
    )
    new = [classes.names[label] for label in classes.new]
    run.add_finding(
        "expand.classes", "info", "classes", f"{said}, and {len(new)} new: {some(new)}",
        measured=len(classes.names), row=ROW,
    )  # fmt: skip


# --- the network before training ------------------------------------------------------------------------


def _spec(
    params: ExpandParams, of: str, card: ModelCard, classes: Classes, manifest: Path, plan: Plan
) -> TrainSpec:
    """Both ways to train, or the one that is asked for; a network starts where its ``start`` is put later."""
    settings = params.expand
    own: Net = getattr(params, of)
    net = own.model_copy(update={"arch": card.arch})
    lr = net.lr.model_copy(update={"initial": net.lr.initial * settings.lr})
    ways = [settings.mode, *(way for way in WAYS if settings.control and way != settings.mode)]
    phases = tuple(
        Phase(
            WAYS[way], way, settings.epochs or net.train.epochs, lr,
            new_rows=len(classes.kept) if way == "new_rows" else None,
        )
        for way in ways
    )  # fmt: skip
    general = params.general.model_copy(update={"class_num": "auto", "image_size": card.input_size[-1]})
    fitted = params.model_copy(update={"general": general})
    spec = driver.make_spec(fitted, net, params.ray, params.data, manifest, plan, None, phases)
    return replace(spec, class_names=classes.names)


@contextmanager
def _threads(spec: TrainSpec) -> Iterator[None]:
    """As many threads as the workers have together: the same sums on machines with more cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(spec.threads * spec.workers)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _grow(spec: TrainSpec, old: nn.Module, classes: Classes, index: Index, training: np.ndarray) -> nn.Module:
    """The expanded network as training finds it: old rows as they were, new ones from class means."""
    of_old = max(1, min(PER_CLASS, OLD_IMAGES // len(classes.kept)))
    by_class = training[np.argsort(index.labels[training], kind="stable")]
    labels, starts = np.unique(index.labels[by_class], return_index=True)
    some = [
        _spread(of_class, PER_CLASS if label in classes.new else of_old)
        for label, of_class in zip(labels.tolist(), np.split(by_class, starts[1:]), strict=True)
    ]
    statistics = class_expansion.feature_statistics(
        old, _batches(spec, index, np.concatenate(some), "train", "class means")
    )
    grown = build.create(spec.arch, len(spec.class_names)).eval()
    class_expansion.expand_head(old, grown, classes.kept, statistics, classes.new)
    return grown


def _spread(of_class: np.ndarray, most: int) -> np.ndarray:
    """At most so many of a class's rows, evenly over the manifest."""
    if len(of_class) <= most:
        return of_class
    return of_class[np.linspace(0, len(of_class) - 1, most).astype(np.int64)]


def _batches(
    spec: TrainSpec, index: Index, wanted: np.ndarray, split: str, what: str
) -> Iterator[tuple[Tensor, list[int]]]:
    """Inputs of a network and their labels, batch by batch."""
    normalise = Normalise(*build.preprocessing(spec.arch), torch.device("cpu"))
    store = open_store(index, spec.root, spec.size, spec.recipe().source)
    augment = Augment("none", spec.seed, spec.size)
    size = spec.valid.batch_size
    with open_feed(
        store.part(split), augment, torch.device("cpu"), spec.valid.num_workers, name="valid.num_workers"
    ) as feed:
        batches = feed(in_order(wanted, size, NO_AUGMENT))
        for batch in progress.track(batches, f"expand: {what} (batches)", -(-len(wanted) // size)):
            yield normalise(batch.pixels), index.labels[batch.draw.rows].tolist()


@torch.inference_mode()
def _predict(spec: TrainSpec, module: nn.Module, index: Index) -> np.ndarray:
    """Classes int64 that a network sees in the validation split."""
    batches = _batches(spec, index, index.rows("val"), "val", "accuracy before training")
    return np.concatenate([module(inputs).argmax(1).numpy() for inputs, _ in batches])


def _translated(predicted: np.ndarray, card: ModelCard, classes: Classes) -> np.ndarray:
    """The old network's answers as labels of the expanded one; -1 for a class that was left out."""
    label = np.full(len(card.class_names), -1, dtype=np.int64)
    label[list(classes.kept)] = np.arange(len(classes.kept))
    return label[predicted]


def _check_names(
    run: StepContext, classes: Classes, actual: np.ndarray, said: np.ndarray, model: Path
) -> None:
    """That the old network's rows are the classes that its card calls them: else new data teach wrong names.

    Names say which row is which class, so rows whose names were exchanged still recognise their images, but
    under another name: then the best exchange of names makes far more answers right than the card's do.
    """
    from scipy.optimize import linear_sum_assignment

    count = len(classes.kept)
    judged = (actual < count) & (said >= 0)
    if not 1 < count <= MOST_EXCHANGED or not judged.any():
        return
    actual, said = actual[judged], said[judged]
    taken = np.zeros((count, count), dtype=np.int64)
    np.add.at(taken, (actual, said), 1)
    rows_, columns = linear_sum_assignment(taken, maximize=True)
    gain, half = paired.wald(actual, rows_[np.argsort(columns)][said], said)
    if gain < EXCHANGED or gain <= 2 * half:
        return
    wrong = [(classes.names[a], classes.names[b]) for a, b in zip(rows_, columns, strict=True) if a != b]
    run.add_finding(
        RULE, "error", str(model),
        f"The old network recognises {(actual == said).mean():.1%} of {len(actual)} validation images of its "
        f"classes, and {(actual == said).mean() + gain:.1%} if '{wrong[0][1]}' is called '{wrong[0][0]}' and "
        f"{len(wrong)} names in all are exchanged: its card, or the data, bear wrong names.",
        measured=round(gain, 6), limit=EXCHANGED, row="1.1",
        advice=f"Restore {model / checkpoint.CARD}, or the class names that it was trained with.",
    )  # fmt: skip
    run.stop_on_errors()


def _save(module: nn.Module, path: Path) -> Path:
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    with atomic_path(path) as partial:
        save_file(tensors, str(partial))
    return path.resolve()


# --- what came out --------------------------------------------------------------------------------------


def _write(
    run: StepContext,
    params: ExpandParams,
    spec: TrainSpec,
    classes: Classes,
    counts: np.ndarray,
    before: dict[str, np.ndarray],
    result: TrainResult,
    card: ModelCard,
    weights: Path,
    out: Path,
) -> None:
    mode = params.expand.mode
    said, names = result.predictions, spec.class_names
    actual = {split: driver.labels(spec, split) for split in ("val", "test")}
    metrics: dict[str, Any] = {
        way: {split: evaluate(actual[split], said[way][split], names) for split in actual} for way in said
    }
    own, others = metrics.pop(mode), metrics
    parts = {"old": actual["val"] < len(classes.kept), "new": actual["val"] >= len(classes.kept)}
    written = {**own, **_parts(parts, actual["val"], before, said[mode]["val"])}
    report.find_old(run, classes, counts, written["old"])
    report.find_new(run, classes, written["new"])
    other = next(iter(others), None)
    if other is not None:
        ours = said[other]["val"]
        written["control"] = {"mode": other, **others[other], **_parts(parts, actual["val"], before, ours)}
        written["gain"] = _gain(parts, actual["val"], said["all"]["val"], said["new_rows"]["val"])
    report.find_mode(run, mode, written.get("gain"))
    lineage = [*card.lineage, Lineage(source=f"expanded: {weights}", sha256=card.sha256, coverage=1.0)]
    driver.write_model(run, spec, result.nets[mode], lineage, out)
    report.show(run.page, mode, written)
    write_network(
        run, out, "the expanded network", metrics=written, history=result.history,
        actual=actual["val"], predicted=said[mode]["val"], class_names=names,
    )  # fmt: skip
    numbers = {f"{part}_{key}": written[part][key] for part in parts for key in ("before", "after")}
    numbers = {key: value for key, value in numbers.items() if value is not None}
    run.tracker.summary(numbers)


def _parts(
    parts: dict[str, np.ndarray], actual: np.ndarray, before: dict[str, np.ndarray], after: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Top-1 on validation images of old and of new classes, at each stage; null where there are none.

    ``before``: the old network's (of new classes, what the expanded one begins with); ``start``: the
    expanded network's before training; ``difference``: ``after`` minus ``before``, with half its interval.
    """
    found = {}
    for part, at in parts.items():
        first = before["old" if part == "old" else "start"][at]
        entry: dict[str, Any] = {"images": int(at.sum())}
        keys = ("before", "start", "after", "difference", "half_width")
        values: Sequence[float | None] = [None] * len(keys)
        if at.any():
            tops = [float((said == actual[at]).mean()) for said in (first, before["start"][at], after[at])]
            values = [*tops, *paired.wald(actual[at], after[at], first)]
        found[part] = {**entry, **dict(zip(keys, values, strict=True))}
    return found


def _gain(
    parts: dict[str, np.ndarray], actual: np.ndarray, everything: np.ndarray, new_rows: np.ndarray
) -> dict[str, float]:
    """What training the whole network gives over training only the new rows, on the same images."""
    gain: dict[str, float] = {}
    for part, at in {"val": np.full(len(actual), True), **parts}.items():
        if at.any():
            value, half = paired.wald(actual[at], everything[at], new_rows[at])
            gain |= {f"{part}_top1": value, f"{part}_half_width": half}
    return gain

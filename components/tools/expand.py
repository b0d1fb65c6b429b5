"""The step ``expand``: a trained classifier learns classes that are new to it, and keeps those it knows."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
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
from components.tools.params import ExpandParams
from components.training import class_expansion, driver, paired, preflight, report, sampling
from components.training.augmentation import NO_AUGMENT, Augment
from components.training.inputs.feed import open_feed
from components.training.inputs.index import Index, open_index
from components.training.inputs.pictures import open_store
from components.training.metrics import evaluate
from components.training.normalise import Normalise
from components.training.sampling import in_order
from components.training.spec import Phase, TrainSpec
from components.training.state import TrainResult

WAYS = {"all": "whole network", "new_rows": "new rows only"}  # expand.mode and the name of its phase
PER_CLASS = 200  # training images that a class mean is taken over: its error is then 1/14 of the spread
OLD_IMAGES = 20_000  # of all old classes together: their means only say where new rows must not reach
EXCHANGED = 0.2  # top-1 that an exchange of class names may gain before it is taken for the truth
MOST_EXCHANGED = 2_000  # classes among which the best exchange is sought
NAMED = 5  # classes that a message names
ROW = "5.4"


@dataclass(frozen=True)
class Classes:
    """Which classes the expanded network has: old ones first, in their old order, then new ones.

    ``kept`` are the old classifier's rows of the old ones.
    """

    names: tuple[str, ...]
    kept: tuple[int, ...]

    @property
    def new(self) -> range:
        """Labels of the new classes."""
        return range(len(self.kept), len(self.names))


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


# --- which classes --------------------------------------------------------------------------------------


def choose(
    known: Sequence[str], table: pa.Table, wanted: Sequence[str] | None, manifest: Path, model: Path
) -> Classes:
    """The classes of the expanded network: of the ``known`` ones all, or those ``wanted``, and the new ones.

    Raises:
        RetortError: when a wanted class is unknown, or no class is new.
    """
    for name in wanted or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it knows {_some(known)}"
            raise RetortError(f"expand.old_classes: '{name}' is no class of {model}; {hint}")
    old, chosen = set(known), set(known if wanted is None else wanted)  # there may be 100,000
    kept = [row for row, name in enumerate(known) if name in chosen]
    names = manifests.class_names(table)
    occurring = np.unique(table["label"].to_numpy())
    new = dict.fromkeys(
        names[label] for label in occurring.tolist() if label >= 0 and names[label] not in old
    )
    if not new:
        raise RetortError(
            f"{manifest}: every class in it is known to {model} ({_some(known)}); add images of the new "
            "classes, then 'retort ingest && retort expand'"
        )
    return Classes((*(known[row] for row in kept), *new), tuple(kept))


def remap(table: pa.Table, classes: Classes) -> tuple[pa.Table, dict[int, int]]:
    """The manifest with the expanded network's labels, without classes that it does not have.

    Returns:
        The table, and the new label by the old one.
    """
    place = {name: label for label, name in enumerate(classes.names)}
    names = manifests.class_names(table)
    labels = np.array([*(place.get(name, -2) for name in names), manifests.UNLABELED], dtype=np.int32)
    mapped = labels[table["label"].to_numpy()]  # UNLABELED is -1: the last entry
    keep = mapped != -2
    named = pa.array([*classes.names, None], pa.string()).take(
        pa.array(np.where(mapped < 0, len(place), mapped))
    )
    table = table.set_column(
        table.schema.get_field_index("label"), manifests.SCHEMA.field("label"), pa.array(mapped)
    )
    table = table.set_column(
        table.schema.get_field_index("class_name"), manifests.SCHEMA.field("class_name"), named
    )
    mapping = {old: int(labels[old]) for old in range(len(names)) if labels[old] >= 0}
    return table.filter(pa.array(keep)), mapping


def relabel(plan: Plan, labels: dict[int, int]) -> Plan:
    """The plan with other labels; what it says of classes that are left out is left out."""

    def moved(values: dict[int, Any]) -> dict[int, Any]:
        return {labels[label]: value for label, value in values.items() if label in labels}

    sampling_ = plan.sampling
    by_label = {
        name: moved(getattr(sampling_, name)) for name in ("by_class", "by_source", "counts", "expected")
    }
    arguments = dict(plan.loss.arguments)
    if arguments.get("weights"):
        given = {int(label): weight for label, weight in arguments["weights"].items()}
        arguments["weights"] = {str(label): weight for label, weight in moved(given).items()}
    return plan.model_copy(
        update={
            "sampling": sampling_.model_copy(update=by_label),
            "loss": plan.loss.model_copy(update={"arguments": arguments}),
        }
    )


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
            f"{manifest}: no training images of {_some(bare)}: a new class needs some in the split 'train' "
            "(see data.splits, and what the plan leaves out)"
        )


def _find_classes(run: StepContext, card: ModelCard, classes: Classes, left_out: int) -> None:
    dropped = len(card.class_names) - len(classes.kept)
    said = f"{len(classes.kept)} old classes" + (
        f" ({dropped} left out, with {left_out} images)" if dropped else ""
    )
    new = [classes.names[label] for label in classes.new]
    run.add_finding(
        "expand.classes", "info", "classes", f"{said}, and {len(new)} new: {_some(new)}",
        measured=len(classes.names), row=ROW,
    )  # fmt: skip


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(f"'{name}'" for name in names[:NAMED]) + more


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
    _find_old(run, classes, counts, written["old"])
    _find_new(run, classes, written["new"])
    other = next(iter(others), None)
    if other is not None:
        ours = said[other]["val"]
        written["control"] = {"mode": other, **others[other], **_parts(parts, actual["val"], before, ours)}
        written["gain"] = _gain(parts, actual["val"], said["all"]["val"], said["new_rows"]["val"])
    _find_mode(run, mode, written.get("gain"))
    lineage = [*card.lineage, Lineage(source=f"expanded: {weights}", sha256=card.sha256, coverage=1.0)]
    driver.write_model(run, spec, result.nets[mode], lineage, out)
    _show(run, mode, written)
    report.write(
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


def _find_old(run: StepContext, classes: Classes, counts: np.ndarray, old: dict[str, Any]) -> None:
    """Accuracy on old classes, and what would let it fall or hide that it fell."""
    rule, subject = "expand.old_accuracy", "old classes"
    bare = [classes.names[label] for label in range(len(classes.kept)) if not counts[label]]
    if bare:
        which = "any" if len(bare) == len(classes.kept) else f"{len(bare)} of {len(classes.kept)}"
        run.add_finding(
            rule, "warning", subject,
            f"there are no training images of {which} old classes ({_some(bare)}): nothing reminds the "
            "network of them while it learns the new ones",
            measured=len(bare), limit=0, row=ROW,
            advice="Add some of their images to the data, or leave them out with expand.old_classes.",
        )  # fmt: skip
    if old["after"] is None:
        run.add_finding(
            rule, "warning", subject,
            "there are no validation images of old classes, so it is not known what they have lost",
            row=ROW, advice="Add some of their images to the split 'val'.",
        )  # fmt: skip
        return
    low, high = (old["difference"] + sign * old["half_width"] for sign in (-1, 1))
    fell = high < 0
    run.add_finding(
        rule, "warning" if fell else "info", subject,
        f"{old['before']:.2%} of {old['images']} validation images before (by the old network), "
        f"{old['start']:.2%} once the new rows stood beside the old ones, {old['after']:.2%} after training: "
        f"{old['difference']:+.2%} (95 % interval {low:+.2%} to {high:+.2%})",
        measured=round(old["difference"], 6), limit=0.0, row=ROW,
        advice="Add images of the classes that lost most (see the table of recall), train fewer epochs, or "
        "lower expand.lr." if fell else "",
    )  # fmt: skip


def _find_new(run: StepContext, classes: Classes, new: dict[str, Any]) -> None:
    rule, subject = "expand.new_accuracy", "new classes"
    if new["after"] is None:
        run.add_finding(
            rule, "warning", subject,
            "there are no validation images of new classes, so it is not known how well they were learnt",
            row=ROW, advice="Add some of their images to the split 'val'.",
        )  # fmt: skip
        return
    run.add_finding(
        rule, "info", subject,
        f"{new['before']:.2%} of {new['images']} validation images before training, with rows from class "
        f"means; {new['after']:.2%} after it",
        measured=round(new["after"], 6), row=ROW,
    )  # fmt: skip


def _find_mode(run: StepContext, mode: str, gain: dict[str, float] | None) -> None:
    """What the choice of what is trained cost or gave; only the new rows is always worth a warning."""
    rows_only = mode == "new_rows"
    said = "only the new rows were trained: the features stay blind to what tells the new classes apart"
    if gain is None:
        if rows_only:
            run.add_finding(
                "expand.mode", "warning", "expand.mode", said, measured=mode, limit="all", row=ROW,
                advice="Set expand.mode to all, or expand.control to true to see the difference.",
            )  # fmt: skip
        return
    value, half = gain["val_top1"], gain["val_half_width"]
    apart = ", ".join(
        f"{part} classes {gain[f'{part}_top1']:+.2%}" for part in ("old", "new") if f"{part}_top1" in gain
    )
    compared = (
        f"training the whole network gives {value:+.2%} top-1 over training only the new rows, on the same "
        f"validation images, after as many epochs (95 % interval {value - half:+.2%} to {value + half:+.2%}; "
        f"{apart})"
    )
    clear = abs(value) > half
    better = ("all" if value > 0 else "new_rows") if clear else mode
    advice = "" if clear else "The difference is within the noise: more validation images would tell."
    if better != mode:
        advice = f"Set expand.mode to {better}."
    run.add_finding(
        "expand.mode", "warning" if rows_only or better != mode else "info", "expand.mode",
        f"{said}; {compared}" if rows_only else compared,
        measured=round(value, 6), limit=0.0, row=ROW, advice=advice,
    )  # fmt: skip


def _show(run: StepContext, mode: str, written: dict[str, Any]) -> None:
    control = written.get("control")
    columns = ["classes", "images", "old network", "before training", f"after ({WAYS[mode]})", "difference"]
    lines = []
    for part in ("old", "new"):
        entry = written[part]
        first = entry["before"] if part == "old" else None
        half = (
            "" if entry["difference"] is None else f"{entry['difference']:+.1%} ± {entry['half_width']:.1%}"
        )
        line = [part, entry["images"], *(_share(v) for v in (first, entry["start"], entry["after"])), half]
        lines.append([*line, _share(control[part]["after"])] if control else line)
    if control:
        columns.append(f"after ({WAYS[control['mode']]})")
    run.page.table(
        "Old and new classes", columns, lines,
        note="Top-1 on the validation images of these classes, among all classes. New rows begin at class "
        "means of what the classifier is fed; the difference is to the old network, or for new classes to "
        "that beginning, with half its 95 % interval.",
    )  # fmt: skip


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"

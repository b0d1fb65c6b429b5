"""What training shows: a network's numbers in files, and the sections of a step's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.common.page import COLOURS, MARKERS, Page
from components.common.sheet import write_table
from components.common.storage import write_json
from components.step import StepContext

if TYPE_CHECKING:
    from components.training.advice import Advice
    from components.training.paired import Difference

MOST_CLASSES = 30  # more do not fit on a page: the worst are shown


def write_network(
    run: StepContext,
    out: Path,
    of: str,
    *,
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    actual: np.ndarray,
    predicted: np.ndarray,
    class_names: Sequence[str],
) -> None:
    """Write a trained network's metrics (all, and in short), history and confusion, and its charts.

    Args:
        of: whose they are, for titles: 'the teacher'.
        metrics: with those of the splits ``val`` and ``test``; the tracker gets the ones that runs are
            compared by.
        actual, predicted: classes of the validation split, int64 [n].
    """
    write_json(run.product(out / "metrics.json"), metrics)
    write_json(run.product(out / "summary.json"), headline(metrics))  # what DVC shows a person
    write_history(run.product(out / "history.csv"), history)
    write_confusion(run.product(out / "confusion.csv"), actual, predicted, class_names)
    show_curves(run.page, f"Training curves of {of}", history)
    show_recall(run.page, f"Recall per class of {of}", metrics)
    show_confusion(run.page, f"Confusion matrix of {of}", actual, predicted, class_names)
    run.tracker.summary(headline(metrics))


def headline(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The numbers that runs are compared by."""
    return {
        f"{split}_{key}": metrics[split][key]
        for split in ("val", "test")
        for key in ("top1", "macro_recall")
        if key in metrics[split]
    }


def write_history(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """One row an epoch, as CSV.

    ``train_top1`` is of the images as they were augmented and mixed, while the network changed.
    """
    columns = ["epoch", "phase", "lr", "train_loss", "train_top1", "val_loss", "val_top1", "val_macro_recall"]
    write_table(path, columns, [[row[column] for column in columns] for row in history])


def write_confusion(
    path: Path, actual: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]
) -> None:
    """One row an image: class names of what it is and what the network said."""
    rows = [[class_names[a], class_names[p]] for a, p in zip(actual, predicted, strict=True)]
    write_table(path, ["actual", "predicted"], rows)


def show_curves(page: Page, title: str, history: Sequence[Mapping[str, Any]]) -> None:
    """Loss and validation top-1 by epoch, one line a phase."""
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for i, phase in enumerate(dict.fromkeys(row["phase"] for row in history)):
        rows = [row for row in history if row["phase"] == phase]
        epochs = [row["epoch"] for row in rows]
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
        left.plot(epochs, [row["train_loss"] for row in rows], label=f"{phase}, training", **style)
        left.plot(
            epochs, [row["val_loss"] for row in rows], linestyle="--", label=f"{phase}, validation", **style
        )
        right.plot(epochs, [row["val_top1"] for row in rows], label=phase, **style)
    left.set(title="Loss", xlabel="epoch")
    right.set(title="Top-1 on the validation split", xlabel="epoch")
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    note = (
        "The training loss of a distilled phase is its divergence from the teacher, so lines of different "
        "phases are not on one scale; validation loss is cross-entropy throughout."
        if len({row["phase"] for row in history}) > 1
        else "Each epoch is judged on the whole validation split."
    )
    page.figure(title, figure, note=note)


def show_confusion(
    page: Page, title: str, actual: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]
) -> None:
    """Confusion matrix of the validation split; of many classes only the pairs most often confused."""
    pairs, counts = np.unique(
        np.stack([actual, predicted])[:, actual != predicted], axis=1, return_counts=True
    )
    if len(class_names) > MOST_CLASSES:
        order = np.argsort(-counts, kind="stable")[:MOST_CLASSES]
        rows = [[class_names[pairs[0, i]], class_names[pairs[1, i]], int(counts[i])] for i in order]
        page.table(title, ["is", "was taken for", "images"], rows, note="The pairs most often confused.")
        return
    from matplotlib import pyplot

    size = len(class_names)
    matrix = np.zeros((size, size), dtype=np.int64)
    np.add.at(matrix, (actual, predicted), 1)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure, axes = pyplot.subplots(figsize=(min(9, 2.2 + 0.42 * size),) * 2, layout="constrained")
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.argwhere(matrix):
        axes.text(
            j, i, str(matrix[i, j]), ha="center", va="center", fontsize=8,
            color="white" if share[i, j] > 0.6 else "black",
        )  # fmt: skip
    axes.set_xticks(range(size), class_names, rotation=45 if size > 12 else 0)
    axes.set_yticks(range(size), class_names)
    axes.set(xlabel="predicted", ylabel="actual")
    page.figure(title, figure, note="Validation split; a row is what the images are, a column what was said.")


def show_recall(page: Page, title: str, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Recall per class on validation and test; of many classes those with the lowest recall."""
    val, test = (metrics[split].get("per_class", {}) for split in ("val", "test"))
    names = sorted(val | test, key=lambda name: val.get(name, 1.0)) if len(val) > MOST_CLASSES else val | test
    rows = [[name, _percent(val.get(name)), _percent(test.get(name))] for name in list(names)[:MOST_CLASSES]]
    overall = [
        [what, *(_percent(metrics[split].get(key)) for split in ("val", "test"))]
        for what, key in (("all images (top-1)", "top1"), ("mean of the classes", "macro_recall"))
    ]
    shown = ", the lowest of them" if len(val) > MOST_CLASSES else ""
    page.table(
        title, ["class", "validation", "test"], [*overall, *rows],
        note=f"Share of each class's images that were recognised{shown}. The test split decides nothing.",
    )  # fmt: skip


def show_advice(page: Page, who: str, found: Sequence[Advice]) -> None:
    """What would help a network most, in order."""
    page.table(
        f"What would help the {who} most",
        ["", "do", "because", "points"],
        [
            [place, one.remedy, one.seen, f"{100 * one.gain:+.0f}" if one.told else "?"]
            for place, one in enumerate(found, 1)
        ],
        note="In order of what is likely to be gained in macro recall on validation: rules of thumb, from "
        "what this training measured, no promise. One change at a time shows whether they hold.",
    )


def show_margin(
    page: Page,
    tops: Mapping[str, Mapping[str, float]],
    top1: Difference,
    recall: Difference,
    gain: Difference,
) -> None:
    """Teacher and student alone, side by side, and what distilling will change.

    Args:
        tops: metrics of ``teacher`` and ``alone``.
        top1, recall: teacher minus student alone.
        gain: the forecast.
    """
    rows = [
        [name, f"{tops['teacher'][key]:.1%}", f"{tops['alone'][key]:.1%}", str(difference)]
        for name, key, difference in (("top-1", "top1", top1), ("macro recall", "macro_recall", recall))
    ]
    page.table(
        "Is the teacher worth it?", ["validation split", "teacher", "student alone", "difference"], rows,
        note=f"The student alone had the budget that distilling it will have. Forecast of the gain: {gain}.",
    )  # fmt: skip


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"

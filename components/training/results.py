"""What training leaves behind: the model's files, its numbers, and the sections of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from components.common import sheet
from components.common.page import Page

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
MARKERS = "osD^vP"
MOST_CLASSES = 30  # more do not fit on a page: the worst are shown


def paired_gain(actual: np.ndarray, ours: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Difference of top-1 of two networks on the same images, and half its 95 % interval.

    Args:
        actual, ours, other: classes int64 [n].
    """
    difference = (ours == actual).astype(float) - (other == actual).astype(float)
    return float(difference.mean()), 1.96 * float(difference.std()) / sqrt(max(1, len(difference)))


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
    write_csv(path, columns, [[row[column] for column in columns] for row in history])


def write_confusion(
    path: Path, actual: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]
) -> None:
    """One row an image: class names of what it is and what the network said."""
    rows = [[class_names[a], class_names[p]] for a, p in zip(actual, predicted, strict=True)]
    write_csv(path, ["actual", "predicted"], rows)


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A CSV file; floats with eight significant digits."""
    sheet.write_csv(path, [columns, *([_number(value) for value in row] for row in rows)])


def _number(value: Any) -> Any:
    return f"{value:.8g}" if isinstance(value, float) else value


def show_curves(page: Page, title: str, history: Sequence[Mapping[str, Any]]) -> None:
    """Loss and validation top-1 by epoch, one line a phase."""
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for i, phase in enumerate(dict.fromkeys(row["phase"] for row in history)):
        rows = [row for row in history if row["phase"] == phase]
        epochs = [row["epoch"] for row in rows]
        style = {"color": COLOURS[i % 6], "marker": MARKERS[i % 6], "markersize": 5}
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


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"

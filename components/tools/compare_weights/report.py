"""What ``compare-weights`` found, as a person reads it: gains and their noise, tables, a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from components.common.page import COLOURS, MARKERS
from components.common.sheet import write_table
from components.step import StepContext
from components.tools.params import CompareWeights
from components.training.metrics import evaluate
from components.training.paired import around, interval

CONFIGURED = "configured"
ROW = "1.4"


@dataclass(frozen=True)
class Outcome:
    """One finetune: ``predicted`` int64 on the images that decide, ``history`` with a row an epoch."""

    candidate: str
    seed: int
    predicted: np.ndarray
    history: list[dict[str, Any]]


def find_gain(
    run: StepContext, of: str, weights: Mapping[str, str], name: str, value: float, half: float | None,
    images: int, settings: CompareWeights,
) -> None:  # fmt: skip
    """The gain of the configured weights over others, and no claim where it is not above the noise."""
    what = (
        f"{value:+.2%} top-1 by starting from {weights[CONFIGURED]} instead of {weights[name]} ('{name}'), "
        f"on {images} images of the split '{settings.split}'"
    )
    advice = ""
    if half is None:
        verdict = "with one seed the noise is not known, so nothing is claimed"
        advice = "Compare with 'retort compare-weights --seeds 3' or more."
    else:
        verdict = (
            f"mean of {settings.seeds} seeds, 95 % interval {value - half:+.2%} to {value + half:+.2%}: "
            + ("above the noise" if abs(value) > half else "within the noise, so nothing is claimed")
        )
    worse = half is not None and value + half < 0
    if worse:
        advice = f"Set {of}.weights to {weights[name]}."
    run.add_finding(
        "weights.gain", "warning" if worse else "info", f"{of}.weights against '{name}'",
        f"{what} ({verdict})", measured=round(value, 6), limit=None if half is None else round(half, 6),
        row=ROW, advice=advice,
    )  # fmt: skip


def write_tables(
    run: StepContext, weights: Mapping[str, str], outcomes: Sequence[Outcome], actual: np.ndarray,
    class_names: Sequence[str], split: str, out: Path,
) -> None:  # fmt: skip
    """``results.csv``, a row a finetune, and ``history.csv``, a row an epoch."""
    rows, epochs = [], []
    for outcome in outcomes:
        measured = evaluate(actual, outcome.predicted, class_names)
        own = [outcome.candidate, outcome.seed]
        rows.append([*own, weights[outcome.candidate], measured["top1"], measured["macro_recall"]])
        keys = ("epoch", "lr", "train_loss", "val_loss", "val_top1", "val_macro_recall")
        epochs += [[*own, *(row[key] for key in keys)] for row in outcome.history]
    columns = ["candidate", "seed", "weights", f"{split}_top1", f"{split}_macro_recall"]
    write_table(run.product(out / "results.csv"), columns, rows)
    write_table(run.product(out / "history.csv"), ["candidate", "seed", *keys], epochs)


def show(
    run: StepContext,
    weights: Mapping[str, str],
    found: Mapping[str, tuple[float, float | None]],
    gains: Mapping[str, tuple[float, float | None]],
    best: str,
    tied: Sequence[str],
    outcomes: Sequence[Outcome],
    settings: CompareWeights,
) -> None:
    """Which weights to start from, top-1 of each, and how they learnt."""
    others = f"; the noise does not tell it apart from {', '.join(tied)}" if tied else ""
    run.page.text("Choice", f"{best} ({weights[best]}): {found[best][0]:.2%} top-1{others}.")
    run.page.table(
        "Start weights", ["candidate", "weights", "top-1", "gain of the configured ones"],
        [
            [
                name, weights[name], around(*found[name], "{:.2%}"),
                around(*gains[name], "{:+.2%}") if name in gains else "",
            ]
            for name in weights
        ],
        note=f"Split '{settings.split}', mean of {settings.seeds} seeds and half its 95 % interval; that of "
        "a gain is for differences on the same images with the same seed.",
    )  # fmt: skip
    _chart(run, list(weights), found, outcomes, settings.split)


def _chart(
    run: StepContext, names: Sequence[str], found: Mapping[str, tuple[float, float | None]],
    outcomes: Sequence[Outcome], split: str,
) -> None:  # fmt: skip
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for i, name in enumerate(names):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        mean, half = found[name]
        left.errorbar(i, mean, yerr=half or 0.0, color=colour, marker=marker, capsize=6)
        curves = np.array([[row["val_top1"] for row in o.history] for o in outcomes if o.candidate == name])
        epochs = np.arange(1, curves.shape[1] + 1)
        right.plot(epochs, curves.mean(axis=0), color=colour, marker=marker, markersize=5, label=name)
        if len(curves) > 1:
            halves = np.array([interval(column.tolist())[1] for column in curves.T])
            right.fill_between(
                epochs, curves.mean(axis=0) - halves, curves.mean(axis=0) + halves, color=colour, alpha=0.15
            )
    left.set_xticks(range(len(names)), names, rotation=20)
    left.margins(x=0.2)
    left.set(title=f"Top-1 on the split '{split}'")
    right.set(title="Top-1 on the validation split", xlabel="epoch")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(alpha=0.3)
        low, high = axes.get_ylim()  # an interval of few seeds may leave what top-1 can be
        axes.set_ylim(max(low, -0.02), min(high, 1.02))
    run.page.figure(
        "Accuracy by start weights", figure,
        note="Mean over the seeds and its 95 % interval (Student's t). Intervals that overlap may still "
        "differ: the findings compare the same images with the same seed.",
    )  # fmt: skip

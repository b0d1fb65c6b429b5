"""What ``tune`` found, as a person reads it: the verdict, tables, charts, and the best recipe."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import hypot, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from components.common.page import COLOURS
from components.common.sheet import write_table
from components.common.storage import write_json, write_text
from components.models.params import Net
from components.step import StepContext, name_of
from components.tools.params import Tune
from components.tools.tune.space import Tried, described, snippet
from components.training import metrics
from components.training.paired import around, interval

log = logging.getLogger(__name__)

FIXED, TUNED = "fixed", "tuned"


@dataclass(frozen=True)
class Outcome:
    """One training of the comparison: classes int64 by split."""

    who: str
    seed: int
    predicted: dict[str, np.ndarray]


def macro_gain(actual: np.ndarray, ours: np.ndarray, other: np.ndarray) -> tuple[float, float | None]:
    """Difference of macro recall between two recipes, and half its 95 % interval; None with a single seed.

    As ``paired.gain`` counts: noise of training (differences by seed, Student's t) and noise of the
    images (the stratified variance of a mean of class means; Cochran, "Sampling techniques", 1977, eq. 5.6),
    as independent ones. The second holds a part of the first, so the interval is rather too wide.

    Args:
        actual: classes int64 [n].
        ours, other: predicted classes int64 [seeds, n], in the same order of seeds.
    """
    difference = (ours == actual).astype(float) - (other == actual).astype(float)
    _, place, images = np.unique(actual, return_inverse=True, return_counts=True)
    by_class = np.stack([np.bincount(place, weights=of_seed) / images for of_seed in difference], axis=1)
    value, by_seed = interval(by_class.mean(axis=0).tolist())
    if by_seed is None:
        return value, None
    by_image = difference.mean(axis=0)
    middle = np.bincount(place, weights=by_image) / images
    spread = np.bincount(place, weights=(by_image - middle[place]) ** 2) / images
    variance = float((spread / images).sum()) / len(images) ** 2
    return value, hypot(by_seed, 1.96 * sqrt(variance))


def write(
    run: StepContext, settings: Tune, net: Net, tried: Sequence[Tried], best: Tried,
    outcomes: Sequence[Outcome], actual: Mapping[str, np.ndarray], class_names: Sequence[str], out: Path,
) -> None:  # fmt: skip
    """Judge, and write ``results.csv``, ``seeds.csv``, ``metrics.json``, ``best.yaml`` and the page.

    Args:
        tried: all trials, in their order; ``best`` is one of them.
        outcomes: of the comparison; empty: the fixed recipe was the best.
        actual: classes int64 [n] by split (val, test).
    """
    stopped = sum(one.end == "stopped" for one in tried)
    found: dict[str, Any] = {
        "of": settings.of,
        "trials": len(tried),
        "stopped_early": stopped,
        "best": {"trial": best.number, "values": best.values, "val_macro_recall": best.score},
        "fixed": {"trial": 0, "val_macro_recall": tried[0].score},
        "seeds": settings.seeds if outcomes else 0,
    }
    gains: dict[str, tuple[float, float | None]] = {}
    if outcomes:
        for split, truth in actual.items():
            if not len(truth):
                continue
            said = {
                who: np.stack([o.predicted[split] for o in outcomes if o.who == who])
                for who in (FIXED, TUNED)
            }
            gains[split] = macro_gain(truth, said[TUNED], said[FIXED])
            for who, predicted in said.items():
                by_seed = [metrics.evaluate(truth, row, class_names)["macro_recall"] for row in predicted]
                mean, half = interval(by_seed)
                found.setdefault(who, {})[f"{split}_by_seed"] = by_seed
                found[who] |= {f"{split}_mean": mean, f"{split}_half_width": half}
            found[f"gain_{split}"] = {"macro_recall": gains[split][0], "half_width": gains[split][1]}
    verdict = find(run, settings, best, gains, len(actual["val"]))
    found["verdict"] = verdict
    _tables(run, tried, outcomes, actual, class_names, out)
    write_json(run.product(out / "metrics.json"), found)
    write_text(run.product(out / "best.yaml"), snippet(settings.of, best.values, verdict))
    _show(run, settings, net, tried, best, found, gains, verdict)
    run.tracker.summary({"best_macro_recall": best.score, "fixed_macro_recall": tried[0].score})
    run.tracker.summary({f"gain_{split}": value for split, (value, _) in gains.items()})
    run.tracker.tags({"verdict": verdict, "best": described(best.values)})


def find(
    run: StepContext,
    settings: Tune,
    best: Tried,
    gains: Mapping[str, tuple[float, float | None]],
    images: int,
) -> str:
    """Whether the tuned recipe is better: ``better``, ``worse``, ``not told apart`` or ``fixed``."""
    what, advice, measured, limit = f"{settings.of}: {described(best.values)}", "", 0.0, None
    if not gains:
        verdict = "fixed"
        said = f"no recipe of {settings.trials} did better than the fixed one, so there is nothing to compare"
    else:
        value, half = gains["val"]
        measured, limit = value, half
        said = f"{value:+.2%} macro recall over the fixed recipe, on {images} images of validation"
        if half is None:
            verdict = "not told apart"
            said += " (with one seed the noise is not known, so nothing is claimed)"
            advice = "Compare with -o tune.seeds=3 or more."
        else:
            verdict = "better" if value > half else "worse" if value < -half else "not told apart"
            said += (
                f" (mean of {settings.seeds} seeds, 95 % interval {value - half:+.2%} to "
                f"{value + half:+.2%}: "
                + ("above the noise)" if verdict != "not told apart" else "within the noise: not told apart)")
            )
            if verdict == "better":
                best_file = name_of(run.out / "best.yaml")
                advice = f"{best_file} holds its values, for params.yaml or as -o arguments."
            else:
                advice = (
                    "Keep the fixed recipe; more images for validation or more tune.seeds would tell more."
                )
        if "test" in gains:
            test, test_half = gains["test"]
            said += f"; on test, which decides nothing, {test:+.2%}" + (
                "" if test_half is None else f" ± {test_half:.2%}"
            )
    run.add_finding(
        "tune.gain", "info", what, said, measured=round(measured, 6),
        limit=None if limit is None else round(limit, 6), advice=advice, row="2.3",
    )  # fmt: skip
    log.info(f"{run.name}: {what}: {said}")
    return verdict


def _tables(
    run: StepContext, tried: Sequence[Tried], outcomes: Sequence[Outcome], actual: Mapping[str, np.ndarray],
    class_names: Sequence[str], out: Path,
) -> None:  # fmt: skip
    keys = sorted({key for one in tried for key in one.values})
    rows = [
        [
            one.number, *(one.values.get(key, "") for key in keys), len(one.rows), one.end, one.score,
            max((row["val_top1"] for row in one.rows), default=0.0),
        ]
        for one in tried
    ]  # fmt: skip
    columns = ["trial", *keys, "epochs", "end", "val_macro_recall", "val_top1"]
    write_table(run.product(out / "results.csv"), columns, rows)
    trained = []
    for outcome in outcomes:
        row: list[Any] = [outcome.who, outcome.seed]
        for split in ("val", "test"):
            measured = metrics.evaluate(actual[split], outcome.predicted[split], class_names)
            row += [measured.get("macro_recall", ""), measured.get("top1", "")]
        trained.append(row)
    names = [f"{split}_{what}" for split in ("val", "test") for what in ("macro_recall", "top1")]
    write_table(run.product(out / "seeds.csv"), ["recipe", "seed", *names], trained)


def _show(
    run: StepContext, settings: Tune, net: Net, tried: Sequence[Tried], best: Tried, found: Mapping[str, Any],
    gains: Mapping[str, tuple[float, float | None]], verdict: str,
) -> None:  # fmt: skip
    said = {
        "better": "It is better than the fixed one, by more than the noise.",
        "worse": "With other seeds it is worse than the fixed one: keep that.",
        "not told apart": "It is not told apart from the fixed one: keep that.",
        "fixed": "That is the fixed one.",
    }[verdict]
    run.page.text("The best recipe", f"{described(best.values)}: {best.score:.2%} macro recall. {said}")
    if "gain_val" in found:
        run.page.table(
            "The tuned recipe against the fixed one",
            ["macro recall on", FIXED, TUNED, "gain"],
            [
                [
                    split,
                    *(
                        around(found[who][f"{split}_mean"], found[who][f"{split}_half_width"], "{:.2%}")
                        for who in (FIXED, TUNED)
                    ),
                    around(*gains[split], "{:+.2%}"),
                ]
                for split in ("val", "test")
                if f"gain_{split}" in found
            ],
            note=f"Mean of {settings.seeds} seeds, none of which a trial has had, and half its 95 % "
            "interval; that of the gain is for differences on the same images with the same seed. Recipes "
            "were chosen on validation, so it is a little kind to the tuned one; test decides nothing.",
        )
    keys = sorted({key for one in tried for key in one.values})
    ranked = sorted(tried, key=lambda one: (one.end != "done", -one.score))
    run.page.table(
        "Trials", ["trial", *keys, "epochs", "end", "macro recall"],
        [
            [
                one.number, *(one.values.get(key, _fixed(net, key)) for key in keys), len(one.rows), one.end,
                f"{one.score:.2%}",
            ]
            for one in ranked[:50]
        ],
        note="Macro recall on validation, of each trial's best epoch; trial 0 is the fixed recipe. A trial "
        "that was stopped was not among the best of those that came as far (ASHA).",
    )  # fmt: skip
    _curves(run, tried, best)
    _scatter(run, net, tried, best, keys)


def _fixed(net: Net, key: str) -> Any:
    value: Any = net
    for part in key.split("."):
        value = getattr(value, part)
    return "the recipe's" if value is None else value


def _curves(run: StepContext, tried: Sequence[Tried], best: Tried) -> None:
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for one in sorted(tried, key=lambda one: one.number in (0, best.number)):
        style: dict[str, Any] = {"color": "#b8bec7", "linewidth": 1}
        if one.number == 0:
            style = {"color": COLOURS[0], "linewidth": 2.2, "label": "fixed"}
        if one.number == best.number:
            style = {"color": COLOURS[1], "linewidth": 2.2, "label": f"best: trial {one.number}"}
        values = [row["val_macro_recall"] for row in one.rows]
        axes.plot(range(1, len(values) + 1), values, marker="o", markersize=4, **style)
    axes.set(xlabel="epoch", ylabel="macro recall on validation")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    run.page.figure("Trials by epoch", figure, note="A line that ends early was stopped.")


def _scatter(run: StepContext, net: Net, tried: Sequence[Tried], best: Tried, keys: Sequence[str]) -> None:
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    if not keys:
        return
    figure, grid = pyplot.subplots(
        1, len(keys), figsize=(2.6 * len(keys), 3), layout="constrained", sharey=True, squeeze=False
    )
    for axes, key in zip(grid[0], keys, strict=True):
        for one in tried:
            value = one.values.get(key, _fixed(net, key))
            if value == "the recipe's":
                continue
            done = one.end == "done"
            colour = COLOURS[1] if one.number == best.number else COLOURS[0] if one.number == 0 else "#5b6675"
            axes.plot(value, one.score, marker="o" if done else "x", color=colour, linestyle="none")
        if key in ("lr.initial", "optimizer.weight_decay"):
            axes.set_xscale("log")
        axes.set(xlabel=key)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(alpha=0.3)
    grid[0][0].set(ylabel="macro recall on validation")
    run.page.figure(
        "Trials by value", figure,
        note="A cross was stopped early, so it had fewer epochs to show what it can.",
    )  # fmt: skip

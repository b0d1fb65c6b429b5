"""Accuracy against latency, size and compute: one marker and line per family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from components.benchmark.choice import Result, fastest
from components.common.page import COLOURS, MARKERS
from components.export.precisions import PRECISIONS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUDGET_SHOWN = 3  # a budget beyond this many times the slowest would squeeze all points together


def best_of_each(results: Sequence[Result]) -> list[Result]:
    """Each model and precision once: its fastest configuration at the smallest batch, fastest first."""
    smallest = min(result.batch for result in results)
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if result.batch == smallest:
            groups.setdefault((result.model, result.precision), []).append(result)
    return sorted((fastest(group) for group in groups.values()), key=lambda result: result.p50_ms)


def latency_figure(results: Sequence[Result], budget_ms: float | None) -> Figure:
    """Top-1 against p50: the fastest configuration of each model bold, all others faint."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0))
    best = best_of_each(results)
    smallest = min(result.batch for result in results)
    styles = _styles(results)
    for result in results:
        if result.batch == smallest and result not in best:
            colour, marker = styles[result.family]
            axes.plot(result.p50_ms, 100 * result.val_top1, marker, color=colour, alpha=0.25, markersize=5)
    _families(axes, best, styles, lambda result: result.p50_ms)
    for result in best:
        half = result.noise * result.p50_ms / 2
        axes.errorbar(
            result.p50_ms, 100 * result.val_top1, xerr=half, color=styles[result.family][0], capsize=3
        )
    _names(axes, best, lambda result: result.p50_ms)
    across = [result.p50_ms for result in results if result.batch == smallest]
    if budget_ms is not None and budget_ms <= BUDGET_SHOWN * max(across):
        across.append(budget_ms)
        axes.axvline(budget_ms, color="#444", linestyle="--", linewidth=1)
        axes.annotate(
            f"budget {budget_ms:g} ms ", (budget_ms, 0.02), xycoords=("data", "axes fraction"), ha="right",
            color="#444", fontsize=9,
        )  # fmt: skip
    elif budget_ms is not None:
        axes.set_title(f"all keep the budget of {budget_ms:g} ms, far to the right", fontsize=9, loc="right")
    images = "one image" if smallest == 1 else f"{smallest} images"
    axes.set_xlabel(f"p50 latency of {images}, ms (bar: noise)")
    _finish(axes, best, across)
    return figure


def cost_figure(results: Sequence[Result]) -> Figure:
    """Top-1 against the file's size and against multiply-accumulates."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(6.4, 3.0), sharey=True)
    best, styles = best_of_each(results), _styles(results)
    panels: tuple[tuple[Any, Callable[[Result], float], str], ...] = (
        (left, lambda result: result.size_bytes / 1e6, "size of the file, MB"),
        (right, lambda result: result.macs / 1e6, "multiply-accumulates, millions"),
    )
    for axes, value, label in panels:
        _families(axes, best, styles, value)
        _names(axes, best, value)
        axes.set_xlabel(label)
        _finish(axes, best, [value(result) for result in best])
        axes.get_legend().remove()  # the same markers as in the figure of latency
    right.set_ylabel("")
    return figure


def _styles(results: Sequence[Result]) -> dict[str, tuple[str, str]]:
    families = sorted({result.family for result in results})
    return {
        family: (COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)])
        for index, family in enumerate(families)
    }


def _families(
    axes: Any, best: Sequence[Result], styles: dict[str, tuple[str, str]], value: Callable[[Result], float]
) -> None:
    """A line for each family and precision, which the filling of the marker tells."""
    precisions = sorted({result.precision for result in best}, key=list(PRECISIONS).index)
    for family, (colour, marker) in styles.items():
        for precision in precisions:
            points = sorted(
                (value(r), 100 * r.val_top1) for r in best if (r.family, r.precision) == (family, precision)
            )
            if points:
                axes.plot(
                    *zip(*points, strict=True), marker=marker, color=colour, markersize=8, linewidth=1.2,
                    fillstyle=PRECISIONS[precision].fill, markerfacecoloralt="white",
                    label=f"{family} {precision}" if len(precisions) > 1 else family,
                )  # fmt: skip


def _names(axes: Any, best: Sequence[Result], value: Callable[[Result], float]) -> None:
    """Each model's name once, at its leftmost point: above what is most accurate, below the others."""
    top = max(result.val_top1 for result in best)
    for model in dict.fromkeys(result.model for result in best):
        result = min((r for r in best if r.model == model), key=value)
        above = result.val_top1 == top
        axes.annotate(
            model, (value(result), 100 * result.val_top1), xytext=(0, 8 if above else -8), ha="center",
            textcoords="offset points", va="bottom" if above else "top", fontsize=9,
        )  # fmt: skip


def _finish(axes: Any, best: Sequence[Result], across: Sequence[float]) -> None:
    shown = [100 * result.val_top1 for result in best]
    # at least two points of height: less would blow up what a handful of images decides
    pad = max(1.0, 0.25 * (max(shown) - min(shown)))
    axes.set_ylim(min(shown) - pad, max(shown) + pad)
    axes.set_xlim(0, 1.15 * max(across))
    axes.set_ylabel("top-1 on validation, %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="family", frameon=False, loc="lower right", fontsize=8, title_fontsize=8)

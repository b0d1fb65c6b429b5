"""What the benchmark leaves: results.csv, choice.json, metrics.json, the curves and the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from components.benchmark import curves
from components.benchmark.choice import Choice, Result
from components.benchmark.params import BenchmarkParams
from components.common.page import Page, render
from components.common.sheet import write_csv
from components.common.storage import human_bytes, write_json, write_text
from components.step import StepContext


def write(
    run: StepContext,
    params: BenchmarkParams,
    results: Sequence[Result],
    chosen: Choice,
    costs: Sequence[tuple[str, float]],
    out: Path,
) -> None:
    """Write the products and the page."""
    from matplotlib import pyplot

    columns = [field.name for field in fields(Result)]
    write_csv(run.product(out / "results.csv"), [columns, *(astuple(result) for result in results)])
    write_json(run.product(out / "choice.json"), chosen.summary() | {"preprocessing_ms": dict(costs)})
    write_json(run.product(out / "metrics.json"), metrics(results, chosen))

    budget = params.benchmark.latency_budget_ms
    png = curves.latency_figure(results, budget)
    png.savefig(run.product(out / "curves.png"), dpi=150, bbox_inches="tight", format="png")
    pyplot.close(png)
    curve_note = "Validation split. Bold: the fastest configuration of each model; faint: all others."
    cost_note = "Lines and markers as above. A smaller number is not always a shorter time."
    alone = Page()
    for page in (run.page, alone):
        if page is run.page:
            page.text("Recommended configuration", in_words(chosen))
        page.figure("Accuracy against latency", curves.latency_figure(results, budget), note=curve_note)
        page.figure("Accuracy against size and compute", curves.cost_figure(results), note=cost_note)
        _tables(page, results, chosen, costs)
    html = render("sections.html", title="Accuracy against latency", sections=alone.sections)
    write_text(run.product(out / "curves.html"), html)


def _tables(
    page: Page, results: Sequence[Result], chosen: Choice, costs: Sequence[tuple[str, float]]
) -> None:
    page.table(
        "What matters",
        ["what", "take", "threads", "batch", "p50, ms", "images/s", "size", "top-1"],
        [
            [
                need, f"{best.model}, {best.engine} {best.precision}", best.threads, best.batch, best.p50_ms,
                round(best.throughput), human_bytes(best.size_bytes), f"{best.val_top1:.2%}",
            ]
            for need, best in ((need, answer.result) for need, answer in chosen.answers.items())
        ],
        note="; ".join(f"{need}: {answer.why}" for need, answer in chosen.answers.items()) + ".",
    )  # fmt: skip
    if chosen.pairs:
        page.table(
            "Student against teacher, side by side",
            ["engine", "threads", "batch", "student p50, ms", "teacher p50, ms", "ratio", "from", "to"],
            [
                [
                    f"{pair.engine} {pair.precision}", pair.threads, pair.batch, pair.student_p50_ms,
                    pair.teacher_p50_ms, pair.ratio, pair.ratio_low, pair.ratio_high,
                ]
                for pair in chosen.pairs
            ],
            note="Ratio of the two in each round; from and to: 10th and 90th percentile of rounds.",
        )  # fmt: skip
    page.table(
        "All configurations",
        [
            "model", "engine", "threads", "batch", "p50, ms", "p95, ms", "noise", "images/s", "size",
            "M MACs", "top-1",
        ],
        [
            [
                r.model, f"{r.engine} {r.precision}", r.threads, r.batch, r.p50_ms, r.p95_ms,
                f"{r.noise:.0%}", round(r.throughput), human_bytes(r.size_bytes), r.macs / 1e6,
                f"{r.val_top1:.2%}",
            ]
            for r in sorted(results, key=lambda r: (r.batch, r.p50_ms))
        ],
        note="Latency is of one call with a whole batch. Noise: spread of identical rounds.",
    )  # fmt: skip
    page.table(
        "Before the network: one image, one thread",
        ["what", "ms"],
        [[name, value] for name, value in costs],
        note="Median over validation images, with ONNX Runtime. A service pays decoding in any case.",
    )


def in_words(chosen: Choice) -> str:
    """The recommended configuration in words."""
    result, why = chosen.recommended.result, chosen.recommended.why
    words = (
        f"Deploy {result.name()}: {why}. It takes {result.p50_ms:.3g} ms (95 % of calls under "
        f"{result.p95_ms:.3g} ms), {result.throughput:.0f} images a second, "
        f"{human_bytes(result.size_bytes)}, {result.val_top1:.2%} top-1 on the validation split."
    )
    pair = chosen.pair
    if pair is not None:
        words += (
            f" Measured side by side ({pair.engine} {pair.precision}, threads {pair.threads}, batch "
            f"{pair.batch}), the student takes {pair.ratio:.2f} x the teacher's time and has "
            f"{pair.size_ratio:.2f} x its size."
        )
    return words


def metrics(results: Sequence[Result], chosen: Choice) -> dict[str, Any]:
    """Few numbers for comparing runs: each model's fastest configuration, and the pair."""
    numbers: dict[str, Any] = {}
    for result in curves.best_of_each(results):  # fastest first
        numbers.setdefault(
            result.model,
            {
                "p50_ms": result.p50_ms,
                "p95_ms": result.p95_ms,
                "throughput": result.throughput,
                "size_bytes": result.size_bytes,
                "val_top1": result.val_top1,
            },
        )
    pair = chosen.pair
    if pair is not None:
        numbers["student_to_teacher"] = {"p50_ratio": pair.ratio, "size_ratio": pair.size_ratio}
    return dict(sorted(numbers.items()))

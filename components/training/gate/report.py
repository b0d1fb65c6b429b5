"""What the gate's page shows: each rule's verdict with its evidence, and how norms fit their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from components.common.findings import Finding
from components.step import StepContext

if TYPE_CHECKING:
    from components.weights.fit import Fit


def show_rules(run: StepContext) -> None:
    """A line a finding: what was judged, the verdict, what was measured, and its limit."""
    run.page.table(
        "The gate before distillation", ["rule", "of", "verdict", "measured", "limit"],
        [[f.rule, f.subject, _verdict(f), _said(f.measured), _said(f.limit)] for f in run.report.findings],
        note="Distillation runs only with exactly the files and values that passed here.",
    )  # fmt: skip


def show_fits(run: StepContext, who: str, fits: Sequence[Fit]) -> None:
    """Per batch norm: how its running statistics correlate with what it sees of real images."""
    if not fits:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 2.6))
    places = range(len(fits))
    axes.plot(places, [fit.means for fit in fits], "o-", ms=3, lw=1, label="means")
    axes.plot(places, [fit.variances for fit in fits], "s-", ms=3, lw=1, label="variances (log)")
    wrong = [place for place, fit in zip(places, fits, strict=True) if fit.unlikely]
    axes.plot(wrong, [fits[place].means for place in wrong], "rx", ms=8, label="unlike")
    axes.set(xlabel="batch norm, in the order of computation", ylabel="correlation", ylim=(-1.05, 1.05))
    axes.axhline(0, color="grey", lw=0.5)
    axes.legend(loc="lower left", fontsize=8)
    run.page.figure(
        f"{who}: batch norms against their inputs", figure,
        note="Over channels: a norm's running statistics, and what its kernel gives on validation images. "
        "Kernels that were not trained with their norms lie around 0.",
    )  # fmt: skip


def _verdict(finding: Finding) -> str:
    if finding.waived:
        return "waived"
    return {"info": "passed", "warning": "unknown"}.get(finding.level, "failed")


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_said(part)}" for name, part in value.items())
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

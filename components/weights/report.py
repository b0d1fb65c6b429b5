"""What the step ``weights`` shows: how much of each backbone is covered, and kernels that do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from components.common.page import Page
from components.weights.coverage import Coverage, Shape
from components.weights.fit import Fit

WORST = 10  # tensors at fault that are named one by one


def show_coverage(page: Page, who: str, coverage: Coverage, rows: Sequence[Mapping[str, Any]]) -> None:
    """How many tensors are matched, and the first of those at fault.

    Args:
        rows: as in ``coverage.parquet``, those at fault first.
    """
    page.table(
        f"{who}: coverage of the backbone", ["tensors", "count", "values"],
        [
            ["matched", len(coverage.matched), coverage.covered],
            ["missing", len(coverage.missing), None],
            ["of another shape", len(coverage.wrong_shape), None],
            ["without a place in the network", len(coverage.unexpected), None],
        ],
        note=f"{coverage.share:.2%} of {coverage.parameters:,} values; coverage.parquet lists every tensor.",
    )  # fmt: skip
    worst = [row for row in rows if row["state"] != "matched"][:WORST]
    if worst:
        page.table(
            f"{who}: first tensors at fault",
            ["tensor", "state", "in the file", "in the network"],
            [
                [row["tensor"], row["state"], _shape(row["file_shape"]), _shape(row["network_shape"])]
                for row in worst
            ],
        )


def show_fits(page: Page, who: str, wrong: Sequence[Fit]) -> None:
    """Batch norms that remember other inputs than their kernels give, the worst first."""
    page.table(
        f"{who}: kernels of the backbone that do not fit their norms",
        ["batch norm", "correlation of means", "of variances"],
        [[fit.norm, f"{fit.means:.2f}", f"{fit.variances:.2f}"] for fit in wrong[:WORST]],
        note="Over the channels, between a norm's running statistics and its inputs on artificial images.",
    )


def _shape(shape: Shape | None) -> str:
    return "" if shape is None else " x ".join(map(str, shape)) or "scalar"

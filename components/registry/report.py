"""What the step ``register`` shows: the version, and its recall by class beside the champion's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from components.common.page import Page
from components.registry.compare import MIN_IMAGES, Comparison

MOST_ROWS = 40


def show_version(page: Page, registered: Mapping[str, Any], arch: str, top1: float) -> None:
    """What was registered, and how it is loaded.

    Args:
        registered: as in ``registered.json``.
        arch: name of the architecture.
        top1: on the validation split, 0..1.
    """
    alias = registered["alias"]
    page.table(
        "What was registered",
        ["", ""],
        [
            ["name", registered["name"]],
            ["version", f"{registered['version']}{f', {alias}' if alias else ''}"],
            ["why", registered["reason"]],
            ["architecture", arch],
            ["top-1, validation split", f"{top1:.2%}"],
            ["load it", f"mlflow.onnx.load_model('{registered['model_uri']}')"],
            ["sha256 of model.onnx", registered["sha256"]],
            ["data fingerprint", registered["data_fingerprint"]],
        ],
    )


def show_comparison(page: Page, comparison: Comparison, champion: int, images: int) -> None:
    """Recall of both by class, the greatest losses first.

    Args:
        champion: its version.
        images: of the validation split.
    """
    verdict = "better" if comparison.better else "stays challenger"
    both = (_share(comparison.champion), _share(comparison.challenger))
    table: list[list[Any]] = [["all together", images, *both, verdict]]
    for row in comparison.rows[:MOST_ROWS]:
        verdict = ("worse" if row.worse else "") if row.judged else "not judged"
        table.append([row.name, row.images, _share(row.champion), _share(row.challenger), verdict])
    page.table(
        "Champion and challenger",
        ["recall of", "images", f"champion (version {champion})", "this version", "verdict"],
        table,
        note="On the same validation images; the greatest losses first. A class is judged when it has at "
        f"least {MIN_IMAGES} images.",
    )


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"

"""What the step ``register`` shows and writes: the version, and how it was judged beside the champion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from components.common.page import Page
from components.common.storage import atomic_path
from components.dataset.images import thumbnail
from components.registry.decision import Decision
from components.registry.scores import Compared
from components.registry.slices import MIN_IMAGES

MOST_ROWS = 40
SHEET = 24  # pictures of a contact sheet


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


def summary(decision: Decision) -> dict[str, Any]:
    """What ``decision.json`` says: the interval, every slice, every reason against it."""
    return {
        "schema_version": 1,
        "promoted": decision.promoted,
        "reason": decision.reason,
        "images": decision.images,
        "top1": {"champion": decision.champion, "challenger": decision.challenger},
        "difference": decision.difference.rounded(),
        "refusals": [asdict(refusal) for refusal in decision.refusals],
        "slices": [asdict(row) for row in decision.rows],
    }


def write_outcomes(path: Path, table: pa.Table) -> None:
    """Write what both said of each image, whole or not at all."""
    import pyarrow.parquet as pq

    with atomic_path(path) as partial:
        pq.write_table(table, partial, compression="zstd")


def show_decision(page: Page, decision: Decision, compared: Compared, champion: int) -> None:
    """Top-1 with its interval, what else was weighed, and the slices, the greatest losses first.

    Args:
        champion: its version.
    """
    facts = compared.facts
    rows: list[list[Any]] = [
        ["verdict", "becomes champion" if decision.promoted else "stays challenger"],
        ["why", decision.reason],
        ["images", decision.images],
        [f"top-1 of the champion (version {champion})", f"{decision.champion:.2%}"],
        ["top-1 of this version", f"{decision.challenger:.2%}"],
        ["difference", str(decision.difference)],
        ["bytes of the file", f"{facts.size:.0%} of the champion's"],
    ]
    if facts.latency is not None:
        time = facts.latency
        rows.append(
            ["time for an image, one thread", f"{time.value:.2f} of the champion's ({time.low:.2f} to "
             f"{time.high:.2f}, side by side)"]
        )  # fmt: skip
    rows += [
        [f"recall of '{name}', new", f"{recall:.1%} of {n:,}"] for name, (n, recall) in compared.new.items()
    ]
    page.table("Champion and challenger", ["", ""], rows[:MOST_ROWS])
    page.table(
        "Slices",
        ["slice", "verdict", "images", "champion", "this version", "chance"],
        [
            [row.name, "worse" if row.worse else "", row.images,
             f"{row.champion:.1%}", f"{row.challenger:.1%}", f"{row.chance:.2g}"]
            for row in decision.rows[:MOST_ROWS]
        ],
        note=f"Accuracy on the same images; the greatest losses first, of {len(decision.rows):,} slices of "
        f"{MIN_IMAGES} images or more. Chance: how likely such a loss is where there is none, corrected for "
        "all slices looked at. What a search found is judged by the half of them that it did not see.",
    )  # fmt: skip


def show_worse(page: Page, table: pa.Table, root: str, thumbnails: bool) -> None:
    """The images that the champion knew and the challenger does not, the surest mistakes first."""
    listed = [row for row in table.to_pylist() if row["champion_right"] and not row["challenger_right"]]
    listed.sort(key=lambda row: (-row["challenger_score"], row["path"]))
    note = f"{len(listed):,} in all, the surest mistakes first; outcomes.parquet lists every image."
    listed = listed[:SHEET]
    if not listed:
        page.text("Images that got worse", "None: whatever the champion recognised, this version does, too.")
    elif thumbnails:
        said = "is '{class_name}', now said to be '{challenger}' ({challenger_score:.0%})"
        pictures = [(thumbnail(root, row["path"]), f"{row['path']} {said.format(**row)}") for row in listed]
        page.images("Images that got worse", pictures, note=note)
    else:
        page.table(
            "Images that got worse",
            ["path", "class", "now said to be", "score"],
            [
                [r["path"], r["class_name"], r["challenger"], r["challenger_score"]]
                for r in listed[:MOST_ROWS]
            ],
            note=note,
        )

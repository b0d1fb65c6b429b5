"""What the step ``export`` shows: ``parity.json``, the tracked numbers, and the page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from components.common.storage import human_bytes, sha256_file, write_json
from components.export.parity import Comparison, Proof, Written
from components.export.precisions import PRECISIONS
from components.step import StepContext


def write(
    run: StepContext, proof: Proof, as_files: Comparison | None, files: Mapping[str, Written], out: Path
) -> None:
    """``parity.json``, the tracked numbers and the page."""
    compared = {
        f"{name}, {way}": comparison
        for name, ways in proof.compared.items()
        for way, comparison in ways.items()
    }
    if as_files is not None:
        compared["model.onnx, whole images"] = as_files
    write_json(
        run.product(out / "parity.json"),
        {
            "schema_version": 1,
            "checkpoint": {"images": proof.images, "top1": proof.top1},
            "files": {
                name: {"sha256": sha256_file(one.path), "bytes": one.path.stat().st_size}
                for name, one in files.items()
            },
            "compared": {name: comparison.summary() for name, comparison in compared.items()},
        },
    )
    whole = proof.compared["model.onnx"]["batches"]
    numbers = {"top1": whole.top1, "max_difference": whole.max_difference}
    sizes = {f"bytes_{one.key}": float(one.path.stat().st_size) for one in files.values()}
    run.tracker.metrics({"checkpoint_top1": proof.top1, **numbers, **sizes})
    run.tracker.summary({**numbers, **sizes})
    rows: list[list[Any]] = [["checkpoint", proof.images, f"{proof.top1:.2%}", "", "", ""]]
    rows += [
        [
            name,
            way.images,
            f"{way.top1:.2%}",
            way.different_ids,
            f"{way.max_difference:.1e}",
            way.failure or _verdict(files, name, way),
        ]
        for name, way in compared.items()
    ]
    sizes_said = ", ".join(
        f"{name} {human_bytes(size)}" for name, size in zip(files, sizes.values(), strict=True)
    )
    run.page.table(
        "The same answers before and after export",
        ["graph", "images", "top-1", "other class", "largest difference", "verdict"],
        rows,
        note=f"Validation split; scores are 0 to 1. {sizes_said}.",
    )
    if whole.differences:
        run.page.figure(
            "How far scores move in export",
            _histogram(proof, files),
            alt="Histogram of score differences per image",
            note="The largest difference of a score in each image; model.onnx must stay left of the line: "
            f"export.tolerance, or half of {whole.rounding:.0e} of the largest logit, {whole.max_logit:.0f}",
        )


def _verdict(files: Mapping[str, Written], name: str, way: Comparison) -> str:
    """Files of float32 must be equal; the others are judged by what they lose of top-1."""
    file, _, how = name.rpartition(", ")
    if files[file].equal and how != "whole images":
        return "equal" if way.holds else "differs"
    return "see top-1"


def _histogram(proof: Proof, files: Mapping[str, Written]) -> Any:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 2.6))
    smallest = 1e-9
    for name, ways in proof.compared.items():
        values = np.maximum(ways["batches"].differences, smallest)
        precision = PRECISIONS[files[name].precision]
        axes.hist(
            values,
            bins=np.logspace(-9, 0, 46).tolist(),
            color=precision.colour,
            hatch=precision.hatch,
            alpha=0.8,
            label=name,
        )
    limit = proof.compared["model.onnx"]["batches"].limit
    axes.axvline(limit, color="#444", linestyle="--")
    axes.annotate(
        "limit", (limit, 1), xycoords=("data", "axes fraction"), xytext=(5, 0), va="top",
        color="#444", textcoords="offset points",
    )  # fmt: skip
    axes.set(xscale="log", xlabel="largest difference of a score", ylabel="images", xlim=(smallest / 2, 1))
    axes.spines[["top", "right"]].set_visible(False)
    if len(proof.compared) > 1:
        axes.legend(frameon=False)
    return figure

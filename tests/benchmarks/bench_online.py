"""Labels from the cache against labels at every step: the same student, teacher, views and seeds.

The teacher is finetuned once a seed; then the same student is distilled by both, with plain views and with
mixed ones (MixUp). Fashion-MNIST where it is installed (see ``fashion.py``), else scikit-learn's digits.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from components.weights.params import WeightsParams
from components.weights.weights import weights as prepare_weights
from tests.benchmarks import fashion
from tests.benchmarks.bench_ssld import (
    FIRST_SEED,
    Case,
    distilled,
    finetuned,
    params_of,
    read_digits,
    read_fashion,
    write_manifest,
)
from tests.benchmarks.measure import Row, at_most, inside

LIMIT = 0.3  # points of top-1
MIXUP = 0.2
VIEWS = {"plain views": 0.0, "MixUp": MIXUP}
LABELS = ("cached", "online")


def measure(seeds: int) -> list[Row]:
    """Test top-1 by views and labels, and how far cached and online are apart."""
    digits = Case("digits", read_digits, train=60, val=200, test=1000, size=48, teacher_epochs=15, epochs=15)
    case = digits
    if fashion.there("cached and online labels on Fashion-MNIST"):
        case = Case("fashion", read_fashion, 300, 500, 10_000, size=32, teacher_epochs=5, epochs=6)
    found: dict[tuple[str, str], list[float]] = {each: [] for each in product(VIEWS, LABELS)}
    with tempfile.TemporaryDirectory(prefix="retort-bench-") as folder, inside(Path(folder)):
        names, pictures = case.read(Path(folder) / "images")
        prepare_weights(WeightsParams.model_validate(params_of(case, 0)), out=Path("weights"))
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            write_manifest(case, names, pictures, seed)
            own = params_of(case, seed)
            finetuned(own)
            for views, labels in found:
                top1 = _distilled(own, VIEWS[views], labels)
                found[views, labels].append(top1)
                print(f"{case.name}, seed {seed}, {views}, {labels}: {top1:.2%}", file=sys.stderr, flush=True)
    return list(_rows(case.name, found))


def _distilled(own: dict[str, Any], mixup: float, labels: str) -> float:
    """Test top-1 of the student."""
    student = {**own["student"], "train": {**own["student"]["train"], "mixup": mixup}}
    settings = {**own["distill"], "teacher_labels": labels, "control": False}
    return float(distilled({**own, "student": student, "distill": settings})["test"]["top1"])


def _rows(case: str, found: dict[tuple[str, str], list[float]]) -> Iterator[Row]:
    for views in VIEWS:
        cached, online = (found[views, labels] for labels in LABELS)
        for labels, values in zip(LABELS, (cached, online), strict=True):
            said = ", ".join(f"{100 * value:.2f}" for value in values)
            yield Row(f"{case}, {views}: {labels}", 100 * mean(values), "%", note=said)
        apart = [100 * (one - other) for one, other in zip(cached, online, strict=True)]
        spread = f" +- {stdev(apart):.2f} (standard deviation)" if len(apart) > 1 else ""
        note = f"cached - online{spread}: " + ", ".join(f"{value:+.2f}" for value in apart)
        yield at_most(f"{case}, {views}: apart", abs(mean(apart)), LIMIT, "points", note)

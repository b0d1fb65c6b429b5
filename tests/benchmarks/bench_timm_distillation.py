"""Our distillation beside timm's own, on the same teacher, start weights, images, epochs, batch and rate.

Ours: the pipeline's defaults, the control included, by which ``distill.method: auto`` knows what the teacher
is worth; judged is the distilled student, whichever of the two would be shipped. timm's: its task
``LogitDistillationTask`` (KL, label and teacher with equal weights), its optimizer factory, cosine schedule,
loader and transform. Both see pictures alike: as they are, and cropped, mirrored and jittered within the same
limits. Fashion-MNIST where it is installed (see ``fashion.py``), else digits.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_loader, create_transform
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.task import LogitDistillationTask
from torch import nn
from torch.utils.data import Dataset

from components.dataset import manifest
from components.models import checkpoint
from components.models.params import Arch
from components.training.trainer import create_network
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
from tests.benchmarks.measure import Row, at_least, inside

# what pictures go through: our recipe, and timm's settings of the same
PICTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "as they are": ("none", {"no_aug": True}),
    "cropped, mirrored, jittered": ("standard", {"scale": (0.7, 1.0), "color_jitter": 0.4}),
}
WHO = ("ours", "timm")
WARMUP = 0.1  # of the steps


class Pictures(Dataset):
    """Images of one split: PIL and label, transformed."""

    def __init__(self, split: str, transform: Any = None) -> None:
        rows = manifest.read(Path("clean.parquet"), ["path", "label", "split"]).to_pylist()
        rows = [row for row in rows if row["split"] == split]
        self.images = [Image.open(f"/{row['path']}").convert("RGB") for row in rows]
        self.labels = [int(row["label"]) for row in rows]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        return self.transform(self.images[place]), self.labels[place]


def measure(seeds: int) -> list[Row]:
    """Test top-1 by pictures and seed, and by how much ours is above timm's."""
    case = Case("digits", read_digits, train=60, val=200, test=1000, size=48, teacher_epochs=15, epochs=15)
    if fashion.there("distillation beside timm's on Fashion-MNIST"):
        case = Case("fashion", read_fashion, 300, 500, 10_000, size=32, teacher_epochs=5, epochs=6)
    found: dict[tuple[str, str], list[float]] = {each: [] for each in product(PICTURES, WHO)}
    with tempfile.TemporaryDirectory(prefix="retort-bench-") as folder, inside(Path(folder)):
        names, pictures = case.read(Path(folder) / "images")
        prepare_weights(WeightsParams.model_validate(params_of(case, 0)), out=Path("weights"))
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            write_manifest(case, names, pictures, seed)
            own = params_of(case, seed)
            finetuned(own)
            for name, (augment, settings) in PICTURES.items():
                found[name, "ours"].append(_ours(own, augment))
                found[name, "timm"].append(_timm(case, seed, settings))
                both = ", ".join(f"{who} {found[name, who][-1]:.2%}" for who in WHO)
                print(f"{case.name}, seed {seed}, {name}: {both}", file=sys.stderr, flush=True)
    return list(_rows(case.name, found))


def _ours(own: dict[str, Any], augment: str) -> float:
    student = {**own["student"], "train": {**own["student"]["train"], "augment": augment}}
    return float(distilled({**own, "student": student})["distilled"]["test"]["top1"])


def _timm(case: Case, seed: int, settings: dict[str, Any]) -> float:
    torch.manual_seed(seed)
    np.random.seed(seed)
    own = params_of(case, seed)["student"]
    student = create_network(Arch.model_validate(own["arch"]), 10, Path("weights/student.safetensors"), seed)
    teacher, _ = checkpoint.load(Path("teacher"))
    batch, epochs = own["train"]["batch_size"], own["train"]["epochs"]
    normal = {"mean": student.pretrained_cfg["mean"], "std": student.pretrained_cfg["std"]}
    size = (3, case.size, case.size)
    pictures = Pictures("train")
    loader = create_loader(
        pictures, size, batch, is_training=True, num_workers=0, use_prefetcher=False,
        persistent_workers=False, device=torch.device("cpu"), interpolation="bilinear", **normal, **settings,
    )  # fmt: skip
    task = LogitDistillationTask(student, teacher, nn.CrossEntropyLoss(), verbose=False)
    optimizer = create_optimizer_v2(
        student, opt=own["optimizer"]["name"], lr=own["lr"]["initial"], weight_decay=0.05
    )
    steps = epochs * len(loader)
    schedule = CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=int(WARMUP * steps), warmup_prefix=True, t_in_epochs=False
    )
    task.train()
    number = 0
    for _ in range(epochs):
        for images, labels in loader:
            schedule.step_update(number)
            optimizer.zero_grad()
            task(images, labels)["loss"].backward()
            optimizer.step()
            number += 1
    return _top1(student.eval(), create_transform(size, crop_pct=1.0, interpolation="bilinear", **normal))


@torch.inference_mode()
def _top1(student: nn.Module, transform: Any) -> float:
    pictures = Pictures("test", transform)
    right = 0
    for images, labels in torch.utils.data.DataLoader(pictures, batch_size=256):
        right += int((student(images).argmax(1) == labels).sum())
    return right / len(pictures)


def _rows(case: str, found: dict[tuple[str, str], list[float]]) -> Iterator[Row]:
    for (name, who), values in found.items():
        said = ", ".join(f"{100 * value:.2f}" for value in values)
        yield Row(f"{case}, {name}: {who}", 100 * mean(values), "%", note=f"test top-1 by seed: {said}")
    for name in PICTURES:
        gains = [100 * (one - other) for one, other in zip(*(found[name, who] for who in WHO), strict=True)]
        spread = f"+- {stdev(gains):.2f} (standard deviation): " if len(gains) > 1 else ""
        note = spread + ", ".join(f"{gain:+.2f}" for gain in gains)
        yield at_least(f"{case}, {name}: ours over timm's", mean(gains), 0.0, "points", note)

"""A small real data set (four of scikit-learn's digits), a small network, and weights that it learnt."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from components.audit.plan import Plan, Sampling
from components.dataset import manifest
from components.training.params import DistillParams

ARCH = "test_efficientnet"  # timm's own network for tests: a third of a million parameters
SIZE = 32
CLASSES = 4
SPLITS = ["train"] * 6 + ["val", "val", "test", "unlabeled"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """160 digits as PNG files and their manifest, in a folder of its own that is the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETORT_STATE", ".retort")
    digits = load_digits(n_class=CLASSES)
    rows: list[dict[str, Any]] = []
    for i, (image, label) in enumerate(zip(digits.images[:160], digits.target[:160], strict=True)):
        split = SPLITS[i % len(SPLITS)]
        path = f"{split}/{i:03}.png"
        target = tmp_path / "images" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).astype(np.uint8)).save(target)
        rows.append(
            {
                "path": path,
                "label": -1 if split == "unlabeled" else int(label),
                "class_name": None if split == "unlabeled" else f"digit {label}",
                "split": split,
                "source": "real",
                "sha256": hashlib.sha256(target.read_bytes()).hexdigest(),
            }
        )
    table = pa.Table.from_pylist(rows, schema=manifest.SCHEMA)
    manifest.write(table, tmp_path / "data/clean.parquet")
    plan = Plan(sampling=Sampling(by_class={0: 1.5}))
    plan.write(tmp_path / "outputs/audit/plan.json")
    return SimpleNamespace(
        manifest=tmp_path / "data/clean.parquet",
        plan=tmp_path / "outputs/audit/plan.json",
        root=str(tmp_path / "images"),
        paths=[row["path"] for row in rows],
        labels=np.array([row["label"] for row in rows]),
        splits=np.array([row["split"] for row in rows]),
    )


@pytest.fixture
def params(data: SimpleNamespace) -> DistillParams:
    """Parameters for both networks, small enough to train in seconds."""
    net = {
        "arch": {"name": ARCH},
        "weights": "start.safetensors",
        "lr": {"initial": 0.02},
        "train": {"epochs": 3, "batch_size": 12},
    }
    return DistillParams.model_validate(
        {
            "global": {"image_size": SIZE, "seed": 3},
            "data": {"root": data.root},
            "teacher": net,
            "student": net,
            "distill": {
                "crops": 2,
                "unlabeled_per_class": 2,
                "min_teacher_accuracy": 0.3,
                "reference_lr": 0.1,
                "reference_batch": 24,
            },
        }
    )


@pytest.fixture
def weights(data: SimpleNamespace, tmp_path: Path) -> Path:
    """The folder outputs/weights: a network of the same kind that a few real steps have trained."""
    import torch
    from safetensors.torch import save_file

    from components.models import build
    from components.models.params import Arch
    from components.training import loader

    torch.manual_seed(1)
    torch.set_num_threads(1)
    samples = loader.open_samples(data.manifest, data.root, SIZE)
    rows = samples.rows("train")
    pixels = loader.Views(samples, "none", 0).__getitems__(loader.pairs(rows, loader.PLAIN))
    arch = Arch(name=ARCH)
    module = build.create(arch, CLASSES)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    inputs = loader.Normalise(*build.preprocessing(arch), torch.device("cpu"))(pixels)
    labels = torch.from_numpy(samples.labels[rows])
    for _ in range(6):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(inputs), labels).backward()
        optimizer.step()
    backbone = build.create(arch, 0).state_dict()
    tensors = {name: module.state_dict()[name].contiguous() for name in backbone}
    folder = tmp_path / "outputs/weights"
    folder.mkdir(parents=True)
    lineage = '{"lineage": [{"source": "start.safetensors", "sha256": "00", "coverage": 1.0}]}'
    for who in ("teacher", "student"):
        save_file(tensors, str(folder / f"{who}.safetensors"))
        (folder / f"{who}.json").write_text(lineage, encoding="utf-8")
    return folder

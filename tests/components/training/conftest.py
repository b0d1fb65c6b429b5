"""A small real data set (four of scikit-learn's digits), a small network, and weights that it learnt."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from components.audit.plan_schema import Plan, Sampling
from components.common.storage import read_json, sha256_file, write_json
from components.dataset import images, manifest
from components.models.params import Arch
from components.training.params import DistillParams

ARCH = "test_efficientnet"  # timm's own network for tests: a third of a million parameters
SIZE = 32
CLASSES = 4
SPLITS = ["train"] * 6 + ["val", "val", "test", "unlabeled"]


def write_data(folder: Path) -> None:
    """160 digits as PNG files, their manifest and a plan."""
    digits = load_digits(n_class=CLASSES)
    rows: list[dict[str, Any]] = []
    for i, (image, label) in enumerate(zip(digits.images[:160], digits.target[:160], strict=True)):
        split = SPLITS[i % len(SPLITS)]
        path = f"{split}/{i:03}.png"
        target = folder / "images" / path
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
    manifest.write(table, folder / "data/clean.parquet")
    Plan(sampling=Sampling(by_class={0: 1.5})).write(folder / "outputs/audit/plan.json")


def plain(index: Any, root: str, rows: list[int]) -> Any:
    """Images of some rows as production sees them, uint8 [B, 3, S, S]."""
    import torch

    pixels = np.stack([images.load_rgb(root, index.path(row), SIZE) for row in rows])
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def train(module: Any, arch: Arch, folder: Path, steps: int) -> None:
    """A few real steps on all training images at once."""
    import torch

    from components.models import build
    from components.training.inputs.index import open_index
    from components.training.normalise import Normalise

    index = open_index(folder / "data/clean.parquet")
    rows = index.rows("train").tolist()
    inputs = Normalise(*build.preprocessing(arch), torch.device("cpu"))(
        plain(index, str(folder / "images"), rows)
    )
    labels = torch.from_numpy(index.labels[rows]).long()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(inputs), labels).backward()
        optimizer.step()


def write_start(weights: Path, who: str, tensors: dict[str, Any]) -> None:
    """Start weights, their source, and their record, as the step ``weights`` leaves them."""
    from safetensors.torch import save_file

    path = weights / f"{who}.safetensors"
    save_file(tensors, str(path))
    source = weights.parents[1] / f"{who}-start.safetensors"
    shutil.copyfile(path, source)
    lineage = [{"source": source.name, "sha256": sha256_file(source), "coverage": 1.0}]
    write_json(path.with_suffix(".json"), {"sha256": sha256_file(path), "lineage": lineage})


def write_networks(folder: Path) -> None:
    """outputs/weights: a network that a few steps have trained. outputs/teacher: it, with more of them."""
    import torch

    from components.models import build, checkpoint
    from components.models.card import Lineage, ModelCard

    torch.manual_seed(1)
    torch.set_num_threads(1)
    arch = Arch(name=ARCH)
    module = build.create(arch, CLASSES)
    train(module, arch, folder, 6)
    names = build.create(arch, 0).state_dict()
    tensors = {name: module.state_dict()[name].clone() for name in names}
    weights = folder / "outputs/weights"
    weights.mkdir(parents=True)
    for who in ("teacher", "student"):
        write_start(weights, who, tensors)
    train(module, arch, folder, 10)
    mean, std = build.preprocessing(arch)
    card = ModelCard(
        arch=arch,
        class_names=[f"digit {label}" for label in range(CLASSES)],
        input_size=[3, SIZE, SIZE],
        mean=list(mean),
        std=list(std),
        data_fingerprint=manifest.fingerprint(folder / "data/clean.parquet"),
        lineage=[Lineage.model_validate(read_json(weights / "teacher.json")["lineage"][0])],
        sha256="",
    )
    teacher = folder / "outputs/teacher"
    teacher.mkdir()
    checkpoint.save(teacher / "model.safetensors", teacher / "model.json", module.eval(), card)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project after the steps before training; tests get copies of it."""
    folder = tmp_path_factory.mktemp("project")
    write_data(folder)
    write_networks(folder)
    return folder


@pytest.fixture
def data(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A project of the test's own, which is the working directory."""
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETORT_STATE", ".retort")
    table = manifest.read(tmp_path / "data/clean.parquet")
    return SimpleNamespace(
        manifest=tmp_path / "data/clean.parquet",
        plan=tmp_path / "outputs/audit/plan.json",
        weights=tmp_path / "outputs/weights",
        teacher=tmp_path / "outputs/teacher",
        root=str(tmp_path / "images"),
        paths=table["path"].to_pylist(),
    )


@pytest.fixture
def params(data: SimpleNamespace) -> DistillParams:
    """Parameters for both networks, small enough to train in seconds."""
    net = {
        "arch": {"name": ARCH},
        "lr": {"initial": 0.02},
        "train": {"epochs": 3, "batch_size": 12},
    }
    return DistillParams.model_validate(
        {
            "global": {"image_size": SIZE, "seed": 3},
            "data": {"root": data.root},
            "teacher": {**net, "weights": "teacher-start.safetensors"},
            "student": {**net, "weights": "student-start.safetensors"},
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
def weights(data: SimpleNamespace) -> Path:
    """The folder outputs/weights."""
    return data.weights


@pytest.fixture
def teacher(data: SimpleNamespace) -> Path:
    """The folder outputs/teacher."""
    return data.teacher

"""A small network trained on real digits, its folder as training writes it, and its images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from components.common.storage import sha256_file
from components.dataset import manifest as manifests
from components.export.params import ExportParams
from components.models.card import ModelCard
from components.models.params import Arch

ARCH, SIZE = "test_efficientnet", 32
NAMES = [f"digit {digit}" for digit in range(10)]


@dataclass(frozen=True)
class Digits:
    """scikit-learn's digits as PNG files of 24 x 30 pixels, and their manifest."""

    root: Path
    manifest: Path

    def params(self, **settings: object) -> ExportParams:
        return ExportParams.model_validate(
            {
                "data": {"root": str(self.root)},
                "export": settings,
                "registry": {"tracking_uri": f"sqlite:///{self.root.parent}/mlflow.db"},
            }
        )


def write_manifest(path: Path, rows: list[tuple[str, int, str]]) -> None:
    """Rows of (path, label, split), as validation leaves them."""
    named = [
        {"path": path, "label": label, "class_name": NAMES[label], "split": split, "source": "real"}
        for path, label, split in rows
    ]
    manifests.write(pa.Table.from_pylist(named, schema=manifests.SCHEMA), path)


def write_checkpoint(folder: Path, module: torch.nn.Module, names: list[str], arch: str) -> Path:
    """The folder as the training steps write it, whatever they would say of it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in module.state_dict().items()},
        folder / "model.safetensors",
    )
    ModelCard(
        arch=Arch(name=arch),
        class_names=names,
        input_size=[3, SIZE, SIZE],
        mean=[0.5, 0.5, 0.5],
        std=[0.5, 0.5, 0.5],
        data_fingerprint="digits",
        lineage=[],
        sha256=sha256_file(folder / "model.safetensors"),
    ).write(folder / "model.json")
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("digits")
    data = load_digits()
    rows = []
    for index, (pixels, label) in enumerate(zip(data.images[:1000], data.target, strict=False)):
        split = "val" if index % 5 == 0 else "train"
        path = f"{split}/{label}/{index:04d}.png"
        (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((24, 30), Image.Resampling.BICUBIC)
        image.save(folder / "images" / path)
        rows.append((path, int(label), split))
    write_manifest(folder / "clean.parquet", rows)
    return Digits(folder / "images", folder / "clean.parquet")


@pytest.fixture(scope="session")
def trained(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``outputs/student``: two epochs on 800 digits, some 90 % top-1."""
    import timm

    from components.export import exported

    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = exported.rows(digits.manifest, "train")
    _, pixels = next(rows.images(str(digits.root)).squares(SIZE, len(rows)))
    images = torch.from_numpy(exported.normalise(pixels, [0.5] * 3, [0.5] * 3))
    labels = torch.tensor(rows.labels, dtype=torch.long)
    module = timm.create_model(ARCH, num_classes=10)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(2):
        for chosen in torch.randperm(len(rows)).split(32):
            loss = torch.nn.functional.cross_entropy(module(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return write_checkpoint(tmp_path_factory.mktemp("outputs") / "student", module.eval(), NAMES, ARCH)


@pytest.fixture(scope="session")
def exported_folder(digits: Digits, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``outputs/export`` of the trained network, with an int8 file beside model.onnx."""
    from components.export.export import export

    out = tmp_path_factory.mktemp("outputs") / "export"
    export(digits.params(int8=True), manifest=digits.manifest, model=trained, out=out)
    assert json.loads((out / "report.json").read_text())["passed"]
    return out

"""A project as the steps before ``register`` leave it: real digits, a linear classifier as the student."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.numpy import save_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from components.audit.plan_schema import Plan
from components.common.findings import Report
from components.common.storage import read_json, sha256_file, write_json
from components.dataset import manifest as manifests
from components.export import exported as exports
from components.models.card import Lineage, ModelCard
from components.models.params import Arch
from components.registry.params import RegisterParams
from components.registry.register import register
from components.tracking.client import connect

SIZE = 16
NAMES = [f"digit {label}" for label in range(10)]
MEAN, STD = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]


@dataclass
class Project:
    """The folders that ``register`` reads; ``train`` makes another student."""

    folder: Path

    def params(self, **registry: Any) -> RegisterParams:
        """Without the trial, which takes seconds: what tests it asks for it."""
        return RegisterParams.model_validate(
            {
                "registry": {"name": "digits", "trial": False, **registry},
                "data": {"root": str(self.folder / "images")},
            }
        )

    def write_data(self, count: int) -> None:
        """Write the manifest of the first ``count`` digits; every third one is for validation."""
        digits = load_digits()
        rows = []
        for index in range(count):
            label = int(digits.target[index])
            path = f"{label}/{index:04d}.png"
            file = self.folder / "images" / path
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = (digits.images[index] / 16 * 255).astype(np.uint8)
                Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.NEAREST).save(file)
            split = "val" if index % 3 == 0 else "train"
            rows.append({
                "path": path, "label": label, "class_name": NAMES[label], "split": split, "source": "real",
                "sha256": sha256_file(file),
            })  # fmt: skip
        manifests.write(pa.Table.from_pylist(rows, schema=manifests.SCHEMA), self.folder / "clean.parquet")

    def suspect(self, paths: list[str]) -> None:
        """Write the list of files whose labels the audit suspects."""
        listed = pa.table({"rule": pa.array(["labels.suspect"] * len(paths)), "path": pa.array(paths)})
        pq.write_table(listed, self.folder / "samples.parquet")

    def _pixels(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        rows = exports.rows(self.folder / "clean.parquet", split)
        batches = rows.images(str(self.folder / "images")).squares(SIZE, 512)
        pixels = np.concatenate([batch for _, batch in batches])
        return exports.normalise(pixels, MEAN, STD), rows.labels

    def train(self, regularisation: float = 1.0, blind_to: int | None = None, scale: float = 1.0) -> None:
        """Train a linear student, export it, measure it.

        Args:
            blind_to: a class that it never says.
            scale: of its logits, which changes the file and no answer.
        """
        images, labels = self._pixels("train")
        fitted = LogisticRegression(C=regularisation, max_iter=60).fit(
            images.reshape(len(images), -1), labels
        )
        weight, bias = fitted.coef_.astype(np.float32), fitted.intercept_.astype(np.float32)
        weight, bias = weight * np.float32(scale), bias * np.float32(scale)
        if blind_to is not None:
            bias[blind_to] = -1000.0
        student = self.folder / "student"
        student.mkdir(exist_ok=True)
        save_file({"weight": weight, "bias": bias}, student / "model.safetensors")
        card = ModelCard(
            arch=Arch(name="linear"), class_names=NAMES, input_size=[3, SIZE, SIZE], mean=MEAN, std=STD,
            data_fingerprint=manifests.fingerprint(self.folder / "clean.parquet"),
            lineage=[Lineage(source="none", sha256="", coverage=0.0)],
            sha256=sha256_file(student / "model.safetensors"),
        )  # fmt: skip
        card.write(student / "model.json")
        self._export(weight, bias, card)
        self._measure(student)

    def _export(self, weight: np.ndarray, bias: np.ndarray, card: ModelCard) -> None:
        graph = helper.make_graph(
            [
                helper.make_node("Flatten", [exports.INPUT], ["flat"]),
                helper.make_node("Gemm", ["flat", "weight", "bias"], ["logits"], transB=1),
                helper.make_node("Softmax", ["logits"], [exports.OUTPUT]),
            ],
            "linear",
            [helper.make_tensor_value_info(exports.INPUT, TensorProto.FLOAT, ["N", 3, SIZE, SIZE])],
            [helper.make_tensor_value_info(exports.OUTPUT, TensorProto.FLOAT, ["N", len(NAMES)])],
            [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        helper.set_model_props(model, exports.metadata(card, in_graph=False))
        path = self.folder / "export/model.onnx"
        path.parent.mkdir(exist_ok=True)
        onnx.save(model, path)
        write_json(path.with_name("parity.json"), {"files": {"model.onnx": {"sha256": sha256_file(path)}}})
        Report(step="export").write(path.with_name("report.json"))

    def _measure(self, student: Path) -> None:
        images, labels = self._pixels("val")
        said = exports.run(exports.session(self.folder / "export/model.onnx"), images).argmax(axis=1)
        recalls = {NAMES[label]: float((said[labels == label] == label).mean()) for label in range(10)}
        top1, macro = float((said == labels).mean()), float(np.mean(list(recalls.values())))
        val = {"top1": top1, "macro_recall": macro, "per_class": recalls, "images": len(labels)}
        write_json(student / "metrics.json", {"val": val, "test": {"top1": top1, "macro_recall": macro}})

    def register(self, params: RegisterParams | None = None) -> dict[str, Any]:
        """Run the step; returns what ``registered.json`` says."""
        out = self.folder / "outputs/register"
        register(
            params or self.params(), manifest=self.folder / "clean.parquet", student=self.folder / "student",
            exported=self.folder / "export", benchmark=self.folder / "benchmark", check=self.folder / "check",
            plan=self.folder / "plan.json", samples=self.folder / "samples.parquet", out=out,
        )  # fmt: skip
        return read_json(out / "registered.json")

    def findings(self) -> dict[str, list[dict[str, Any]]]:
        """The findings of the last registration, by rule."""
        found: dict[str, list[dict[str, Any]]] = {}
        for finding in json.loads((self.folder / "outputs/register/report.json").read_text())["findings"]:
            found.setdefault(finding["rule"], []).append(finding)
        return found


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with its first student, and an empty MLflow store: made once, copied by each test."""
    project = Project(tmp_path_factory.mktemp("prepared"))
    project.write_data(900)
    project.train()
    Plan().write(project.folder / "plan.json")
    project.suspect([])
    (project.folder / "benchmark").mkdir()
    write_json(project.folder / "benchmark/choice.json", {"recommended": {"engine": "onnxruntime"}})
    (project.folder / "check").mkdir()
    Report(step="check").write(project.folder / "check/report.json")
    write_json(project.folder / "check/gate.json", {"inputs": {}})
    (project.folder / ".retort/mlflow").mkdir(parents=True)
    connect(f"sqlite:///{project.folder}/.retort/mlflow/mlflow.db")
    return project.folder


@pytest.fixture
def project(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project of the test's own, in the current folder."""
    folder = tmp_path / "project"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RETORT_RUN", str(tmp_path))
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    return Project(folder)

"""A version comes back from itself alone, and what keeps it from that is named."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from components.common import links
from components.common.errors import RetortError
from components.common.storage import remove
from components.dataset import manifest as manifests
from components.tools import rebuild
from tests.conftest import REPO_ROOT

TINY = (
    "global.image_size=32", "teacher.train.epochs=1", "student.train.epochs=1", "distill.control=false",
    "distill.min_teacher_accuracy=0.2", "export.min_accuracy=0.05",
    "benchmark.time_budget_s=4.0", "benchmark.threads=[1]", "benchmark.batch_sizes=[1]", "ray.workers=1",
)  # fmt: skip
STEPS = ("ingest", "validate", "weights", "audit", "finetune", "check", "distill", "export",
         "export --of teacher", "benchmark", "register")  # fmt: skip


def test_images_that_are_gone_or_changed_are_named(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(6)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    rows = [
        {"path": name, "label": 0, "class_name": "a", "split": "train", "source": "real",
         "bytes": len(name), "sha256": hashlib.sha256(name.encode()).hexdigest()}
        for name in names
    ]  # fmt: skip
    manifests.write(pa.Table.from_pylist(rows, schema=manifests.SCHEMA), tmp_path / "clean.parquet")
    rebuild._images(tmp_path / "clean.parquet", tmp_path, {"data": {}})
    (tmp_path / "2.png").unlink()
    (tmp_path / "4.png").write_bytes(b"5.png")
    with pytest.raises(
        RetortError, match=r"2 images of 6 .*2\.png: No such file.*4\.png has another content"
    ):
        rebuild._images(tmp_path / "clean.parquet", tmp_path, {"data": {}})


def test_other_packages_are_refused_where_they_compute(tmp_path: Path) -> None:
    (tmp_path / "provenance").mkdir()
    path = tmp_path / "provenance/packages.txt"
    path.write_text("".join(f"{one}\n" for one in links.packages()))
    result = rebuild.Rebuilt(tmp_path)
    rebuild._packages(tmp_path, result, anyway=False)
    assert result.notes == []
    path.write_text(path.read_text().replace("numpy==", "numpy==0."))
    with pytest.raises(RetortError, match=r"packages\.txt: the version was made with numpy 0\..*--anyway"):
        rebuild._packages(tmp_path, result, anyway=False)
    rebuild._packages(tmp_path, result, anyway=True)
    assert result.notes[0].startswith("1 package of another version: numpy 0.")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_version_alone_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """The project is gone but for MLflow's store: data, plan, networks, params.yaml and all."""
    shutil.copyfile(REPO_ROOT / "params.yaml", tmp_path / "params.yaml")
    overrides = [word for one in TINY for word in ("-o", one)]

    def retort(*words: str) -> str:
        command = [sys.executable, "-m", "pipelines.cli", *words]
        own = {**os.environ, "PYTHONPATH": str(REPO_ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    for step in STEPS:
        retort(*overrides, *step.split())
    assert "not signed" in retort("verify")
    for name in ("data", "outputs", "params.yaml"):
        remove(tmp_path / name)
    for path in (tmp_path / ".retort").iterdir():
        if path.name != "mlflow":
            remove(path)
    printed = retort("-o", "registry.name=retort-digits", "rebuild", "1")
    same = [line.split()[2] for line in printed.splitlines() if line.startswith("the same: ")]
    assert same == [
        "outputs/weights/student.safetensors", "outputs/weights/teacher.safetensors",
        "outputs/teacher/model.safetensors", "outputs/student/model.safetensors", "outputs/export/model.onnx",
    ]  # fmt: skip
    assert "bit for bit" in printed

"""``retort shadow``: 10,000 recorded requests through the embedded student and another like it."""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
from onnx import numpy_helper
from PIL import Image
from sklearn.datasets import load_digits

from tests.benchmarks.measure import Row, at_most, run

REPO_ROOT = Path(__file__).resolve().parents[2]
REQUESTS = 10_000
NOISE = 0.02  # of each tensor's spread, by which the challenger's weights differ


def measure(_: int) -> list[Row]:
    """From a folder of small files, and from Parquet with camera pictures (nothing is asked of those)."""
    with tempfile.TemporaryDirectory(prefix="retort-bench-") as name:
        folder = Path(name)
        champion = _student(folder)
        challenger = _changed(champion, folder / "challenger")
        shutil.copy(REPO_ROOT / "params.yaml", folder)
        _small(folder / "small")
        _large(folder / "large.parquet")
        rows = []
        for requests, what, limit in (
            ("small", "digits of 64 pixels, PNG files", 60.0),
            ("large.parquet", "pictures of 640 x 480, JPEG in Parquet", None),
        ):
            done = run(
                [
                    sys.executable, "-m", "pipelines.cli", "shadow", requests,
                    "--champion", os.fspath(champion), "--challenger", os.fspath(challenger),
                ],
                folder,
                {**os.environ, "PYTHONPATH": os.fspath(REPO_ROOT)},
            )  # fmt: skip
            if done.status:
                raise SystemExit(done.output)
            found = json.loads((folder / "outputs/shadow/metrics.json").read_text())
            note = f"{what}; {found['changed']} of {found['requests']:,} changed"
            label = f"shadow, {REQUESTS:,} requests"
            rows.append(
                at_most(label, done.seconds, limit, "s", note)
                if limit
                else Row(label, done.seconds, "s", note=note)
            )
            rows.append(Row("  peak memory", done.peak_bytes / 2**30, "GiB"))
        return rows


def _student(folder: Path) -> Path:
    """The exported student of this checkout, or of a clone that makes it."""
    exported = REPO_ROOT / "outputs/export"
    if not (exported / "model.onnx").exists():
        clone = folder / "clone"
        subprocess.run(["git", "clone", "--quiet", os.fspath(REPO_ROOT), os.fspath(clone)], check=True)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = run(
            ["dvc", "repro", "export"], clone, {**os.environ, "PATH": path, "PYTHONPATH": os.fspath(clone)}
        )
        if done.status:
            raise SystemExit(done.output)
        exported = clone / "outputs/export"
    return exported


def _changed(champion: Path, folder: Path) -> Path:
    """The same network with other weights."""
    folder.mkdir()
    model = onnx.load(champion / "model.onnx")
    random = np.random.default_rng(1)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1:
            values = numpy_helper.to_array(tensor)
            noise = random.normal(0, NOISE * values.std(), values.shape)
            tensor.CopyFrom(numpy_helper.from_array((values + noise).astype(np.float32), tensor.name))
    onnx.save(model, folder / "model.onnx")
    shutil.copy(champion / "model.json", folder)
    return folder


@functools.cache
def _digits() -> np.ndarray:
    return load_digits().images


def _digit(number: int) -> Image.Image:
    digits = _digits()
    moved = np.roll(digits[number % len(digits)], number // len(digits) % 3 - 1, axis=1)
    return Image.fromarray((moved / 16 * 255).astype(np.uint8)).convert("RGB")


def _small(folder: Path) -> None:
    folder.mkdir()
    for number in range(REQUESTS):
        _digit(number).resize((64, 64)).save(folder / f"{number:05d}.png")


def _large(place: Path) -> None:
    contents = []
    for number in range(REQUESTS):
        buffer = io.BytesIO()
        _digit(number).resize((640, 480)).save(buffer, "JPEG")
        contents.append(buffer.getvalue())
    pq.write_table(pa.table({"bytes": contents}), place, row_group_size=2000)

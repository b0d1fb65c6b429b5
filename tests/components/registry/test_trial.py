"""The trial: bundles that a server could not use stay unpromoted; nothing but the requirements is there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from components.common.params import Registry
from components.export import exported as exports
from components.registry import trial
from components.registry.bundle import REQUIREMENTS
from components.tracking.client import connect, tracking_uri

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def bundle(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle as ``register`` saves it, without a registry around it."""
    import mlflow.onnx

    folder = tmp_path_factory.mktemp("saved") / "bundle"
    model = onnx.load(prepared / "export/model.onnx")
    mlflow.onnx.save_model(
        model, str(folder), pip_requirements=list(REQUIREMENTS), save_as_external_data=False
    )
    return folder


def attempt(bundle: Path, prepared: Path, p50_ms: float | None = 1.0) -> trial.Trial:
    model = exports.read(prepared / "export/model.onnx")
    rows = exports.rows(prepared / "clean.parquet", "val").spread(8)
    _, squares = next(rows.images(str(prepared / "images")).squares(model.size, 8))
    return trial.attempt(bundle, model, squares, prepared / "export/parity.json", p50_ms)


def test_a_bundle_that_can_be_served_passes(bundle: Path, prepared: Path) -> None:
    passed = attempt(bundle, prepared)
    assert not passed.failure
    assert passed.said["p50_ms"] > 0
    assert {"a flat image", "an image of text"} <= set(passed.said["refused"])
    late = attempt(bundle, prepared, p50_ms=-1000.0)
    assert "the benchmark's p50 is" in late.failure


@pytest.mark.parametrize(
    ("spoil", "said"),
    [("cut", "does not load"), ("weights", "other answers than were proved"), ("package", "not among the")],
)
def test_a_bundle_that_a_server_could_not_use_fails(
    spoil: str, said: str, bundle: Path, prepared: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    file = folder / "model.onnx"
    if spoil == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif spoil == "weights":
        model = onnx.load(file)
        weight = model.graph.initializer[0]
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.1), weight.name))
        onnx.save(model, file)
    else:  # it needs a package that its requirements do not name, and that is installed here
        described = (folder / "MLmodel").read_text()
        (folder / "MLmodel").write_text(
            described.replace("loader_module: mlflow.onnx", "loader_module: torch")
        )
    assert said in attempt(folder, prepared).failure


def test_nothing_of_this_package_is_there() -> None:
    """Not even where it is installed in a way that ``-I`` does not turn off."""
    code = f"""
import sys
sys.path[:0] = [{str(trial.SCRIPT.parent)!r}, {str(ROOT)!r}]
import try_bundle
sys.meta_path.insert(0, try_bundle.Only({list(REQUIREMENTS)!r}))
import mlflow, numpy, onnxruntime
for name in ("components", "torch", "pipelines"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(name + " could be imported")
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_fails_its_trial_is_no_champion(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its requirements forget what loads it; the first version would be champion else."""
    monkeypatch.setattr("components.registry.bundle.REQUIREMENTS", ("numpy",))
    registered = project.register(project.params(trial=True))
    assert (registered["alias"], registered["champion"]) == ("challenger", None)
    assert registered["reason"].startswith("its trial failed: it does not load or answer")
    finding = project.findings()["registry.trial"][0]
    assert finding["level"] == "warning"
    assert "not among the bundle's requirements" in finding["message"]
    uri = tracking_uri(Registry(tracking_uri="sqlite:///.retort/mlflow/mlflow.db"))
    assert set(connect(uri).get_registered_model("digits").aliases) == {"challenger"}

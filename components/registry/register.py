"""The step ``register``: the exported student becomes a version of the registered model in MLflow."""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.common.errors import RetortError
from components.common.findings import read_report
from components.common.progress import at, track
from components.common.storage import need, read_json, write_json
from components.export import exported as exports
from components.models.card import ModelCard, names_finding, read_card
from components.registry import report
from components.registry.actor import actor
from components.registry.compare import FIRST, MIN_IMAGES, Comparison, compare, reason, verdict
from components.registry.notify import notify
from components.registry.params import RegisterParams
from components.registry.versions import CHALLENGER, CHAMPION, OvertakenError, Versions, opened
from components.step import StepContext, name_of, step

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
REQUIREMENTS = ("mlflow", "numpy", "onnx", "onnxruntime")  # what loading and predicting needs
PROOFS = "extra_files"  # where MLflow keeps files that belong to a model
METRICS = "metrics.json"  # among the proofs: what the next challenger is compared with
CARD, CHECKPOINT = "card.json", "model.safetensors"  # too: what a later network may start from
MANIFEST = "manifest.parquet"  # too: the images that it was made from, by path, class, split and sha256
DECIDED = "decided"  # tag of a version whose alias was settled when it was registered
REASON = "decided.reason"  # and why
BATCH = 64


def register(
    params: RegisterParams,
    *,
    manifest: Path,
    student: Path,
    exported: Path,
    benchmark: Path,
    check: Path,
    plan: Path,
    out: Path,
) -> None:
    """Register ``model.onnx`` with its proofs; champion if there is none or it is better, else challenger.

    Writes ``registered.json``: version, alias and why, and which version is champion now. The same
    ``model.onnx`` a second time is the version it was the first time.

    Args:
        student, exported, benchmark, check: the folders of those steps.
        plan: the file that the audits wrote.

    Raises:
        FindingsError: when the files do not belong together.
        RetortError: when a file is missing, or the tracker does not answer: this step needs it.
    """
    read = _Read(manifest, student, exported, benchmark, check, plan)
    with step("register", params, out, list(read.makers())) as run:
        for path, maker in read.makers().items():
            need(path, maker)
            if path.suffix == ".json":
                read_json(path)  # some are only copied: a cut file would become a part of the version
        _check_names(run, read)
        run.stop_on_errors()
        _check_proofs(run, read)
        run.stop_on_errors()
        at("opening the registry in MLflow")
        with opened(params.registry, "register") as versions, tempfile.TemporaryDirectory() as scratch:
            _Registration(run, params, versions, read, Path(scratch)).carry_out()


@dataclass(frozen=True)
class _Read:
    """What is registered, and what proves it: the clean manifest, the folders of steps, and the plan."""

    manifest: Path
    student: Path
    exported: Path
    benchmark: Path
    check: Path
    plan: Path

    @property
    def card(self) -> Path:
        return self.student / "model.json"

    @property
    def model(self) -> Path:
        return self.exported / "model.onnx"

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
        return {self.model: "export", **proofs, self.manifest: "validate"}


def _check_names(run: StepContext, read: _Read) -> None:
    """The names that the model is served with are those of the data that it is judged on."""
    card = read_card(read.card, changed=True)
    advice = exports.way_out(card, read.manifest, "student")
    data = exports.class_names(read.manifest)
    run.add_finding(**names_finding(card.class_names, data, "student", name_of(read.card), advice))


def _check_proofs(run: StepContext, read: _Read) -> None:
    """The exported file must come from this student, and both must have passed their checks."""
    wrong = []
    onnx = exports.read(read.model)
    if onnx.sha256 != run.sha256(read.student / "model.safetensors"):
        wrong.append(("model.onnx", "was exported from another checkpoint than the student's", "export"))
    wrong += [("model.onnx", said, "export") for said in _unlike(onnx, read.card)]
    proved = read_json(read.exported / "parity.json").get("files", {}).get("model.onnx", {})
    if proved.get("sha256") != run.sha256(read.model):
        wrong.append(("parity.json", "is the proof of another model.onnx", "export"))
    for name, folder in (("export", read.exported), ("check", read.check)):
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


@dataclass
class _Registration:
    """One registration: what it reads, and who it is compared with."""

    run: StepContext
    params: RegisterParams
    versions: Versions
    read: _Read
    scratch: Path
    card: ModelCard = field(init=False)
    metrics: dict[str, Any] = field(init=False)
    champion: ModelVersion | None = None  # the one that was champion before
    comparison: Comparison | None = None
    reason: str = ""  # of its alias

    def __post_init__(self) -> None:
        self.card = read_card(self.read.card)
        self.metrics = read_json(self.read.student / "metrics.json")
        self.sha256 = self.run.sha256(self.read.model)
        self.model = exports.read(self.read.model)
        self.rows = exports.rows(self.read.manifest, "val")

    def carry_out(self) -> None:
        self.versions.make()
        at("saving the model with its proofs in MLflow")
        version = self.versions.of_content(self.sha256) or self._log()
        at("comparing with the champion")
        alias = self._settle(version)
        holder = self.versions.holder(CHAMPION)
        said = verdict(int(version.version), alias, int(holder.version) if holder else None, self.reason)
        log.info(f"register: {self.versions.name} {said}")
        registered = self._write(version, alias, holder)
        page, top1 = self.run.page, self.metrics["val"]["top1"]
        report.show_version(page, registered, self.card.arch.name, top1)
        if self.comparison is not None and self.champion is not None:
            report.show_comparison(page, self.comparison, int(self.champion.version), len(self.rows))

    # --- the model in MLflow's format ---

    def _log(self) -> ModelVersion:
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
        client.log_model_artifacts(logged.model_id, str(folder))
        client.finalize_logged_model(logged.model_id, "READY")
        for run in (run_id, identity["parent_run_id"]):  # both rows of the UI's table show the model
            client.log_outputs(run, [LoggedModelOutput(logged.model_id, step=0)])
        return self.versions.add(
            source=f"models:/{logged.model_id}",
            run_id=run_id,
            tags=facts,
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
            return next(self.rows.spread(1).images(self.params.data.root).squares(size, 1))[1]
        noise = np.random.default_rng(self.params.general.seed)
        return noise.integers(0, 256, (1, size, size, 3), dtype=np.uint8)

    def _proofs(self) -> list[Path]:
        """Copies of the proofs under names of their own, and the sha256 of all that was read."""
        folder = self.scratch / "proofs"
        folder.mkdir()
        for name, path in self.read.proofs().items():
            shutil.copyfile(path, folder / name)
        write_json(folder / "inputs.json", self.run.report.inputs)
        return sorted(folder.iterdir())

    # --- champion or challenger ---

    def _settle(self, version: ModelVersion) -> str:
        """Give the version its alias, once, and return it (empty: it has lost it since)."""
        number = int(version.version)
        versions = self.versions
        champion = versions.holder(CHAMPION)
        if version.tags.get(DECIDED):
            alias = self._alias_of(number)
            self.reason = version.tags.get(REASON, "")
            if alias != version.tags[DECIDED]:
                self.reason = "decided by a promotion since it was registered"
            self.run.add_finding(
                "registry.known", "info", f"version {number}",
                f"this model.onnx is version {number} of '{versions.name}' already, "
                + (f"its {alias}" if alias else "and neither champion nor challenger any more"),
            )  # fmt: skip
            return alias
        alias = self._compete(number, champion)
        versions.client.set_model_version_tag(versions.name, str(number), REASON, self.reason)
        versions.client.set_model_version_tag(versions.name, str(number), DECIDED, alias)
        return alias

    def _compete(self, number: int, champion: ModelVersion | None) -> str:
        """Compare with the champion, and again with who takes its place meanwhile; returns the alias."""
        findings = self.run.report.findings
        before = len(findings)
        while True:
            self.champion = champion if champion is not None and int(champion.version) != number else None
            self.comparison = self._compare(self.champion) if self.champion is not None else None
            if self.champion is None:
                self.reason = FIRST
            elif self.comparison is None or not self.comparison.better:
                self.versions.set_challenger(number)
                return CHALLENGER
            expected = int(champion.version) if champion is not None else None
            try:
                record = self.versions.set_champion(
                    number, "register", expected=expected, who=actor(), why=self.reason
                )
            except OvertakenError:
                champion = self.versions.holder(CHAMPION)
                del findings[before:]  # they were about a champion that is none any more
                continue
            failed = notify(self.params.registry, record)
            if failed:
                self.run.add_finding(
                    "registry.notify", "warning", f"version {number}", f"{failed}; the promotion stands"
                )
            return CHAMPION

    def _alias_of(self, number: int) -> str:
        for alias in (CHAMPION, CHALLENGER):
            holder = self.versions.holder(alias)
            if holder is not None and int(holder.version) == number:
                return alias
        return ""

    def _compare(self, champion: ModelVersion) -> Comparison | None:
        """Compare on this validation split; None when that is not possible, which is said."""
        subject = f"champion, version {champion.version}"
        recalls = self._recalls_of(champion, subject)
        if recalls is None:
            self.reason = f"version {champion.version} could not be measured"
            self.run.add_finding(
                "registry.better", "warning", subject,
                "it has no model.onnx of ours that could be measured, so the new version stays challenger",
                advice="'retort promote VERSION' makes it champion.",
            )  # fmt: skip
            return None
        labels, counts = np.unique(self.rows.labels, return_counts=True)
        names = self.card.class_names
        images = dict(zip((names[label] for label in labels.tolist()), counts.tolist(), strict=True))
        registry = self.params.registry
        own = self.metrics["val"]["per_class"]
        comparison = compare(recalls, own, images, registry.tolerance, registry.class_tolerance)
        self._judge(comparison, subject)
        return comparison

    def _recalls_of(self, champion: ModelVersion, subject: str) -> dict[str, float] | None:
        """The champion's recall by class on this validation split, noted or measured now."""
        if champion.tags.get("data.fingerprint") == self.card.data_fingerprint:
            noted = self.versions.download(champion, f"{PROOFS}/{METRICS}", self.scratch)
            if noted is not None:
                return read_json(noted)["val"]["per_class"]
        path = self.versions.download(champion, "model.onnx", self.scratch)
        if path is None:
            return None
        self.run.add_finding(
            "registry.data", "info", subject,
            "it was registered with other data: its recall is measured now, on this validation split",
        )  # fmt: skip
        return self._measure(path)

    def _measure(self, path: Path) -> dict[str, float]:
        """Recall by class name of an exported model on this validation split, for the classes it knows."""
        opened_model = exports.session(path)
        model = exports.describe(opened_model, path)
        batches = self.rows.images(self.params.data.root).squares(model.size, BATCH)
        said: list[str] = []
        for _, pixels in track(batches, "champion on this data", -(-len(self.rows) // BATCH)):
            scores = exports.run(opened_model, model.feed(pixels))
            said += [model.class_names[index] for index in scores.argmax(axis=1).tolist()]
        names = np.array([self.card.class_names[label] for label in self.rows.labels.tolist()])
        right = names == np.array(said)
        known = sorted(set(names.tolist()).intersection(model.class_names))
        return {name: float(right[names == name].mean()) for name in known}

    def _judge(self, comparison: Comparison, subject: str) -> None:
        registry = self.params.registry
        self.reason = reason(comparison)
        lower = not comparison.in_common or not comparison.as_accurate
        if comparison.better or comparison.equal or lower:
            stays = "becomes champion" if comparison.better else "stays challenger"
            self.run.add_finding(
                "registry.better", "warning" if lower else "info", subject,
                f"the new version {stays}, {self.reason}",
                measured=comparison.challenger, limit=comparison.champion - registry.tolerance,
                advice="" if comparison.better else
                "See the table of classes; 'retort promote VERSION' makes it champion all the same.",
            )  # fmt: skip
        if comparison.worse:
            worst = comparison.worse[0]
            others = len(comparison.worse) - 1
            more = f", and {others} more classes" if others else ""
            now = "unknown to it" if worst.challenger is None else f"{worst.challenger:.1%}"
            self.run.add_finding(
                "registry.class", "warning", f"class '{worst.name}'{more}",
                f"the new version stays challenger: recall of '{worst.name}' is {now}, the champion's "
                f"{worst.champion:.1%}; {registry.class_tolerance:.1%} lower is allowed",
                measured=worst.challenger, limit=(worst.champion or 0.0) - registry.class_tolerance,
                advice="Look at that class's training images and at what the plan gives it.",
            )  # fmt: skip
        few = [row.name for row in comparison.rows if row.champion is not None and row.images < MIN_IMAGES]
        if few:
            named = ", ".join(f"'{name}'" for name in few[:5]) + (", ..." if len(few) > 5 else "")
            self.run.add_finding(
                "registry.class", "info", f"{len(few)} classes",
                f"not judged one by one, with fewer than {MIN_IMAGES} validation images: {named}",
                measured=len(few),
            )  # fmt: skip

    # --- what is left behind ---

    def _write(self, version: ModelVersion, alias: str, champion: ModelVersion | None) -> dict[str, Any]:
        """Write ``registered.json``; returns what it holds."""
        identity = self.run.tracker.identity()
        registered = {
            "schema_version": SCHEMA_VERSION,
            "name": self.versions.name,
            "version": int(version.version),
            "alias": alias,
            "reason": self.reason,
            "champion": int(champion.version) if champion else None,
            "model_uri": f"models:/{self.versions.name}/{version.version}",
            "sha256": self.sha256,
            "checkpoint_sha256": self.card.sha256,
            "data_fingerprint": self.card.data_fingerprint,
            "compared_with": int(self.champion.version) if self.champion else None,
            "run_id": version.run_id,
            "parent_run_id": identity["parent_run_id"],
        }
        write_json(self.run.product(self.run.out / "registered.json"), registered)
        self.run.tracker.tags(
            {"registered": f"{self.versions.name} version {version.version}", "alias": alias}
        )
        self.run.tracker.summary({"version": float(version.version)})
        return registered

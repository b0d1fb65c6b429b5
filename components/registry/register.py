"""The step ``register``: the exported student becomes a version of the registered model in MLflow.

It is compared with the champion on the same images, now, and tried before it can take its place:
``docs/registry.md``.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.errors import RetortError
from components.common.progress import at
from components.common.storage import need, read_json, write_json
from components.dataset import manifest as manifests
from components.export import exported as exports
from components.provenance.bundle import need_signed
from components.registry import findings, report
from components.registry.actor import actor
from components.registry.bundle import Bundle
from components.registry.decision import FIRST, Decision, Limits, decide, verdict
from components.registry.files import MANIFEST, PROOFS, Files, check_names, check_proofs
from components.registry.notify import notify
from components.registry.params import RegisterParams
from components.registry.scores import Compared, choose, compare
from components.registry.trial import IMAGES, Trial, attempt
from components.registry.versions import CHALLENGER, CHAMPION, OvertakenError, Versions, opened
from components.step import StepContext, step

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
DECIDED = "decided"  # tag of a version whose alias was settled when it was registered
REASON = "decided.reason"  # and why


def register(
    params: RegisterParams,
    *,
    manifest: Path,
    student: Path,
    exported: Path,
    benchmark: Path,
    check: Path,
    plan: Path,
    samples: Path,
    out: Path,
) -> None:
    """Register ``model.onnx`` with its proofs; champion if there is none or it is better, else challenger.

    Writes ``registered.json``: version, alias and why, and which version is champion now; and, where there
    was a champion to compare with, ``outcomes.parquet``: what both said of each image. The same
    ``model.onnx`` a second time is the version it was the first time.

    Args:
        student, exported, benchmark, check: the folders of those steps.
        plan: the file that the audits wrote.
        samples: the file in which the audit lists suspect labels.

    Raises:
        FindingsError: when the files do not belong together.
        RetortError: when a file is missing, or the tracker does not answer: this step needs it.
    """
    files = Files(manifest, student, exported, benchmark, check, plan, samples)
    with step("register", params, out, list(files.makers())) as run:
        for path, maker in files.makers().items():
            need(path, maker)
            if path.suffix == ".json":
                read_json(path)  # some are only copied: a cut file would become a part of the version
        check_names(run, files)
        run.stop_on_errors()
        check_proofs(run, files)
        run.stop_on_errors()
        manifests.record_use(run.tracker, "clean", manifest, "val")
        at("opening the registry in MLflow")
        with opened(params.registry, "register") as versions, tempfile.TemporaryDirectory() as scratch:
            _Registration(run, params, versions, files, Path(scratch)).carry_out()


@dataclass
class _Registration:
    """One registration: what it reads, and who it is compared with."""

    run: StepContext
    params: RegisterParams
    versions: Versions
    files: Files
    scratch: Path
    champion: ModelVersion | None = None  # the one that was champion before
    compared: Compared | None = None
    decision: Decision | None = None
    reason: str = ""  # of its alias

    def __post_init__(self) -> None:
        self.bundle = Bundle(self.run, self.params, self.versions, self.files, self.scratch)

    def carry_out(self) -> None:
        self.versions.make()
        at("saving the model with its proofs in MLflow")
        version = self.versions.of_content(self.bundle.sha256)
        if version is not None:
            need_signed(f"version {version.version}", version.tags, self.params.registry)
        version = version or self._save()
        alias = self._settle(version)
        holder = self.versions.holder(CHAMPION)
        said = verdict(int(version.version), alias, int(holder.version) if holder else None, self.reason)
        log.info(f"register: {self.versions.name} {said}")
        registered = self._write(version, alias, holder)
        page, top1 = self.run.page, self.bundle.metrics["val"]["top1"]
        report.show_version(page, registered, self.bundle.card.arch.name, top1)
        if self.compared is not None and self.decision is not None and self.champion is not None:
            number, root = int(self.champion.version), self.params.data.root
            report.show_decision(page, self.decision, self.compared, number)
            report.show_worse(page, self.compared.table, root, self.params.report.thumbnails)

    def _save(self) -> ModelVersion:
        """A new version; where another run saved the same file meanwhile, that one's, which is older."""
        saved = self.bundle.save()
        oldest = self.versions.of_content(self.bundle.sha256) or saved
        if int(oldest.version) != int(saved.version):
            self.versions.client.delete_model_version(self.versions.name, saved.version)
        return oldest

    # --- champion or challenger ---

    def _settle(self, version: ModelVersion) -> str:
        """Give the version its alias, once, and return it (empty: it has lost it since)."""
        number = int(version.version)
        versions = self.versions
        if version.tags.get(DECIDED):
            return self._known(version)
        alias = self._compete(number, self._try(version))
        versions.client.set_model_version_tag(versions.name, str(number), REASON, self.reason)
        versions.client.set_model_version_tag(versions.name, str(number), DECIDED, alias)
        return alias

    def _compete(self, number: int, trial: Trial) -> str:
        """Compare with the champion, and again with who takes its place meanwhile; returns the alias."""
        said = self.run.report.findings
        before = len(said)
        while True:
            champion = self.versions.holder(CHAMPION)
            present = int(champion.version) if champion else None
            self.champion = champion if present != number else None
            self.compared = self.decision = None
            promoted, self.reason = True, FIRST
            if self.champion is not None:
                promoted = self._compare(self.champion)
                if self.compared is None and self._champion() != present:
                    del said[before:]  # it could not be measured because it was deleted under us
                    continue
            if trial.failure:
                promoted, self.reason = False, f"its trial failed: {trial.failure}"
            if not promoted:
                self.versions.set_challenger(number)
                return CHALLENGER
            try:
                record = self.versions.set_champion(
                    number, "register", expected=present, who=actor(), why=self.reason
                )
            except OvertakenError:
                del said[before:]  # they were about a champion that is none any more
                continue
            if not record.get("known") and (failed := notify(self.params.registry, record)):
                self.run.add_finding(
                    "registry.notify", "warning", f"version {number}", f"{failed}; the promotion stands"
                )
            return CHAMPION

    def _known(self, version: ModelVersion) -> str:
        """What a version is that was settled before."""
        number = int(version.version)
        alias = self._alias_of(number)
        self.reason = version.tags.get(REASON, "")
        if alias != version.tags[DECIDED]:
            self.reason = "decided by a promotion since it was registered"
        self.run.add_finding(
            "registry.known", "info", f"version {number}",
            f"this model.onnx is version {number} of '{self.versions.name}' already, "
            + (f"its {alias}" if alias else "and neither champion nor challenger any more"),
        )  # fmt: skip
        return alias

    def _champion(self) -> int | None:
        holder = self.versions.holder(CHAMPION)
        return int(holder.version) if holder else None

    def _alias_of(self, number: int) -> str:
        for alias in (CHAMPION, CHALLENGER):
            holder = self.versions.holder(alias)
            if holder is not None and int(holder.version) == number:
                return alias
        return ""

    def _try(self, version: ModelVersion) -> Trial:
        """Try the version's bundle, as the registry gives it."""
        if not self.params.registry.trial:
            return Trial("", {})
        at("trying the registered bundle in a clean process")
        folder = self.scratch / "trial"
        folder.mkdir()
        bundle = self.versions.download(version, "", folder)
        if bundle is None:
            trial = Trial("the registry does not give it back", {})
        else:
            rows = exports.rows(self.files.manifest, "val").spread(IMAGES)
            _, squares = next(rows.images(self.params.data.root).squares(self.bundle.model.size, IMAGES))
            p50 = self.files.p50_ms()
            trial = attempt(bundle, self.bundle.model, squares, self.files.exported / "parity.json", p50)
        findings.say_trial(self.run, int(version.version), trial)
        return trial

    def _compare(self, champion: ModelVersion) -> bool:
        """Whether this version is to take the champion's place; how that was decided is said."""
        at("comparing with the champion")
        folder = self.scratch / "champion"
        folder.mkdir(exist_ok=True)
        theirs = self.versions.download(champion, "model.onnx", folder)
        kept = self.versions.download(champion, f"{PROOFS}/{MANIFEST}", folder)
        chosen = choose(self.files.manifest, self.files.samples, kept)
        try:
            if theirs is None:
                raise RetortError("the registry gives no model.onnx of it")
            self.compared = compare(
                theirs, self.files.model, chosen, self.params.data.root, self.files.budget()
            )
        except RetortError as error:
            self.reason = f"version {champion.version} could not be measured"
            findings.say_unmeasured(self.run, int(champion.version), error)
            return False
        registry = self.params.registry
        limits = Limits(
            registry.tolerance, registry.class_tolerance, registry.equal_within, registry.latency_tolerance
        )
        seed = self.params.general.seed
        self.decision = decide(self.compared.outcomes, limits, self.compared.facts, seed)
        self.reason = self.decision.reason
        findings.say_images(self.run, int(champion.version), chosen)
        findings.say_decision(self.run, int(champion.version), self.decision)
        return self.decision.promoted

    # --- what is left behind ---

    def _write(self, version: ModelVersion, alias: str, champion: ModelVersion | None) -> dict[str, Any]:
        """Write ``registered.json`` and ``outcomes.parquet``; returns what the first holds."""
        identity = self.run.tracker.identity()
        registered = {
            "schema_version": SCHEMA_VERSION,
            "name": self.versions.name,
            "version": int(version.version),
            "alias": alias,
            "reason": self.reason,
            "champion": int(champion.version) if champion else None,
            "model_uri": f"models:/{self.versions.name}/{version.version}",
            "sha256": self.bundle.sha256,
            "checkpoint_sha256": self.bundle.card.sha256,
            "data_fingerprint": self.bundle.card.data_fingerprint,
            "compared_with": int(self.champion.version) if self.champion else None,
            "run_id": version.run_id,
            "parent_run_id": identity["parent_run_id"],
        }
        write_json(self.run.product(self.run.out / "registered.json"), registered)
        if self.compared is not None:
            report.write_outcomes(self.run.product(self.run.out / "outcomes.parquet"), self.compared.table)
        if self.decision is not None:
            write_json(self.run.product(self.run.out / "decision.json"), report.summary(self.decision))
        self.run.tracker.tags(
            {"registered": f"{self.versions.name} version {version.version}", "alias": alias}, above=True
        )
        self.run.tracker.summary({"version": float(version.version)})
        return registered

"""The step ``retrain choose``: of what was trained, the better network by validation goes on."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.audit.plan_schema import read_plan
from components.common.params import StepParams
from components.common.storage import need, read_json, sha256_file, write_json
from components.dataset import manifest as manifests
from components.models import checkpoint
from components.models.card import read_card
from components.retraining.update import CLEAN
from components.step import StepContext, step
from components.tools.expand.classes import relabel
from components.training import gate

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
NETWORK = (checkpoint.FILE, checkpoint.CARD, "metrics.json", "history.csv", "confusion.csv")
WAYS = {"updated": "the champion that learnt on", "distilled": "the student from its start weights"}


def choose(
    params: StepParams,
    *,
    manifest: Path,
    plan: Path,
    updated: Path,
    distilled: Path | None,
    passed: Path | None,
    clean: Path,
    out: Path,
) -> None:
    """Copy the better network, with the manifest, the plan and the gate that belong to it.

    The better one has the higher mean of top-1 and macro recall on the validation split, as where student and
    control are compared; the champion that learnt on goes first where they are equal.

    Args:
        manifest: the clean manifest.
        plan: ``plan.json`` of the audits.
        updated: folder of the step ``retrain update``.
        distilled: folder of ``distill``; None: nothing was trained beside the champion. What is not of this
            manifest has no part in it.
        passed: folder of the gate that it passed.
        clean: where the manifest with the network's own labels is put.

    Raises:
        RetortError: when there is no network of this manifest.
    """
    folders = [updated, *filter(None, [distilled])]
    inputs = [manifest, plan, *(folder / name for folder in folders for name in NETWORK[:3])]
    inputs += [passed / gate.FILE] if passed else []
    with step("retrain-choose", params, out, inputs, products=[clean]) as run:
        there = candidates(need(manifest, "validate"), updated, distilled)
        if not there:
            need(updated / checkpoint.FILE, "retrain update")
        best = max(there, key=lambda each: each.score)
        _say(run, there, best)
        for name in NETWORK:
            if (best.folder / name).exists():
                shutil.copyfile(best.folder / name, run.product(out / name))
        own = updated / CLEAN if best.name == "updated" else manifest
        shutil.copyfile(own, run.product(clean))
        _write_plan(run, manifest, plan, own, out)
        if best.name == "distilled" and passed:
            shutil.copyfile(need(passed / gate.FILE, "check"), run.product(out / gate.FILE))
        else:
            _write_gate(run, best, [manifest, plan], out)


@dataclass(frozen=True)
class Candidate:
    """A trained network: ``score`` is the mean of top-1 and macro recall on the validation split, 0..1."""

    name: str
    folder: Path
    metrics: dict[str, Any]

    @property
    def score(self) -> float:
        return float(self.metrics["val"]["top1"] + self.metrics["val"]["macro_recall"]) / 2


def candidates(manifest: Path, updated: Path, distilled: Path | None) -> list[Candidate]:
    """The networks that were trained on the data of ``manifest``, the champion's successor first."""
    data = {"updated": updated / CLEAN, "distilled": manifest}
    found = []
    for name, folder in (("updated", updated), ("distilled", distilled)):
        if folder is None:
            continue
        card = folder / checkpoint.CARD
        if card.exists() and read_card(card).data_fingerprint == manifests.fingerprint(data[name]):
            found.append(Candidate(name, folder, read_json(folder / "metrics.json")))
    return found


def _say(run: StepContext, there: list[Candidate], best: Candidate) -> None:
    numbers = ", ".join(
        f"{WAYS[each.name]}: {each.metrics['val']['top1']:.2%} top-1, "
        f"{each.metrics['val']['macro_recall']:.2%} macro recall"
        for each in there
    )
    beside = "" if len(there) > 1 else "; nothing was trained beside it"
    run.add_finding(
        "retrain.chosen", "info", best.name,
        f"{WAYS[best.name][0].upper()}{WAYS[best.name][1:]} goes on{beside} (validation: {numbers}).",
        measured=round(best.score, 6),
    )  # fmt: skip
    keys = [(split, key) for split in ("val", "test") for key in ("top1", "macro_recall")]
    rows = [[WAYS[each.name], *(each.metrics[split].get(key) for split, key in keys)] for each in there]
    run.page.table(
        "What was trained",
        ["network", "top-1", "macro recall", "top-1, test", "macro recall, test"],
        rows,
        note="The test split has no part in the choice.",
    )
    run.tracker.tags({"chosen": best.name})
    run.tracker.summary({f"{each.name}_score": each.score for each in there})
    log.info(f"{run.name}: {WAYS[best.name]} goes on ({numbers})")


def _write_plan(run: StepContext, manifest: Path, plan: Path, own: Path, out: Path) -> None:
    """The plan by the network's labels, and of its manifest."""
    names = {name: label for label, name in _names(own).items()}
    labels = {label: names[name] for label, name in _names(manifest).items() if name in names}
    made = relabel(read_plan(plan, run.sha256(manifest)), labels)
    made.model_copy(update={"manifest": sha256_file(own)}).write(run.product(out / "plan.json"))


def _names(manifest: Path) -> dict[int, str]:
    return manifests.names_by_label(manifests.read(manifest, ["label", "class_name"]))


def _write_gate(run: StepContext, best: Candidate, files: list[Path], out: Path) -> None:
    """What a network without a teacher passed: no gate stood before it, so this says what it was made of."""
    card = read_card(best.folder / checkpoint.CARD)
    content = {
        "inputs": {name: run.report.inputs[name] for name in sorted(run.report.inputs)},
        "found": {},
        "judged": {
            "start": card.lineage[-1].sha256, "teacher": None,
            **{f"val.{key}": best.metrics["val"][key] for key in ("top1", "macro_recall")},
        },
    }  # fmt: skip
    write_json(run.product(out / gate.FILE), {"schema_version": SCHEMA_VERSION, **content})

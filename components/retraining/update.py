"""The step ``retrain update``: the champion learns on, with old and new images; its head may grow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from components.audit.plan_schema import Plan
from components.common.storage import need, remove, state_dir
from components.dataset import manifest as manifests
from components.models import checkpoint
from components.models.card import Lineage, ModelCard, read_card
from components.retraining.decision import FILE, read_decision
from components.retraining.params import UpdateParams
from components.step import step
from components.tools.expand.classes import Classes, relabel, remap
from components.tools.expand.expand import expand
from components.training import driver, preflight
from components.training.metrics import evaluate
from components.training.report import write_network
from components.training.spec import Phase, TrainSpec

CLEAN = "clean.parquet"  # the manifest with the network's labels: the champion's classes keep their order


def update(
    params: UpdateParams, *, manifest: Path, plan: Path, decided: Path, champion: Path, out: Path
) -> None:
    """Train the champion on; writes it like a trained network, and ``clean.parquet`` with its labels.

    Where there is no champion that could, the folder holds its report alone.

    Args:
        manifest: the clean manifest.
        plan: ``plan.json`` of the audits.
        decided: folder of the step ``retrain decide``.
        champion: the champion's network, as that step has fetched it.

    Raises:
        FindingsError: preflight.shm, train.finite or train.learns; model.class_names.
        RetortError: a file, the plan, Ray or a worker is at fault.
    """
    decision = read_decision(decided, "retrain decide")
    way = decision.way
    if way == "expand":
        expand(params, manifest=manifest, plan=plan, model=champion, out=out, of="student")
        return
    weights = champion / checkpoint.FILE
    with step("retrain-update", params, out, [manifest, plan, decided / FILE, weights]) as run:
        if way == "original":
            run.add_finding(
                "retrain.start", "info", "the champion", "Nothing learns on: all begins with start weights.",
            )  # fmt: skip
            return
        card = read_card(need(champion / checkpoint.CARD, "retrain decide"))
        classes = Classes(tuple(card.class_names), tuple(range(len(card.class_names))))
        table, labels = remap(manifests.read(need(manifest, "validate")), classes)
        folder = state_dir("retrain", "update")
        manifests.write(table, folder / CLEAN)
        made = relabel(driver.load_plan(run, plan, manifest), labels)
        spec = _spec(params, card, folder / CLEAN, made, weights)
        preflight.preflight(run, spec, params.ray, "student")
        checkpoints = driver.checkpoints("retrain", spec)
        result = driver.train(run, spec, params.ray, checkpoints)
        said, names = result.predictions["student"], spec.class_names
        actual = {split: driver.labels(spec, split) for split in ("val", "test")}
        lineage = [
            *card.lineage,
            Lineage(source=f"champion, version {decision.champion}", sha256=card.sha256, coverage=1.0),
        ]
        driver.write_model(run, spec, result.nets["student"], lineage, out)
        write_network(
            run, out, "the network that learnt on",
            metrics={split: evaluate(actual[split], said[split], names) for split in actual},
            history=result.history, actual=actual["val"], predicted=said["val"], class_names=names,
        )  # fmt: skip
        manifests.write(table, run.product(out / CLEAN))
    driver.forget(checkpoints)
    remove(folder)


def _spec(params: UpdateParams, card: ModelCard, manifest: Path, plan: Plan, weights: Path) -> TrainSpec:
    """One phase from the champion's weights, head and all, at a share of the student's rate."""
    net, settings = params.student, params.retrain
    lr = net.lr.model_copy(update={"initial": net.lr.initial * settings.lr})
    phase = Phase("learns on", "student", settings.epochs or net.train.epochs, lr)
    general = params.general.model_copy(update={"class_num": "auto"})
    fitted = params.model_copy(update={"general": general})
    spec = driver.make_spec(fitted, net, params.ray, params.data, manifest, plan, None, (phase,))
    names = tuple(card.class_names)
    return replace(spec, class_names=names, start=weights.resolve(), full_checkpoint=True, who="student")

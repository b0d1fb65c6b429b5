"""What export says of a checkpoint and its files: names, classes, parity, accuracy, cost of precision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from components.common.errors import RetortError
from components.common.storage import read_json
from components.export import exported
from components.export.params import ExportParams
from components.export.parity import BATCH, Comparison, Proof, Written
from components.export.precisions import PRECISIONS
from components.models.card import ModelCard, first_difference, names_finding, read_card
from components.step import StepContext, name_of

if TYPE_CHECKING:
    from torch import nn

DRIFT = 0.005  # top-1 by which training's own measurement may differ (other batch sizes round differently)
ANOTHER = 0.1  # top-1 below training's own from which on it is another network, or other images


def names(run: StepContext, model: Path, manifest: Path, role: str) -> None:
    """The names that the file will carry are the data's, label by label.

    Before the network is loaded, and of a changed card too: it is the names that a person must hear of.
    """
    try:
        card = read_card(model / "model.json", changed=True)
    except RetortError:
        return  # loading says why
    data, names = exported.class_names(manifest), card.class_names
    label = first_difference(names, data)
    if not names or (label is not None and label >= len(names)):
        return  # no classifier, or too few classes: the class count says so
    where = name_of(model / "model.json")
    run.add_finding(**names_finding(names, data, role, where, exported.way_out(card, manifest, role)))


def classes(run: StepContext, module: nn.Module, card: ModelCard, rows: exported.Rows, role: str) -> None:
    """The class count comes from the checkpoint, and fits the labels that parity is measured on."""
    import torch

    size = card.input_size[-1]
    with torch.inference_mode():
        outputs = list(module(torch.zeros(1, 3, size, size)).shape)
    named, highest = len(card.class_names), int(rows.labels.max())
    asked = run.params.general.class_num
    retrain = "Train it on this data, or export with the data it was trained on."
    if not named or len(outputs) != 2:
        run.add_finding(
            "export.class_num",
            "error",
            role,
            f"It has no classifier: the output is features of shape {outputs}.",
            advice="A backbone cannot predict; finetune it first.",
            row="1.1",
        )
    elif outputs[1] != named:
        run.add_finding(
            "export.class_num",
            "error",
            role,
            f"The network has {outputs[1]} outputs, its card names {named} classes.",
            measured=outputs[1],
            limit=named,
            advice=retrain,
            row="1.1",
        )
    elif highest >= named:
        run.add_finding(
            "export.class_num",
            "error",
            role,
            f"The validation split has the label {highest}, the network {named} classes, 0 to {named - 1}.",
            measured=named,
            limit=highest + 1,
            advice=retrain,
            row="1.1",
        )
    elif asked not in ("auto", named):
        run.add_finding(
            "export.class_num",
            "warning",
            role,
            f"global.class_num asks for {asked} classes, the checkpoint has {named}: the file gives {named} "
            "scores, whatever the parameter says.",
            measured=named,
            limit=asked,
            advice="Set global.class_num to auto, or train with it.",
            row="1.1",
        )
    else:
        run.add_finding(
            "export.class_num",
            "info",
            role,
            f"{named} classes, as the checkpoint has them.",
            measured=named,
            row="1.1",
        )
    run.stop_on_errors()


def parity(run: StepContext, proof: Proof, files: Mapping[str, Written], role: str) -> list[str]:
    """Row 1.1: are the files that must answer as the network does its equals? Returns those that are not."""
    bad = []
    for name, written in files.items():
        if not written.equal:
            continue
        ways = proof.compared[name]
        subject = role if name == "model.onnx" else f"{role}, {name}"
        broken = [(way, comparison) for way, comparison in ways.items() if not comparison.holds]
        for way, comparison in broken:
            said = comparison.failure or (
                f"{comparison.different_ids} of {comparison.images} images get another class, "
                f"scores differ by up to {comparison.max_difference:.1e} (allowed: {comparison.limit:.1e})"
            )
            run.add_finding(
                "export.parity",
                "error",
                f"{subject}, {way}",
                f"The exported file is not the network: {said}.",
                measured=comparison.max_difference,
                limit=comparison.limit,
                advice="Do not deploy it: the exporter is at fault, report the architecture. If such "
                "differences do not matter to you, raise export.tolerance.",
                row="1.1",
            )
        if broken:
            bad.append(name)
            continue
        whole = ways["batches"]
        run.add_finding(
            "export.parity",
            "info",
            subject,
            f"Class ids are equal on all {whole.images} validation images, in batches of {BATCH} and "
            f"one by one; scores differ by at most {max(way.max_difference for way in ways.values()):.1e}.",
            measured=whole.max_difference,
            limit=whole.limit,
            row="1.1",
        )
    return bad


def accuracy(
    run: StepContext,
    params: ExportParams,
    proof: Proof,
    broken: bool,
    card: ModelCard,
    rows: exported.Rows,
    model: Path,
    role: str,
) -> None:
    """Row 1.1: is the export bad, or is the checkpoint itself weak?

    Args:
        broken: whether ``model.onnx`` is another network than the checkpoint.
    """
    settings, whole = params.export, proof.compared["model.onnx"]["batches"]
    both = f"On {proof.images} validation images the network has {proof.top1:.2%} top-1, the exported file "
    both += f"{whole.top1:.2%}" if not whole.failure else "none"
    commonest = float(np.bincount(rows.labels).max()) / len(rows)
    trained = _trained_top1(model)
    if broken:
        run.add_finding(
            "export.accuracy",
            "error",
            role,
            f"{both}. The export is bad, whatever the checkpoint is worth.",
            measured=whole.top1,
            limit=proof.top1,
            advice="See export.parity.",
            row="1.1",
        )
    elif proof.top1 <= commonest and len(card.class_names) > 1:
        run.add_finding(
            "export.accuracy",
            "error",
            role,
            f"{both}: the export is right, the checkpoint itself has learned nothing. Always naming "
            f"the commonest class gives {commonest:.2%}.",
            measured=proof.top1,
            limit=commonest,
            advice="Look at its training curve and at the weights it started from.",
            row="1.1",
        )
    elif proof.top1 < settings.min_accuracy:
        run.add_finding(
            "export.accuracy",
            "warning",
            role,
            f"{both}: the export is right, the checkpoint itself is weak.",
            measured=proof.top1,
            limit=settings.min_accuracy,
            advice="Train longer, or look at the audit; the export is not at fault.",
            row="1.1",
        )
    else:
        run.add_finding(
            "export.accuracy",
            "info",
            role,
            f"{both}.",
            measured=whole.top1,
            limit=settings.min_accuracy,
            row="1.1",
        )
    if trained is not None and abs(trained - proof.top1) > DRIFT:
        far = trained - proof.top1 > ANOTHER
        run.add_finding(
            "export.accuracy",
            "error" if far else "warning",
            f"{role}, training against export",
            f"Training wrote {trained:.2%} for this checkpoint, export measures {proof.top1:.2%}.",
            measured=proof.top1,
            limit=trained,
            advice="It is not the network that was trained (parts of it may be random: never fill one with "
            "strict=False), or the data or the preprocessing changed since; train again."
            if far
            else "The data or the preprocessing changed since training; train again.",
            row="1.1",
        )


def _trained_top1(model: Path) -> float | None:
    path = model / "metrics.json"
    if not path.is_file():
        return None
    value = read_json(path).get("val", {}).get("top1")
    return None if value is None else float(value)


def whole_images(run: StepContext, proof: Proof, as_files: Comparison | None, role: str) -> None:
    """With preprocessing in the graph: does it see what training saw, starting from the files themselves?"""
    if as_files is None:
        return
    lost = proof.top1 - as_files.top1
    right = not as_files.failure and lost <= DRIFT
    run.add_finding(
        "export.preprocess",
        "info" if right else "error",
        role,
        as_files.failure
        or f"Given whole images, the graph resizes by itself: top-1 {as_files.top1:.2%} against "
        f"{proof.top1:.2%}, {as_files.different_ids + as_files.ties} of {as_files.images} images get another "
        f"class, scores differ by up to {as_files.max_difference:.1e}.",
        measured=lost,
        limit=DRIFT,
        row="1.5",
        advice="" if right else "Export with export.preprocess_in_graph: false and resize outside.",
    )


def reduced(run: StepContext, proof: Proof, files: Mapping[str, Written]) -> None:
    """Row 1.5: what the files of lower precision cost, and save."""
    for name, written in files.items():
        if written.equal:
            continue
        precision = PRECISIONS[written.precision]
        ways = proof.compared[name]
        whole = ways["batches"]
        failed = next((way.failure for way in ways.values() if way.failure), "")
        lost = proof.top1 - whole.top1
        good = not failed and lost <= precision.drop
        size = written.path.stat().st_size / files["model.onnx"].path.stat().st_size
        note = precision.note()
        run.add_finding(
            precision.rule,
            "info" if good else "warning",
            name,
            failed
            or f"Top-1 {whole.top1:.2%} against {proof.top1:.2%} in float32, {size:.2f} x the size"
            f"{f'; {note}' if note else ''}.",
            measured=lost,
            limit=precision.drop,
            row="1.5",
            advice="" if good else f"Keep to model.onnx: {written.precision} costs too much accuracy here.",
        )

"""The rules on the student's start weights: the proved file, of the source it names, whole, and trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from components.common.errors import RetortError
from components.models import build, checkpoint
from components.step import StepContext, name_of
from components.training.gate import source
from components.training.gate.evidence import Evidence, examine
from components.training.gate.images import Judged
from components.training.gate.report import show_fits
from components.training.normalise import Normalise
from components.training.params import CheckParams
from components.weights.load import another, load_backbone

RULE, ROW = "distill.student_weights", "2.3"
SAMPLE = 192  # real images that are sent through a network: channel statistics then lie within a tenth or so


def judge(run: StepContext, params: CheckParams, weights: Path, images: Judged) -> None:
    """Every rule on what the student starts from; each fault is a finding of its own.

    Args:
        weights: folder of the step ``weights``.
    """
    if params.student.weights == "none":
        run.add_finding(
            RULE, "error", "student", "student.weights is none: the student would start from random weights",
            measured="none", row=ROW,
            advice="Give weights trained on ImageNet-1k, such as package:NAME or a file.",
        )  # fmt: skip
        return
    proved = _proved(run, weights)
    if proved:
        judge_source(run, params, "student", weights)
    _values(run, params, weights / "student.safetensors", images, proved)


def _proved(run: StepContext, weights: Path) -> bool:
    """That the file is the one that ``student.json`` names."""
    fault = another(weights, "student")
    if fault:
        run.add_finding(
            RULE, "error", "student", fault, row=ROW, advice="Run 'retort weights' again.",
            waivable=False,  # distillation does not start from it either
        )  # fmt: skip
    return not fault


def judge_source(run: StepContext, params: CheckParams, who: str, weights: Path) -> None:
    """That start weights are what their record says they were made of: read again, and compared.

    Args:
        who: ``teacher`` or ``student``.
    """
    rule = f"distill.{who}_weights"
    found = source.reread(weights, who, getattr(params, who), params.data.s3)
    file = name_of(weights / f"{who}.safetensors")
    for fault in found.faults:
        run.add_finding(
            rule, "error", f"{who}: source", f"{file}: {fault}", measured=found.source, row=ROW,
            advice="Run 'retort weights' again, and keep what it writes as it is.",
        )  # fmt: skip
    if found.faults:
        return
    if found.away:
        run.add_finding(
            rule, "warning", f"{who}: source",
            f"{file}: its source cannot be read again here ({found.away}), so only its own statistics speak "
            "for it",
            measured=found.source, row=ROW,
        )  # fmt: skip
        return
    run.add_finding(
        rule, "info", f"{who}: source",
        f"{file}: {found.source} was read again: all {found.compared} tensors have its values, and its "
        "sha256 is "
        "the lineage's",
        measured=found.compared, limit=found.compared, row=ROW,
    )  # fmt: skip


def _values(run: StepContext, params: CheckParams, path: Path, images: Judged, proved: bool) -> None:
    """That it is loaded whole, as distillation will, and that its tensors are those of a trained network."""
    try:
        tensors = checkpoint.read_tensors(path)
    except RetortError as error:
        run.add_finding(
            RULE,
            "error",
            "student",
            str(error),
            row=ROW,
            advice="Run 'retort weights' again.",
            waivable=False,
        )
        return
    module = build.plain(params.student.arch, 0)
    coverage = load_backbone(module, path)
    loaded = module.state_dict()
    faults = []
    unequal = [
        name for name, tensor in loaded.items()
        if name in tensors and not torch.equal(tensor, tensors[name].to(tensor.dtype))
    ]  # fmt: skip
    missing = [name for name in loaded if name not in tensors]
    evidence = Evidence()
    if missing:
        faults.append(f"{len(missing)} of its {len(loaded)} tensors are not in the file: {missing[0]}, ...")
    if bad := checkpoint.not_finite(tensors):
        faults.append(f"its file holds NaN or infinite values: {bad}")
    else:
        if unequal:
            faults.append(f"{len(unequal)} tensors differ from the file after loading: {unequal[0]}, ...")
        mean, std = build.preprocessing(params.student.arch)
        inputs = Normalise(mean, std, torch.device("cpu"))(images.sample(SAMPLE))
        evidence = examine(module.eval(), inputs)
        faults += evidence.faults
        show_fits(run, "The student's start weights", evidence.fits)
    measured: dict[str, Any] = {"coverage": coverage.share, **evidence.measured}
    limit = {"coverage": 1.0, **evidence.limit}
    for fault in faults:
        run.add_finding(
            RULE, "error", "student", f"{name_of(path)}: {fault}", measured=measured, limit=limit, row=ROW,
            advice="Run 'retort weights' with weights made for this architecture.",
        )  # fmt: skip
    for doubt in evidence.doubts:
        run.add_finding(
            RULE, "warning", "student", f"{name_of(path)}: {doubt}", measured=measured, limit=limit, row=ROW,
            advice="Look at its source: where that was read again, and is what you meant, go on.",
        )  # fmt: skip
    if not faults and not evidence.doubts and proved:
        run.add_finding(
            RULE, "info", "student",
            f"all {len(loaded)} tensors of the student's backbone hold the values of its weights file, and "
            "are a "
            "trained network's",
            measured=measured, limit=limit, row=ROW,
        )  # fmt: skip

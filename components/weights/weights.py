"""The step ``weights``: what teacher and student start from, fetched, converted and proved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from components.common.errors import RetortError
from components.common.progress import at
from components.common.storage import atomic_path, sha256_file, write_json
from components.dataset.params import S3
from components.models import build, features, heads
from components.models.dataflow import made_for
from components.models.params import Net
from components.step import StepContext, step
from components.weights import download, report, write
from components.weights.convert import Converted, Target, convert
from components.weights.coverage import COUNTER, Coverage, Shape, compare, shapes, some
from components.weights.fit import Fit, norm_fits, sure
from components.weights.load import LIMIT, load_backbone
from components.weights.params import WeightsParams
from components.weights.readers import read
from components.weights.readers.stored import Array, Stored
from components.weights.source import Source, locate, public

if TYPE_CHECKING:
    from torch import nn

SCHEMA_VERSION = 1
ROW = "1.4"
UNTRAINED = 0.5  # share of constant vectors above which weights look as if nothing had trained them
NETS = ("teacher", "student")
SCHEMA = pa.schema(
    [
        ("net", pa.string()),
        ("tensor", pa.string()),
        ("state", pa.string()),
        ("file_shape", pa.list_(pa.int64())),
        ("network_shape", pa.list_(pa.int64())),
    ]
)


@dataclass
class Prepared:
    """One network with its weights loaded, and what is written down about them.

    ``path`` is where they were written, as a product of the step; None: they cover too little.
    """

    module: nn.Module
    rows: list[dict[str, Any]]
    path: Path | None = None


def weights(params: WeightsParams, *, out: Path) -> None:
    """Fetch, convert and prove the weights of both networks.

    Writes ``{teacher,student}.safetensors`` (where there are weights) with the tensor names of
    ``timm.create_model(arch.name)``; ``{teacher,student}.json`` with its sha256 (null without weights) and
    lineage; ``coverage.parquet``, every tensor and its state (``matched``, ``missing``, ``wrong_shape``,
    ``unexpected``); ``features.onnx``, the teacher's backbone (the student's when only that has weights).

    Raises:
        FindingsError: when weights cover less of a backbone than ``coverage`` asks for.
        RetortError: when weights cannot be found or read, hold NaN, or are another architecture's.
    """
    with step("weights", params, out) as run:
        ready: dict[str, Prepared] = {}
        for who in NETS:
            net: Net = getattr(params, who)
            if net.weights == "none":
                run.add_finding(
                    "weights.source", "info", who, f"{who}.weights is none: it starts from random weights",
                    measured="none", row=ROW,
                )  # fmt: skip
                _write_record(run, out, who, net, None, [], None)
            else:
                ready[who] = prepare_net(run, params.data.s3, who, net, out)
        run.stop_on_errors()
        _write_rows(
            [row for one in ready.values() for row in one.rows], run.product(out / "coverage.parquet")
        )
        _write_features(run, params, ready, out)


def prepare_net(
    run: StepContext, s3: S3, who: str, net: Net, out: Path, section: str | None = None
) -> Prepared:
    """Fetch, convert and prove ``net.weights``; writes ``{who}.safetensors`` and its record into ``out``.

    Args:
        section: that of params.yaml whose network it is, for advice; None: ``who``.
    """
    section = section or who
    at(f"building {net.arch.name}")
    module = build.plain(net.arch, 0)
    own = shapes(module.state_dict())
    at(f"fetching and reading the {who}'s weights")
    source = locate(net.weights, net.weights_sha256, s3)
    stored = _read(source)
    converted = convert(stored, Target(net.arch.name, own, heads.names(module)), source.path)
    found = shapes(converted.backbone)
    coverage = compare(own, found)
    _find_source(run, who, source, [stored.kind, converted.how, *stored.notes, *converted.notes])
    _find_values(run, who, section, converted, coverage, stored.arch, net)
    _find_head(run, who, converted)
    accepted = _find_coverage(run, who, section, net, coverage)
    rows = _rows(who, coverage, own, found)
    report.show_coverage(run.page, who, coverage, rows)
    lineage = {"source": source.spec, "sha256": source.sha256, "coverage": coverage.share}
    run.tracker.metrics({f"{who}_coverage": coverage.share})
    run.tracker.tags({f"{who}.weights.{key}": str(value) for key, value in lineage.items()})
    path = None
    if accepted:
        path = run.product(out / f"{who}.safetensors")
        _save(module, converted, coverage, path)
        _prove(module, path, converted)
        at(f"comparing the {who}'s kernels with their norms")
        _find_fit(run, who, norm_fits(module.eval()))
        _write_record(run, out, who, net, sha256_file(path), [lineage], converted.classes)
    return Prepared(module, rows, path)


def _read(source: Source) -> Stored:
    """What a source holds; a download that is no weights is not kept: the next run fetches it again."""
    try:
        return read(source.path)
    except RetortError as error:
        if not source.fetched:
            raise
        download.forget(source.path)
        raise RetortError(f"weights: {source.spec}: {error}; what came was not kept") from None


# --- what is found --------------------------------------------------------------------------------------


def _find_source(run: StepContext, who: str, source: Source, notes: list[str]) -> None:
    run.add_finding(
        "weights.source", "info", who,
        f"{source.spec}: {source.origin}; read as {'; '.join(notes)}; sha256 {source.sha256}",
        measured=source.sha256, row=ROW,
    )  # fmt: skip


def _find_values(
    run: StepContext,
    who: str,
    section: str,
    converted: Converted,
    coverage: Coverage,
    claimed: str | None,
    net: Net,
) -> None:
    """Weights that fit and still may be wrong: another network's by their own words, or never trained."""
    name = net.arch.name
    if claimed is not None and claimed.partition(".")[0] != name.partition(".")[0]:
        run.add_finding(
            "weights.source", "warning", who,
            f"the file says of itself that it is of '{claimed}', not of {name}; two networks may have the "
            "same tensors and compute differently (paddings, norms, activations)",
            measured=claimed, limit=name, row=ROW, advice=f"Set {section}.arch.name to '{claimed}'.",
        )  # fmt: skip
    negative = [
        name for name in coverage.matched
        if name.endswith("running_var") and (converted.backbone[name] < 0).any()
    ]  # fmt: skip
    if negative:
        run.add_finding(
            "weights.source", "error", who,
            f"negative variances in {some(negative)} (of {len(coverage.matched)} tensors): no norm can take "
            "their root; they are damaged, or another tensor's",
            measured=len(negative), limit=0, row=ROW, advice="Look for another file of these weights.",
        )  # fmt: skip
    empty = [name for name in coverage.matched if _holds_nothing(name, converted.backbone[name])]
    if empty:
        run.add_finding(
            "weights.source", "error", who,
            f"nothing but zeros in {some(empty)} (of {len(coverage.matched)} tensors): no training leaves "
            "a kernel or all variances of a norm at zero",
            measured=len(empty), limit=0, row=ROW, advice="Look for another file of these weights.",
        )  # fmt: skip
    vectors = [t for n in coverage.matched if (t := converted.backbone[n]).ndim == 1 and t.size > 1]
    constant = sum(bool((vector == vector[0]).all()) for vector in vectors) / max(1, len(vectors))
    if constant > UNTRAINED:
        run.add_finding(
            "weights.source", "warning", who,
            f"{constant:.0%} of the norms and biases have one value throughout, as before any training",
            measured=round(constant, 4), limit=UNTRAINED, row=ROW,
            advice="Is this the file of a finished training?",
        )  # fmt: skip


def _find_fit(run: StepContext, who: str, fits: list[Fit]) -> None:
    """Whether the kernels are those that the norms behind them were trained with."""
    if not fits:  # a network without batch norms, or weights that no training has touched
        return
    wrong = sorted((fit for fit in fits if fit.unlikely), key=lambda fit: fit.means)
    if not wrong:
        run.add_finding(
            "weights.source", "info", who,
            f"kernels fit all {len(fits)} batch norms: on artificial images their channels' means correlate "
            f"with those that the norms remember, by {median(f.means for f in fits):.2f} in the median",
            measured=0, limit=0, row=ROW,
        )  # fmt: skip
        return
    level, advice = "info", ""
    why = "after a short training, or one on images unlike these, that is usual"
    if sure(fits):
        level = "warning"
        advice = "Look for another file of these weights, or see how this one was converted."
        why = (
            "the shapes fit, but kernels are not in their places, or come from another training, or norms "
            "were not updated with them"
        )
    run.add_finding(
        "weights.source", level, who,  # type: ignore[arg-type]
        f"on artificial images {len(wrong)} of {len(fits)} batch norms remember other inputs than their "
        f"kernels give: {some([fit.norm for fit in wrong])}; {why}",
        measured=len(wrong), limit=0, row=ROW, advice=advice,
    )  # fmt: skip
    report.show_fits(run.page, who, wrong)


def _holds_nothing(name: str, tensor: Array) -> bool:
    """Whether a kernel, a matrix, or the variances of a norm are zero throughout."""
    judged = name.endswith("running_var") or (name.endswith("weight") and tensor.ndim > 1)
    return judged and tensor.size > 1 and not tensor.any()


def _find_head(run: StepContext, who: str, converted: Converted) -> None:
    if converted.classes is None:
        message = "the weights have no head: they cannot predict, only be finetuned with a new one"
    else:
        message = (
            f"the weights' head of {converted.classes:,} classes is left out: finetuning gives the network a "
            "new one; what is written here cannot predict"
        )
    run.add_finding("weights.head", "info", who, message, measured=converted.classes, row=ROW)


def _find_coverage(run: StepContext, who: str, section: str, net: Net, coverage: Coverage) -> bool:
    """Whether as much is covered as is asked for, or a person waived it."""
    deeper = coverage.deeper()
    good = coverage.share >= net.coverage and not deeper
    message = f"{coverage.share:.2%} of the backbone's {coverage.parameters:,} values are in the weights"
    faults = coverage.faults()
    if deeper:
        faults += f"; {some(deeper)} continue the network's own blocks: these are a deeper network's weights"
    level = ("warning" if faults else "info") if good else "error"
    found = run.add_finding(
        "weights.coverage", level, who, f"{message}: {faults}" if faults else message,  # type: ignore[arg-type]
        measured=coverage.share, limit=net.coverage, row=ROW,
        advice="" if good else (
            f"Are they another architecture's? See {section}.arch.name. {section}.coverage is the share that "
            "must be covered."
        ),
    )  # fmt: skip
    return found.level != "error"


def _rows(
    who: str, coverage: Coverage, own: Mapping[str, Shape], found: Mapping[str, Shape]
) -> list[dict[str, Any]]:
    """Every tensor but counters, those at fault first."""
    states = {
        "missing": coverage.missing,
        "wrong_shape": [name for name, _, _ in coverage.wrong_shape],
        "unexpected": coverage.unexpected,
        "matched": coverage.matched,
    }
    return [
        {
            "net": who,
            "tensor": name,
            "state": state,
            "file_shape": found.get(name),
            "network_shape": own.get(name),
        }
        for state, names in states.items()
        for name in names
    ]  # fmt: skip


# --- what is written ------------------------------------------------------------------------------------


def _save(module: nn.Module, converted: Converted, coverage: Coverage, path: Path) -> None:
    """Write what matched, and the norms' counters (zero if the file has none)."""
    tensors = {name: _writable(converted.backbone[name]) for name in coverage.matched}
    for name, tensor in module.state_dict().items():
        if name.endswith(COUNTER):
            count = converted.backbone.get(name)
            fits = count is not None and count.shape == () and count.dtype.kind in "iu"
            tensors[name] = np.asarray(count if fits else tensor.numpy(), np.int64)
    write.safetensors(path, tensors, {LIMIT: repr(coverage.share)} if coverage.share < 1 else {})


def _writable(tensor: Array) -> Array:
    """Integers as int64: tables of positions, which some files have as int32."""
    return tensor if tensor.dtype.kind == "f" else tensor.astype(np.int64, copy=False)


def _prove(module: nn.Module, path: Path, converted: Converted) -> None:
    """Load the file as training will, and compare every value with what was read."""
    coverage = load_backbone(module, path)
    loaded = module.state_dict()
    unequal = [n for n in coverage.matched if not np.array_equal(loaded[n].numpy(), converted.backbone[n])]
    if unequal:
        raise RetortError(f"{path.name}: {some(unequal)} differ after loading: please report this")


def _write_record(
    run: StepContext, out: Path, who: str, net: Net, digest: str | None, lineage: list[dict[str, Any]],
    classes: int | None,
) -> None:  # fmt: skip
    """What the weights are, for a model's lineage. ``classes``: those of the head that was left out."""
    write_json(
        run.product(out / f"{who}.json"),
        {
            "schema_version": SCHEMA_VERSION,
            "arch": net.arch.model_dump(mode="json"),
            "weights": public(net.weights),
            "sha256": digest,
            "lineage": lineage,
            "classes": classes,
        },
    )


def _write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    with atomic_path(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial, compression="zstd")


def _write_features(
    run: StepContext, params: WeightsParams, ready: Mapping[str, Prepared], out: Path
) -> None:
    """The backbone for the audit's probe, which needs no torch then."""
    who = next(iter(ready), "teacher")
    net: Net = getattr(params, who)
    if ready:
        module = ready[who].module
    else:
        run.add_finding(
            "weights.source", "warning", "features.onnx",
            "neither network has weights: the audit's features come from a random backbone and say little",
            measured="none", row=ROW, advice="Give teacher.weights or student.weights.",
        )  # fmt: skip
        torch.manual_seed(params.general.seed)
        module = build.plain(net.arch, 0)
    at(f"exporting {net.arch.name} as the audit's backbone")
    size, (mean, std) = params.general.image_size, build.preprocessing(net.arch)
    _need_size(module.eval(), size, net.arch.name)
    features.write_onnx(module, size, mean, std, run.product(out / "features.onnx"))


def _need_size(module: nn.Module, size: int, arch: str) -> None:
    """Raises RetortError when the network takes no images of ``size`` pixels."""
    try:
        with torch.inference_mode():
            module(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise RetortError(
            f"global.image_size: {arch} takes no images of {size} x {size} pixels ({first}); it is made for "
            f"{made_for(module)}"
        ) from None

"""The step ``weights``: what teacher and student start from, fetched, converted and proved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from components.common.errors import RetortError
from components.common.step import Run, step
from components.common.storage import atomic_path, sha256_file, write_json
from components.common.tracking import public_uri
from components.models import build, features, heads
from components.models.params import Net
from components.weights.convert import Converted, Target, convert
from components.weights.coverage import COUNTER, Coverage, compare, shapes, some
from components.weights.load import LIMIT, load_backbone
from components.weights.params import WeightsParams
from components.weights.readers import read
from components.weights.source import Source, locate

if TYPE_CHECKING:
    from torch import nn

SCHEMA_VERSION = 1
ROW = "1.4"
WORST = 10  # tensors at fault that a report names one by one
NETS = ("teacher", "student")


def prepare(params: WeightsParams, *, out: Path) -> None:
    """Fetch, convert and prove the weights of both networks.

    Writes ``{teacher,student}.safetensors`` (where there are weights) with the tensor names of
    ``timm.create_model(arch.name)``, ``{teacher,student}.json`` (sha256 and lineage), ``coverage.parquet``
    (net, tensor, state, shapes) and ``features.onnx`` (the teacher's backbone; the student's when only that
    has weights).

    Raises:
        FindingsError: when weights cover less of a backbone than ``coverage`` asks for.
        RetortError: when weights cannot be found, read, or belong to another architecture.
    """
    with step("weights", params, out) as run:
        rows: list[dict[str, Any]] = []
        ready: dict[str, nn.Module] = {}
        for who in NETS:
            net: Net = getattr(params, who)
            if net.weights == "none":
                run.find(
                    "weights.source", "info", who, f"{who}.weights is none: it starts from random weights",
                    measured="none", row=ROW,
                )  # fmt: skip
                _write_record(run, out, who, net, None, [], {})
                continue
            ready[who] = _prepare(run, params, who, net, rows, out)
        run.stop_on_errors()
        _write_rows(rows, run.product(out / "coverage.parquet"))
        _write_features(run, params, ready, out)


def _prepare(
    run: Run, params: WeightsParams, who: str, net: Net, rows: list[dict[str, Any]], out: Path
) -> nn.Module:
    """Prepare one network's weights; returns its backbone with them loaded."""
    module = build.plain(net.arch, 0)
    own = shapes(module.state_dict())
    source = locate(net.weights)
    stored = read(source.path)
    target = Target(net.arch.name, own, heads.names(module))
    converted = convert(stored, target, source.path)
    coverage = compare(own, shapes(converted.backbone))
    _find_source(run, who, source, [stored.kind, converted.how, *stored.notes, *converted.notes])
    _find_head(run, who, converted)
    _find_coverage(run, who, net, coverage)
    rows += _rows(who, coverage, own, shapes(converted.backbone))
    run.page.table(
        f"Coverage of the {who}'s backbone", ["tensors", "count", "values"],
        [
            ["matched", len(coverage.matched), coverage.covered],
            ["missing", len(coverage.missing), ""],
            ["of another shape", len(coverage.wrong_shape), ""],
            ["unexpected", len(coverage.unexpected), ""],
        ],
        note=f"{coverage.share:.2%} of {coverage.parameters:,} values; coverage.parquet lists every tensor.",
    )  # fmt: skip
    lineage = {"source": public_uri(net.weights), "sha256": source.sha256, "coverage": coverage.share}
    digest = None
    if coverage.share >= net.coverage:
        path = run.product(out / f"{who}.safetensors")
        _save(module, converted, coverage, net, path)
        _prove(module, path, converted)
        digest = sha256_file(path)
    _write_record(run, out, who, net, digest, [lineage], {"classes": converted.classes})
    run.tracker.summary({f"{who}_coverage": coverage.share})
    run.tracker.tags({f"{who}.weights.{key}": str(value) for key, value in lineage.items()})
    return module


def _find_source(run: Run, who: str, source: Source, notes: list[str]) -> None:
    run.find(
        "weights.source", "info", who,
        f"{public_uri(source.spec)}: {source.origin}; read as {'; '.join(notes)}; sha256 {source.sha256}",
        measured=source.sha256, row=ROW,
    )  # fmt: skip


def _find_head(run: Run, who: str, converted: Converted) -> None:
    if converted.classes is None:
        message = "the weights have no head: they cannot predict, only be finetuned with a new head"
    else:
        message = (
            f"the weights' head of {converted.classes:,} classes is left out: finetuning gives the network a "
            "new one; what is written here cannot predict"
        )
    run.find("weights.head", "info", who, message, measured=converted.classes, row=ROW)


def _find_coverage(run: Run, who: str, net: Net, coverage: Coverage) -> None:
    good = coverage.share >= net.coverage
    message = f"{coverage.share:.2%} of the backbone's {coverage.parameters:,} values are in the weights"
    if coverage.faults():
        message += f"; {coverage.faults()}"
    if coverage.unexpected:
        message += f"; {len(coverage.unexpected)} have no place in it: {some(coverage.unexpected)}"
    full = coverage.share == 1 and not coverage.unexpected
    run.find(
        "weights.coverage", ("info" if full else "warning") if good else "error", who, message,
        measured=coverage.share, limit=net.coverage, row=ROW,
        advice="" if good else (
            f"Are they another architecture's? See {who}.arch.name; {who}.coverage is the share that must be "
            "covered."
        ),
    )  # fmt: skip


def _save(module: nn.Module, converted: Converted, coverage: Coverage, net: Net, path: Path) -> None:
    """Write what matched, and the norms' counters (zero where the file has none): the same bytes each time."""
    from safetensors.torch import save_file

    tensors = {name: torch.from_numpy(converted.backbone[name].copy()) for name in coverage.matched}
    tensors |= {name: tensor for name, tensor in module.state_dict().items() if name.endswith(COUNTER)}
    metadata = {"format": "pt"} | ({LIMIT: str(net.coverage)} if coverage.share < 1 else {})
    with atomic_path(path) as partial:
        save_file(tensors, str(partial), metadata)


def _prove(module: nn.Module, path: Path, converted: Converted) -> None:
    """Load the file as training will, and compare every value with what was read."""
    coverage = load_backbone(module, path)
    loaded = module.state_dict()
    unequal = [
        name
        for name in coverage.matched
        if not torch.equal(loaded[name], torch.from_numpy(converted.backbone[name].copy()))
    ]
    if unequal:
        raise RetortError(f"{path.name}: {some(unequal)} differ after loading; this is a fault of ours")


def _write_record(
    run: Run, out: Path, who: str, net: Net, digest: str | None, lineage: list[dict[str, Any]],
    more: dict[str, Any],
) -> None:  # fmt: skip
    write_json(
        run.product(out / f"{who}.json"),
        {
            "schema_version": SCHEMA_VERSION,
            "arch": net.arch.model_dump(mode="json"),
            "weights": public_uri(net.weights),
            "sha256": digest,
            "lineage": lineage,
            **more,
        },
    )


def _rows(who: str, coverage: Coverage, own: dict[str, Any], found: dict[str, Any]) -> list[dict[str, Any]]:
    states = {
        "matched": coverage.matched,
        "missing": coverage.missing,
        "wrong_shape": [name for name, _, _ in coverage.wrong_shape],
        "unexpected": coverage.unexpected,
    }
    return [
        {
            "net": who,
            "tensor": name,
            "state": state,
            "file_shape": list(found[name]) if name in found else None,
            "network_shape": list(own[name]) if name in own else None,
        }
        for state, names in states.items()
        for name in names
    ]


def _write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    sides = pa.list_(pa.int64())
    schema = pa.schema(
        [
            ("net", pa.string()),
            ("tensor", pa.string()),
            ("state", pa.string()),
            ("file_shape", sides),
            ("network_shape", sides),
        ]
    )
    with atomic_path(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), partial, compression="zstd")


def _write_features(run: Run, params: WeightsParams, ready: dict[str, nn.Module], out: Path) -> None:
    """The backbone for the audit's probe: the teacher's, or the student's when only that has weights."""
    who = next((who for who in NETS if who in ready), "teacher")
    net: Net = getattr(params, who)
    if not ready:
        run.find(
            "weights.source", "warning", "features.onnx",
            "neither network has weights: the audit's features come from a random backbone and say little",
            measured="none", row=ROW, advice="Give teacher.weights or student.weights.",
        )  # fmt: skip
        torch.manual_seed(params.general.seed)
    module = ready[who] if ready else build.plain(net.arch, 0)
    mean, std = build.preprocessing(net.arch)
    features.write_onnx(
        module.eval(), params.general.image_size, mean, std, run.product(out / "features.onnx")
    )

"""``retort cost``: what a network costs, layer by layer, on the terminal and in files."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.errors import ConfigError
from components.common.findings import Finding, Report
from components.common.page import Page
from components.common.sheet import write_csv
from components.common.storage import human_bytes, need, sha256_file, write_json
from components.models import build, cost, heads
from components.models.card import read_card
from components.models.checkpoint import CARD
from components.models.cost import Cost, Layer
from components.models.params import Arch, Head

if TYPE_CHECKING:
    from torch import nn

SCHEMA_VERSION = 1
SHOWN = 20
CLASSES = 1000
NARROW = 110  # columns of a terminal below which a table is not drawn

HEAD = (
    "layer", "kind", "output", "parameters", "FLOPs", "MACs", "other", "access", "activations", "held",
    "ops/byte", "parallel",
)  # fmt: skip
NOTES = (
    "FLOPs: Cout x Mout^2 x (2 x Cin x K^2 - 1) and what follows from it for other products; "
    "MACs: multiply-accumulates, what many tools call FLOPs; other: operations outside such products. "
    "Access: bytes that are read and written, inputs + weights + outputs. Activations: bytes that exist "
    "while the layer runs, held: those of them that wait for a later layer. One image, float32, as torch "
    "runs it."
)


def report(
    name: str,
    *,
    out: Path,
    size: int | None = None,
    classes: int | None = None,
    bottleneck: int | None = None,
    acb: bool = False,
    everything: bool = False,
) -> Cost:
    """Count a network, print its table, and write ``<name>.json``, ``<name>.csv`` and the report to ``out``.

    It opens no run of the tracker, and leaves the tables of other networks in ``out`` alone: looking at an
    architecture is no step of a pipeline.

    Args:
        name: an architecture, or the folder of a trained network: its card says the rest.
        size: pixels; None: what the architecture, or the trained network, is made for.
        classes: outputs; None: 1000.
        bottleneck: width of the head's bottleneck.
        acb: with ACB blocks, as it trains.
        everything: print every layer in order, not the largest.

    Raises:
        ConfigError: when options are given that the card of a trained network decides.
        RetortError: when there is no such network, or it takes no image of this size.
    """
    arch, count, card = _named(name, classes, bottleneck, acb)
    module = cost.on_meta(lambda: build.create(arch, count))
    if card is not None:
        own = tuple(read_card(card).input_size)
    else:
        own = getattr(module, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    found = cost.measure(module, own if size is None else (own[0], size, size))
    title = Path(name).name if card is not None else arch.name
    about = {
        "name": title,
        "arch": arch.model_dump(mode="json"),
        "classes": count,
        "input_size": list(found.input_size),
    }
    verdict = Report(step="cost", inputs={} if card is None else {str(card): sha256_file(card)})
    for finding in _findings(title, found, module):
        verdict.add(finding)
    _write(out, title, about, found, verdict)
    _print(title, about, found, verdict, everything)
    print(f"{out / title}.json, {out / title}.csv, {out / 'report.html'}")
    return found


def _named(
    name: str, classes: int | None, bottleneck: int | None, acb: bool
) -> tuple[Arch, int, Path | None]:
    """Architecture, class count, and the card where the name is a trained network's folder."""
    folder = Path(name)
    if not (folder / CARD).exists() and "/" not in name:
        arch = Arch(name=name, head=Head(bottleneck=bottleneck), blocks="acb" if acb else "plain")
        return arch, CLASSES if classes is None else classes, None
    card = read_card(need(folder / CARD, "finetune"))
    given = {"--classes": classes is not None, "--bottleneck": bottleneck is not None, "--acb": acb}
    for option, is_given in given.items():
        if is_given:
            raise ConfigError(
                f"{option}: {folder / CARD} says it already; leave it out, or name the architecture "
                f"('retort cost {card.arch.name} {option} ...')"
            )
    return card.arch, len(card.class_names), folder / CARD


def _findings(title: str, found: Cost, module: nn.Module) -> list[Finding]:
    parameters, access = found.total("parameters"), found.total("access_bytes")
    flops, other = found.total("flops"), found.total("other")
    peak = found.peak
    said: list[tuple[str, float, str]] = [
        (
            "parameters", parameters,
            f"{parameters:,} parameters, {human_bytes(4 * parameters)} in float32",
        ),
        (
            "flops", flops,
            f"{_short(flops)} FLOPs by Cout x Mout^2 x (2 x Cin x K^2 - 1), which is "
            f"{_short(found.total('macs'))} multiply-accumulates; {_short(other)} operations more lie "
            "outside products (batch norms, activations, softmax, sums)",
        ),
        (
            "memory_access", access,
            f"{human_bytes(access)} are read and written for one image: inputs, weights and outputs of every "
            "operator, without a cache",
        ),
        (
            "peak_activation", peak.activation_bytes,
            f"{human_bytes(peak.activation_bytes)} of activations exist at once, in {peak.name}; "
            f"{human_bytes(peak.held_bytes)} of them wait for a later layer (a shortcut). Between operators "
            f"at most {human_bytes(found.carried_bytes)} wait",
        ),
        (
            "intensity", found.intensity,
            f"{found.intensity:.1f} operations per byte of memory access; layers far below that wait for "
            "memory, whatever their FLOPs",
        ),
        (
            "parallel", found.parallel_share,
            f"{found.parallel_share:.1%} of the operations are off the longest chain of operators that wait "
            f"for each other; {sum(layer.parallel for layer in found.layers)} of {len(found.layers)} layers "
            "could run beside another one",
        ),
    ]  # fmt: skip
    findings = [
        Finding(rule=f"cost.{rule}", level="info", subject=title, message=text, measured=value, row="3.5")
        for rule, value, text in said
    ]
    held = heads.fc_share(module)
    if held is not None:
        findings.append(Finding(**{**heads.fc_finding(held, "student"), "subject": title}))
    return findings


def _write(out: Path, title: str, about: dict[str, Any], found: Cost, verdict: Report) -> None:
    rows = [dataclasses.asdict(layer) | {"intensity": round(layer.intensity, 4)} for layer in found.layers]
    content = {
        "schema_version": SCHEMA_VERSION,
        **about,
        "total": {
            "parameters": found.total("parameters"),
            "parameter_bytes": 4 * found.total("parameters"),
            "flops": found.total("flops"),
            "macs": found.total("macs"),
            "other": found.total("other"),
            "access_bytes": found.total("access_bytes"),
            "peak_activation_bytes": found.peak.activation_bytes,
            "peak_layer": found.peak_layer,
            "held_bytes": found.peak.held_bytes,
            "carried_bytes": found.carried_bytes,
            "intensity": round(found.intensity, 4),
            "parallel_share": round(found.parallel_share, 6),
        },
        "layers": rows,
    }
    write_json(out / f"{title}.json", content)
    values = [(row | {"output": _shape(row["output"])}).values() for row in rows]
    write_csv(out / f"{title}.csv", [list(rows[0]), *map(list, values)])
    page = Page()
    page.table(f"{title}: layers in the order in which they run", HEAD, _cells(found.layers, _raw), NOTES)
    verdict.write(out / "report.json")
    page.write(out, verdict)


def _print(title: str, about: dict[str, Any], found: Cost, verdict: Report, everything: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    layers = found.layers
    if not everything:
        layers = sorted(layers, key=lambda layer: (-layer.flops, -layer.parameters))[:SHOWN]
    which = "every layer" if len(layers) == len(found.layers) else f"the {len(layers)} with the most FLOPs"
    height, width = found.input_size[1:]
    console = Console(width=max(NARROW, shutil.get_terminal_size((160, 24)).columns), highlight=False)
    table = Table(
        title=f"{title}, {about['classes']:,} classes, {height} x {width} pixels: {which} "
        f"(of {len(found.layers)})",
        box=box.SIMPLE, title_justify="left", show_footer=True,
    )  # fmt: skip
    totals = Layer(
        "total", "", (), found.total("parameters"), found.total("flops"), found.total("other"),
        found.total("macs"), found.total("access_bytes"), found.peak.activation_bytes, found.peak.held_bytes,
    )  # fmt: skip
    feet = [*_cells([totals], _short)[0][:-1], f"{found.parallel_share:.1%}"]
    for column, foot in zip(HEAD, feet, strict=True):
        right = column not in HEAD[:3]
        table.add_column(column, foot, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for cells in _cells(layers, _short):
        table.add_row(*cells)
    console.print(table)
    for finding in verdict.findings:
        console.print(f"  {finding.rule}: {finding.message}", markup=False, soft_wrap=True)
        if finding.advice:
            console.print(f"    {finding.advice}", markup=False, soft_wrap=True)


def _cells(layers: Sequence[Layer], number: Callable[[int], Any]) -> list[list[Any]]:
    return [
        [
            layer.name, layer.kind, _shape(layer.output), number(layer.parameters), number(layer.flops),
            number(layer.macs), number(layer.other), human_bytes(layer.access_bytes),
            human_bytes(layer.activation_bytes), human_bytes(layer.held_bytes), f"{layer.intensity:.1f}",
            "yes" if layer.parallel else "",
        ]
        for layer in layers
    ]  # fmt: skip


def _shape(output: Sequence[int]) -> str:
    return " x ".join(str(size) for size in output)


def _raw(value: int) -> int:
    return value


def _short(value: float) -> str:
    """A count as people say it: 4.33 G."""
    for unit in ("", " k", " M", " G"):
        if abs(value) < 1000:
            return f"{value:.0f}{unit}" if unit == "" else f"{value:.2f}{unit}"
        value /= 1000
    return f"{value:.2f} T"

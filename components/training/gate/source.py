"""Start weights, read again where they came from: is the file what its record and its lineage say?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from components.common.errors import RetortError
from components.common.storage import need, read_json
from components.dataset.params import S3
from components.models import build, heads
from components.models.params import Net
from components.weights.convert import Target, convert
from components.weights.coverage import COUNTER, compare, shapes, some
from components.weights.readers import read, safetensors
from components.weights.source import kept, locate, public

SHARE = 1e-6  # by which a recorded coverage may differ: it is a ratio of two counts


@dataclass
class Reread:
    """What a second reading of start weights found.

    ``faults``: why the file, its record or its lineage is not what it claims; ``compared``: tensors whose
    values were compared with the source; ``away``: why the source could not be read, empty where it was.
    """

    source: str
    faults: list[str] = field(default_factory=list)
    compared: int = 0
    away: str = ""


def reread(weights: Path, who: str, net: Net, s3: S3) -> Reread:
    """Compare ``{who}.safetensors`` and its record with the weights that the record says it was made of.

    Nothing is fetched: a download is read where the step ``weights`` kept it.

    Args:
        weights: the folder of the step ``weights``, whose file is the one that its record names.

    Raises:
        RetortError: the record, or the file, is missing or cannot be read.
    """
    path = need(weights / f"{who}.safetensors", "weights")
    record = read_json(need(path.with_suffix(".json"), "weights"))
    found = Reread(public(net.weights))
    entry = _entry(path, record, net, found)
    if entry is None:
        return found
    try:
        source = locate(kept(net.weights), None, s3)
    except RetortError as error:
        found.away = str(error).removeprefix("weights: ")
        return found
    if source.sha256 != entry.get("sha256"):
        found.faults.append(
            f"{path.stem}.json says that it was made of {found.source} with sha256 "
            f"{_short(entry.get('sha256'))}, which has {_short(source.sha256)} now: the lineage was "
            "edited, or "
            "the source changed"
        )
    try:
        _compare(path, net, source.path, entry, found)
    except RetortError as error:
        found.faults.append(f"{found.source} cannot be converted again: {error}")
    return found


def _entry(path: Path, record: dict[str, Any], net: Net, found: Reread) -> dict[str, Any] | None:
    """The lineage's one entry, if the record is of these settings."""
    name = f"{path.stem}.json"
    lineage = record.get("lineage") or []
    if len(lineage) != 1:
        found.faults.append(f"{name} names {len(lineage)} sources in its lineage, not one")
        return None
    entry = dict(lineage[0])
    said = {"lineage": entry.get("source"), "weights": record.get("weights", found.source)}
    for key, value in said.items():
        if value != found.source:
            found.faults.append(
                f"{name} says in '{key}' that it was made of {value}, {path.stem}.weights is {found.source}"
            )
    if net.weights_sha256 and entry.get("sha256") != net.weights_sha256.lower():
        found.faults.append(
            f"{name} names sha256 {_short(entry.get('sha256'))}, {path.stem}.weights_sha256 asks for "
            f"{_short(net.weights_sha256.lower())}"
        )
    arch = record.get("arch")
    if arch is not None and arch != net.arch.model_dump(mode="json"):
        found.faults.append(
            f"{name} was written for {arch.get('name')}, {path.stem}.arch is {net.arch.name}"
            if arch.get("name") != net.arch.name
            else f"{name} was written for another {path.stem}.arch"
        )
    return entry


def _compare(path: Path, net: Net, source: Path, entry: dict[str, Any], found: Reread) -> None:
    """Convert the source anew, and compare tensor by tensor."""
    module = build.plain(net.arch, 0)
    own = shapes(module.state_dict())
    converted = convert(read(source), Target(net.arch.name, own, heads.names(module)), source)
    coverage = compare(own, shapes(converted.backbone))
    stored = safetensors.read(path).tensors
    names = [name for name in coverage.matched if not name.endswith(COUNTER)]
    made = converted.backbone
    unequal = [name for name in names if name not in stored or not np.array_equal(stored[name], made[name])]
    extra = [name for name in stored if name not in coverage.matched and not name.endswith(COUNTER)]
    found.compared = len(names)
    if unequal:
        found.faults.append(
            f"{len(unequal)} of its {len(names)} tensors are not those of {found.source}: {some(unequal)}"
        )
    if extra:
        found.faults.append(f"{found.source} holds no {some(extra)}, the file does")
    claimed = entry.get("coverage")
    if not isinstance(claimed, (int, float)) or abs(claimed - coverage.share) > SHARE:
        found.faults.append(
            f"{path.stem}.json claims a coverage of {claimed}; the source fills {coverage.share:.6g}"
        )


def _short(digest: Any) -> str:
    text = str(digest or "none")
    return f"{text[:12]}..." if len(text) > 12 else text

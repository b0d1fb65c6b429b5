"""Loading prepared weights into a network's backbone, and saying what was loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from components.common.errors import RetortError
from components.common.storage import need, read_json, sha256_file
from components.models import heads
from components.models.acb import ACB
from components.weights.coverage import Coverage, compare, shapes
from components.weights.readers import safetensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from components.weights.readers.stored import Array

LIMIT = "coverage_limit"  # in a prepared file's metadata: the share that a person accepted, when below 1


def prepared(folder: Path, who: str) -> Path:
    """The file that the step ``weights`` left in ``folder`` for teacher or student, proved to be that file.

    Raises:
        RetortError: when it is missing, or not the one that its record ``{who}.json`` was written for.
    """
    fault = another(folder, who)
    if fault:
        raise RetortError(f"{fault}; run 'retort weights' again")
    return folder / f"{who}.safetensors"


def another(folder: Path, who: str) -> str:
    """Why ``{who}.safetensors`` is not the file that the step ``weights`` wrote; empty when it is.

    Raises:
        RetortError: when it, or its record, is missing.
    """
    path = need(folder / f"{who}.safetensors", "weights")
    record = need(path.with_suffix(".json"), "weights")
    content = read_json(record)
    named = str(content.get("sha256") or "none") if isinstance(content, dict) else "none"
    found = sha256_file(path)
    if found == named:
        return ""
    return (
        f"{path}: sha256 {found[:12]}..., {record.name} beside it names {named[:12]}"
        f"{'...' if len(named) > 12 else ''}: not the file that was proved, changed or damaged since"
    )


def load_backbone(module: nn.Module, path: Path, limit: float | None = None) -> Coverage:
    """Copy the tensors of a prepared ``.safetensors`` into a network's backbone, by name; its head stays.

    The network may have any head, none, or asymmetric blocks as ``build.create`` makes them: their square
    branch takes the plain kernel.

    Args:
        limit: share of the backbone that must be filled; None: all of it, unless the step ``weights`` was
            told that less will do (``coverage`` of teacher or student), which the file then says.

    Raises:
        RetortError: when less is filled, naming the first tensors at fault. The network is then unchanged.
    """
    stored = safetensors.read(path)
    own = backbone(module)
    coverage = compare(shapes(own), shapes(stored.tensors))
    limit = _accepted(path, stored.metadata) if limit is None else limit
    if coverage.share < limit:
        raise RetortError(
            f"{path}: fills {coverage.share:.1%} of the backbone, {limit:.1%} is asked for: "
            f"{coverage.faults()}; run 'retort weights' with weights made for this architecture"
        )
    fill(own, stored.tensors)
    return coverage


def backbone(module: nn.Module) -> dict[str, Tensor]:
    """A network's tensors (shared, not copied) without those of its head, under their plain names."""
    tensors = module.state_dict()
    head = tuple(f"{name}." for name in heads.names(module))
    own = {name: tensor for name, tensor in tensors.items() if not (head and name.startswith(head))}
    plain: dict[str, str] = {}
    for place, block in module.named_modules():
        if isinstance(block, ACB):
            for name in block.state_dict():
                if name == "square.weight":
                    plain[f"{place}.{name}"] = f"{place}.weight"
                elif name != "bias":
                    del own[f"{place}.{name}"]
    return {plain.get(name, name): tensor for name, tensor in own.items()}


def fill(own: Mapping[str, Tensor], found: Mapping[str, Array]) -> None:
    """Copy every tensor that has a place of its shape."""
    with torch.no_grad():
        for name, tensor in own.items():
            if name in found and found[name].shape == tuple(tensor.shape):
                tensor.copy_(torch.from_numpy(found[name].copy()))


def _accepted(path: Path, metadata: Mapping[str, str]) -> float:
    try:
        return float(metadata.get(LIMIT, "1"))
    except ValueError:
        raise RetortError(f"{path}: '{LIMIT}' in it is no number; run 'retort weights' again") from None

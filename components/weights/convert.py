"""From a file's names to the network's: whose names they are, what each becomes, and what has no place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from components.common.errors import RetortError
from components.weights.coverage import Shape, some
from components.weights.positions import by_position
from components.weights.readers.stored import Array, Stored


@dataclass
class Converted:
    """Tensors by the network's names: float32, or integers as they are (counters).

    ``how`` says which names were translated; ``classes``: outputs of the file's head, None where it has none.
    """

    tensors: dict[str, Array]
    how: str
    classes: int | None


@dataclass(frozen=True)
class Target:
    """A network that weights are for: its architecture's name, its backbone's tensors, its head's layers."""

    arch: str
    backbone: Mapping[str, Shape]
    head: tuple[str, ...]


def convert(stored: Stored, target: Target, path: Path) -> Converted:
    """Give a file's tensors the network's names; those of its head go, and their outputs are counted.

    Raises:
        RetortError: when the names are of a known family that the architecture does not belong to.
    """
    if any(name.startswith("_blocks.") for name in stored.tensors):
        return _efficientnet(stored, target, path)
    heads = tuple(f"{name}." for name in target.head)
    kept = {n: t for n, t in stored.tensors.items() if not (heads and n.startswith(heads))}
    gone = {n: t for n, t in stored.tensors.items() if n not in kept}
    return Converted(_float32(kept), "the network's own names", _classes(gone))


def _efficientnet(stored: Stored, target: Target, path: Path) -> Converted:
    """efficientnet_pytorch's names: the same tensors in the same order, so they are matched by position."""
    if not target.arch.startswith("tf_efficientnet"):
        raise RetortError(
            f"{path}: these are TensorFlow's EfficientNet weights, with the padding and norms of timm's "
            f"tf_efficientnet_*; {target.arch} would compute something else: set arch.name accordingly"
        )
    head = {name: t for name, t in stored.tensors.items() if name.startswith("_fc.")}
    rest = {name: t for name, t in stored.tensors.items() if name not in head}
    names = by_position({n: tuple(t.shape) for n, t in rest.items()}, target.backbone, str(path))
    return Converted(
        _float32({own: rest[name] for name, own in names.items()}),
        "efficientnet_pytorch's names, by position",
        _classes(head),
    )


def _classes(head: Mapping[str, Array]) -> int | None:
    """Outputs of a head: those of its last layer."""
    outputs = [t.shape[0] for t in head.values() if t.ndim]
    return outputs[-1] if outputs else None


def _float32(tensors: Mapping[str, Array]) -> dict[str, Array]:
    return {
        name: tensor.astype(np.float32, copy=False) if tensor.dtype.kind == "f" else tensor
        for name, tensor in tensors.items()
    }


def not_finite(tensors: Mapping[str, Array]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    return [name for name, t in tensors.items() if t.dtype.kind == "f" and not np.isfinite(t).all()]


def need_finite(tensors: Mapping[str, Array], path: Path) -> None:
    """Raises RetortError that names the first tensors with NaN or infinity in them."""
    bad = not_finite(tensors)
    if bad:
        raise RetortError(f"{path}: NaN or infinity in {some(bad)}; a network with them computes nothing")

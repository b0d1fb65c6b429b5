"""From a file's names to the network's: whose names they are, what each becomes, and what has no place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from components.common.errors import RetortError
from components.models import acb, build
from components.models.params import Arch
from components.weights import paddle
from components.weights.coverage import COUNTER, Shape, compare, shapes, some
from components.weights.positions import by_position
from components.weights.readers.stored import Array, Stored

FLOATS = (".weight", ".bias", ".running_mean", ".running_var")
ACB_NORM = ".square_bn.running_var"
TENSORFLOW = "tf_efficientnet"  # timm's networks with TensorFlow's padding and norms


@dataclass(frozen=True)
class Target:
    """A network that weights are for: its architecture's name, its backbone's tensors, its head's layers."""

    arch: str
    backbone: Mapping[str, Shape]
    head: tuple[str, ...]


@dataclass
class Converted:
    """Tensors by the network's names: float32, or integers as they are (counters).

    ``backbone`` may hold what the network has no place for; ``head``: the classifier's; ``how`` says whose
    names were translated; ``notes`` what was converted.
    """

    backbone: dict[str, Array]
    head: dict[str, Array]
    how: str
    notes: list[str] = field(default_factory=list)

    @property
    def classes(self) -> int | None:
        """Outputs of the head; None where there is none."""
        outputs = [tensor.shape[0] for tensor in self.head.values() if tensor.ndim]
        return outputs[-1] if outputs else None


def convert(stored: Stored, target: Target, path: Path) -> Converted:
    """Give a file's tensors the network's names, and part its head from its backbone.

    Raises:
        RetortError: when the weights are a known network's, and ``target`` is another one; when they hold NaN
            or infinity. The message names the first tensors at fault.
    """
    tensors, notes = stored.tensors, []
    prefix = _prefix(tensors, target, path)
    if prefix:
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        notes.append(f"the network's names stand behind '{prefix}', which is left off")
    how = "the network's own names"
    if any(name.startswith("_blocks.") for name in tensors):
        how = "efficientnet_pytorch's names, matched by position"
        tensors = _efficientnet(tensors, target, path)
    elif stored.kind.endswith(("variables", ".pdparams")) or paddle.is_paddle(tensors):
        published = paddle.recognise(tensors) or paddle.same_names(tensors, shapes(tensors))
        how = f"{published.name}, in Paddle's names"
        tensors = _paddle(tensors, published, target, path)
    elif any(name.endswith(ACB_NORM) for name in tensors):
        how = "the network's own names, ACB blocks folded"
        notes += _widths(tensors)
        tensors = _folded(tensors, target, path)
    if stored.arch and _base(stored.arch) != _base(target.arch):
        notes.append(f"the file itself says that it is of '{stored.arch}'")
    head = {name: tensor for name, tensor in tensors.items() if _of_head(name, target)}
    backbone = {name: tensor for name, tensor in tensors.items() if name not in head}
    notes += _widths(backbone)
    needed = {n: t for n, t in {**backbone, **head}.items() if n in target.backbone or n in head}
    need_finite(needed, path)
    _need_floats(needed, path)
    return Converted(_float32(backbone, needed), _float32(head, needed), how, notes)


def _base(arch: str) -> str:
    """An architecture's name without the tag of its weights."""
    return arch.partition(".")[0]


def _widths(tensors: Mapping[str, Array]) -> list[str]:
    """What is said of floats that are no float32."""
    counts = {
        plural: sum(t.dtype.kind == "f" and t.dtype.itemsize == width for t in tensors.values())
        for width, plural in ((2, "float16"), (8, "float64"))
    }
    return [f"{count:,} tensors converted from {kind} to float32" for kind, count in counts.items() if count]


def _prefix(tensors: Mapping[str, Array], target: Target, path: Path) -> str:
    """What stands before the names of a network that is a part of a larger one (``backbone.``); or nothing.

    Raises:
        RetortError: when the file holds several such networks: which one is meant only a person knows.
    """
    kernels = [name for name, shape in target.backbone.items() if len(shape) > 1]
    if any(name in tensors for name in kernels):
        return ""
    counts: Counter[str] = Counter()
    for kernel in kernels:
        counts.update(name.removesuffix(kernel) for name in tensors if name.endswith(f".{kernel}"))
    found = sorted(prefix for prefix, count in counts.items() if 2 * count > len(kernels))
    if len(found) > 1:
        raise RetortError(
            f"{path}: holds {len(found)} such networks, behind {some([repr(p) for p in found])}; keep one of "
            "them in a file of its own"
        )
    if found:
        return found[0]
    common = ""  # before every name, whoever gave these
    for part in next(iter(tensors), "").split(".")[:-1]:
        if not all(name.startswith(f"{common}{part}.") for name in tensors):
            break
        common += f"{part}."
    own = any(name.startswith(common) for name in target.backbone) or _of_head(common, target)
    return "" if own else common


def _of_head(name: str, target: Target) -> bool:
    return any(name.startswith(f"{layer}.") for layer in target.head)


def _efficientnet(tensors: Mapping[str, Array], target: Target, path: Path) -> dict[str, Array]:
    """efficientnet_pytorch's: the same tensors in the same order, so they are matched by position."""
    head = {name: tensor for name, tensor in tensors.items() if name.startswith("_fc.")}
    rest = {name: tensor for name, tensor in tensors.items() if name not in head}
    if not target.arch.startswith(TENSORFLOW):
        raise RetortError(
            f"{path}: these are TensorFlow's EfficientNet weights ({some(list(rest))}), not {target.arch}'s; "
            f"set arch.name to the {TENSORFLOW}_... of their size: padding and norms differ in all others"
        )
    counted = any(name.endswith(COUNTER) for name in rest)
    own = {name: shape for name, shape in target.backbone.items() if counted or not name.endswith(COUNTER)}
    names = by_position(shapes(rest), own, str(path))
    classifier = target.head[0] if target.head else "classifier"
    return {
        **{new: rest[old] for old, new in names.items()},
        **{name.replace("_fc", classifier, 1): tensor for name, tensor in head.items()},
    }


def _folded(tensors: Mapping[str, Array], target: Target, path: Path) -> dict[str, Array]:
    """A student that trained with ACB blocks, as the plain network that computes the same."""
    module = build.create(Arch(name=target.arch, blocks="acb"), 0)
    backbone = {name: tensor for name, tensor in tensors.items() if not _of_head(name, target)}
    coverage = compare(shapes(module.state_dict()), shapes(backbone))
    if coverage.share < 1 or coverage.unexpected:
        raise RetortError(f"{path}: holds ACB blocks, but not those of {target.arch}: {coverage.faults()}")
    _need_floats(backbone, path)
    need_finite(backbone, path)
    negative = [name for name, t in backbone.items() if name.endswith("running_var") and (t < 0).any()]
    if negative:  # folded, they would be NaN in another tensor's name
        raise RetortError(f"{path}: negative variances in {some(negative)}: a damaged file")
    module.load_state_dict({name: torch.from_numpy(tensor.copy()) for name, tensor in backbone.items()})
    acb.narrow(module.double())  # sums of kernels would lose digits in float32
    left = [name for name in module.state_dict() if name not in target.backbone]
    if left:
        raise RetortError(
            f"{path}: its ACB blocks fold to biases ({some(left)}) for which the plain {target.arch} has no "
            "place, since no batch norm stands behind them; give the weights that it started from"
        )
    head = {name: tensor for name, tensor in tensors.items() if name not in backbone}
    return {**{name: tensor.numpy() for name, tensor in module.float().state_dict().items()}, **head}


def _paddle(
    tensors: Mapping[str, Array], published: paddle.Published, target: Target, path: Path
) -> dict[str, Array]:
    converted: dict[str, Array] = {}
    for old, tensor in tensors.items():
        new = published.names[old]
        if new in converted:
            raise RetortError(f"{path}: two of its tensors are {new}; the second is {old}")
        converted[new] = tensor.T if old in published.transposed and tensor.ndim == 2 else tensor
    if published.archs and _base(target.arch) not in published.archs:
        backbone = {name: tensor for name, tensor in converted.items() if not _of_head(name, target)}
        coverage = compare(target.backbone, shapes(backbone))
        faults = coverage.faults() or "every tensor would fit, and the network still compute something else"
        raise RetortError(
            f"{path}: these are {published.name}'s weights, which {target.arch} is not ({faults}); "
            f"set arch.name to {' or '.join(published.archs)}"
        )
    return converted


def _float32(tensors: Mapping[str, Array], needed: Mapping[str, Array]) -> dict[str, Array]:
    """As float32 what is needed; the rest is only listed, and stays as it is."""
    return {
        name: tensor.astype(np.float32, copy=False) if name in needed and tensor.dtype.kind == "f" else tensor
        for name, tensor in tensors.items()
    }


def _need_floats(tensors: Mapping[str, Array], path: Path) -> None:
    """Raises RetortError that names the first tensors that hold integers where a network has floats."""
    whole = [name for name, tensor in tensors.items() if name.endswith(FLOATS) and tensor.dtype.kind != "f"]
    if whole:
        raise RetortError(
            f"{path}: integers in {some(whole)} (of {len(tensors)} tensors): a quantised network's; "
            "give the weights that it was made from"
        )


def need_finite(tensors: Mapping[str, Array], path: Path) -> None:
    """Raises RetortError that names the first tensors with NaN, or numbers too large for float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        bad = [
            name
            for name, tensor in tensors.items()
            if tensor.dtype.kind == "f" and not np.isfinite(tensor.astype(np.float32, copy=False)).all()
        ]
    if bad:
        raise RetortError(
            f"{path}: NaN or infinity in {some(bad)} (of {len(tensors)} tensors): such a network computes "
            "nothing; look for an earlier checkpoint"
        )

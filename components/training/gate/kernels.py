"""Kernels beside the real inputs of their layers: told from the same values in random order, and from others.

Two questions, each answered for every convolution and fully connected layer but the head's:

* **Trained or random** (`against_random`). The values of each filter are permuted, ``COPIES`` times, and its
  responses to the layer's real inputs compared with those of the copies. Where values are random, or were
  mixed, one more permutation changes nothing in distribution (they are exchangeable), whatever the inputs,
  so every statistic lies among those of its copies: deviations from them have mean 0 and variance near 1,
  and so has their sum over layers divided by the root of their number (Stouffer). In a trained network
  filters have turned towards, or away from, what their inputs vary in.
* **In their places** (`stand_out`). Of kernels of one shape each is tried on each one's inputs. After a short
  training the own one passes more than the rest of its row and column tell.

Neither minds the scale of a filter, biases, or which kind of norm follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from components.models import heads

TOKENS = 256  # inputs of a layer, over all images and positions
FILTERS, WIDTH, PARTS = 64, 1024, 64  # of a layer at most: filters a group, their values, groups
COPIES = 16
LEAST_TOKENS, LEAST_VALUES = 32, 4  # below which a layer says nothing
LEAST_FILTERS = 8  # in one group: fewer have no directions in common
CLIPPED = 20.0  # deviations: one layer alone is not to speak for all
MEMBERS = (3, 12)  # kernels of one shape among which one can stand out, and how many are tried at most
TINY = 1e-12


@dataclass(frozen=True)
class Layer:
    """A layer's filters and what it was given, a sample of both.

    ``filters``: float32 [G, R, D], G groups (of a convolution's channels), R filters each; ``inputs``:
    float32 [G, T, D], centred over T and of mean square 1; ``shape``: equal where kernels may take one
    another's places.
    """

    name: str
    filters: Tensor
    inputs: Tensor
    shape: tuple[Any, ...]

    @property
    def finite(self) -> bool:
        """Whether numbers still are numbers when they arrive here."""
        return bool(torch.isfinite(self.inputs).all())


@dataclass(frozen=True)
class Deviation:
    """How far a layer's filters lie from their own values in random order, in deviations.

    ``gain``: variance of the responses, its mean logarithm; ``spread``: how unlike those of its copies single
    filters' are, to either side; ``common``: the direction that filters share most, whatever the inputs (0
    where there are too few).
    """

    layer: str
    gain: float
    spread: float
    common: float


def layers(module: nn.Module, images: Tensor) -> list[Layer]:
    """What is looked at, in the order of computing; layers that are not reached, or too small, are left out.

    Args:
        module: in eval mode.
        images: float32 [N, 3, S, S].
    """
    own = set(heads.names(module))
    found: dict[str, Layer] = {}
    generator = torch.Generator().manual_seed(0)

    def hook(name: str) -> Any:
        def take(part: nn.Module, args: tuple[Any, ...]) -> None:
            if name not in found and (layer := _layer(name, part, args[0], generator)) is not None:
                found[name] = layer

        return take

    hooks = [
        part.register_forward_pre_hook(hook(name))
        for name, part in module.named_modules()
        if name not in own and isinstance(part, (nn.Linear, nn.Conv2d))
    ]
    try:
        with torch.inference_mode():
            module(images)
    finally:
        for each in hooks:
            each.remove()
    return list(found.values())


def _layer(name: str, part: nn.Module, given: Tensor, generator: torch.Generator) -> Layer | None:
    weight: Any = part.weight
    groups = part.groups if isinstance(part, nn.Conv2d) else 1
    filters = weight.detach().float().reshape(groups, weight.shape[0] // groups, -1)
    if filters.shape[-1] < LEAST_VALUES:
        return None
    patches = _patches(part, given.detach().float(), generator)
    if patches is None or patches.shape[1] < LEAST_TOKENS:
        return None
    few = _evenly(groups, PARTS)
    values = _evenly(filters.shape[-1], WIDTH)
    filters = filters[few][:, _evenly(filters.shape[1], FILTERS)][..., values]
    patches = patches[few][..., values]
    shape = (isinstance(part, nn.Conv2d), groups, *weight.shape)
    patches = patches - patches.mean(1, keepdim=True)
    return Layer(name, filters, patches / patches.square().mean().sqrt().clamp_min(TINY), shape)


def _evenly(size: int, most: int) -> Tensor:
    return torch.linspace(0, size - 1, min(size, most)).long()


def _patches(part: nn.Module, given: Tensor, generator: torch.Generator) -> Tensor | None:
    """What single responses are computed from: [groups, TOKENS, values]; None: it is no map."""
    if not isinstance(part, nn.Conv2d):
        rows = given.reshape(-1, given.shape[-1])
        return rows[torch.randperm(len(rows), generator=generator)[:TOKENS]][None]
    if given.ndim != 4:
        return None
    (height, width), (down, right) = part.kernel_size, part.dilation
    edges = (right * (width // 2),) * 2 + (down * (height // 2),) * 2
    view = nn.functional.pad(given, edges)
    view = view.unfold(2, down * (height - 1) + 1, 1).unfold(3, right * (width - 1) + 1, 1)
    view = view[..., ::down, ::right].permute(0, 2, 3, 1, 4, 5)  # [N, H, W, C, height, width]
    images, high, wide = view.shape[:3]
    places = torch.randperm(images * high * wide, generator=generator)[:TOKENS]
    taken = view[places // (high * wide), places // wide % high, places % wide]
    return taken.reshape(len(taken), part.groups, -1).transpose(0, 1)


# --- trained or random ----------------------------------------------------------------------------------


def against_random(found: list[Layer]) -> list[Deviation]:
    """How far each layer's filters lie from their own values in random order."""
    generator = torch.Generator().manual_seed(1)
    return [deviation for layer in found if (deviation := _deviation(layer, generator)) is not None]


def stouffer(deviations: list[float]) -> float:
    """Their sum over the root of their number: 0 +- 1 where each is; 0 without any."""
    clipped = np.clip(deviations, -CLIPPED, CLIPPED)
    return float(clipped.sum() / max(1, len(clipped)) ** 0.5)


def _deviation(layer: Layer, generator: torch.Generator) -> Deviation | None:
    alive = layer.filters.abs().amax((0, 2)) > 0  # a filter of zeros is the same in any order
    filters = _even(layer.filters[:, alive])
    if not filters.numel() or not layer.finite:
        return None
    tried = torch.cat([filters[None], _permuted(filters, generator)])
    responses = _responses(tried, layer.inputs)
    unlike = (responses - responses.mean(0)) / responses.std(0).clamp_min(TINY)
    common = 0.0
    if len(filters) == 1 and min(filters.shape[1:]) >= LEAST_FILTERS:
        common = _from_copies(torch.linalg.eigvalsh(tried[:, 0] @ tried[:, 0].mT)[:, -1].log())
    return Deviation(
        layer.name,
        _from_copies(responses.mean((1, 2))),
        _from_copies(unlike.square().mean((1, 2))),
        common,
    )


def _even(filters: Tensor) -> Tensor:
    """All of norm 1."""
    return filters / filters.norm(dim=-1, keepdim=True).clamp_min(TINY)


def _permuted(filters: Tensor, generator: torch.Generator) -> Tensor:
    """Copies whose filters have their values in random order: [COPIES, G, R, D]."""
    shape = (COPIES, *filters.shape)
    return filters.expand(shape).gather(-1, torch.rand(shape, generator=generator).argsort(-1))


def _responses(filters: Tensor, inputs: Tensor) -> Tensor:
    """Logarithm of each response's variance: [K, G, R, D] and [G, T, D] -> [K, G, R]."""
    return torch.einsum("kgrd,gtd->kgrt", filters, inputs).square().mean(-1).clamp_min(TINY).log()


def _from_copies(values: Tensor) -> float:
    """How far the first lies from the mean of the others, in their deviations."""
    copies = values[1:]
    return float((values[0] - copies.mean()) / copies.std().clamp_min(TINY))


# --- in their places ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Kernels of one shape, ``names``: how far the own one stands out in each place, in deviations."""

    names: tuple[str, ...]
    deviations: float


def stand_out(found: list[Layer]) -> list[Group]:
    """For each group of kernels of one shape: how far the own one stands out in its place."""
    shapes: dict[tuple[Any, ...], list[Layer]] = {}
    for layer in found:
        if layer.finite:
            shapes.setdefault(layer.shape, []).append(layer)
    groups = []
    for alike in shapes.values():
        if len(alike) < MEMBERS[0]:
            continue
        kept = [alike[int(place)] for place in _evenly(len(alike), MEMBERS[1])]
        tried = torch.stack([_even(layer.filters) for layer in kept])
        gains = [_responses(tried, place.inputs).mean((1, 2)).numpy() for place in kept]
        groups.append(Group(tuple(layer.name for layer in kept), _deviations(np.stack(gains))))
    return groups


def _deviations(gains: np.ndarray) -> float:
    """Mean of the diagonal of a doubly centred matrix, in standard errors of what lies beside it."""
    rest = gains - gains.mean(0) - gains.mean(1, keepdims=True) + gains.mean()
    beside = rest[~np.eye(len(rest), dtype=bool)]
    return float(np.diag(rest).mean() / max(float(beside.std()), TINY) * len(rest) ** 0.5)

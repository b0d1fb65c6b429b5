"""A classifier's rows: where they are, how new ones begin, and how to train none but those."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from components.common.errors import RetortError
from components.models import heads

SURE = log(9)  # lead in nats over the best old row at which a softmax of the two says 0.9

CHUNK = 256  # feature vectors that are multiplied with all rows at once


@dataclass
class FeatureStatistics:
    """What a layer of the classifier is fed: mean by class label, float64 [C], and scatter inside classes.

    ``within`` is the pooled covariance around the class means, float64 [C, C].
    """

    means: dict[int, Tensor]
    within: Tensor


def classifiers(module: nn.Module) -> list[nn.Linear]:
    """The last fully connected layers of a timm network: one, or two where a token is distilled.

    Their rows are the classes; of a bottleneck head it is the layer behind the narrow one.

    Raises:
        RetortError: when the network ends in something else.
    """
    found: list[nn.Linear] = []
    for name in heads.names(module):
        layer = module.get_submodule(name)
        if isinstance(layer, heads.Bottleneck):
            layer = layer.expand
        if not isinstance(layer, nn.Linear):
            raise RetortError(
                f"the network ends in '{name}', a layer of the type {type(layer).__name__}, not in a fully "
                "connected layer with a row for each class"
            )
        found.append(layer)
    if not found:
        raise RetortError("the network has no classifier on top")
    return found


class NewRows:
    """Freezes a network but for the rows of its classifier from ``first`` on.

    A layer's rows are one tensor, which an optimizer steps as a whole (weight decay moves it where gradients
    are zero): ``keep`` puts the old rows back, bit by bit.
    """

    def __init__(self, module: nn.Module, first: int) -> None:
        module.requires_grad_(False)
        tensors = [tensor for layer in classifiers(module) for tensor in layer.parameters()]
        self._kept = [(tensor.requires_grad_(True), tensor.detach()[:first].clone()) for tensor in tensors]

    @torch.no_grad()
    def keep(self) -> None:
        for tensor, old in self._kept:
            tensor[: len(old)] = old


@torch.inference_mode()
def feature_statistics(
    module: nn.Module, batches: Iterable[tuple[Tensor, Sequence[int]]]
) -> list[FeatureStatistics]:
    """Statistics of the input of each of the classifier's layers.

    Args:
        module: in eval mode.
        batches: inputs float32 [B, 3, S, S] and their labels.
    """
    layers = classifiers(module)
    sums: list[dict[int, Tensor]] = [{} for _ in layers]
    squares = [torch.zeros(2 * (layer.in_features,), dtype=torch.float64) for layer in layers]
    counts: dict[int, int] = {}
    seen: dict[int, Tensor] = {}

    def hook(place: int) -> Any:
        def keep(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[place] = inputs[0].double()

        return keep

    hooks = [layer.register_forward_pre_hook(hook(place)) for place, layer in enumerate(layers)]
    try:
        for inputs, labels in batches:
            module(inputs)
            for place, square in enumerate(squares):
                square += seen[place].T @ seen[place]
            for at, label in enumerate(labels):
                counts[label] = counts.get(label, 0) + 1
                for place, total in enumerate(sums):
                    total[label] = total.get(label, 0) + seen[place][at]
    finally:
        for handle in hooks:
            handle.remove()
    found = []
    for square, total in zip(squares, sums, strict=True):
        means = {label: value / counts[label] for label, value in total.items()}
        between = torch.stack([mean * sqrt(counts[label]) for label, mean in means.items()])
        found.append(FeatureStatistics(means, (square - between.T @ between) / sum(counts.values())))
    return found


def init_new_classes(
    weight: Tensor, bias: Tensor, old: Mapping[int, Tensor], new: Sequence[Tensor], within: Tensor
) -> tuple[Tensor, Tensor]:
    """New rows of a classifier, from class means of what it is fed.

    A softmax does not change when one vector is added to all rows, so that rows mean something only beside
    their mean ``w`` (over the old ones); and features do not have mean zero, so that a class mean taken as
    it is would score high on every image. So with ``m`` the mean of all class means, ``S`` the covariance
    inside classes and ``r`` the mean of its diagonal, the direction is Fisher's, ``d = (S + r I)^-1 (mean -
    m)``: towards its class, most where images of a class agree. With ``s`` the old rows' mean distance from
    ``w``, the new row is ``w + s * d / |d|``: as long as old rows are.

    Its bias puts the border half-way between its own class and the old class that comes nearest: its lead
    over the best old row at its own class mean is as large as its lag at the nearest old class mean. Where no
    means of old classes are known, ``m`` is 0, and the lead at its own mean is ``SURE``.

    Args:
        weight, bias: the old rows, float [K, C] and [K].
        old: means by row, float [C], of those old classes that have images.
        new: means of the new classes, float [C] each.
        within: S, float [C, C].

    Returns:
        Weights float64 [len(new), C] and biases float64 [len(new)].
    """
    weight, bias, means = weight.double(), bias.double(), torch.stack(list(new)).double()
    known = torch.stack([old[row] for row in sorted(old)]).double() if old else means[:0]
    middle = torch.cat([known, means]).mean(0) if old else torch.zeros_like(means[0])
    common = weight.mean(0)
    length = (weight - common).norm(dim=1).mean() if len(weight) > 1 else weight.norm()
    ridge = within.diag().mean() * torch.eye(len(within), dtype=torch.float64)
    if not ridge.any():  # one image a class: nothing is known of how they scatter
        ridge = torch.eye(len(within), dtype=torch.float64)
    direction = torch.linalg.solve(within.double() + ridge, (means - middle).T).T
    rows = common + length * nn.functional.normalize(direction, dim=1)

    def best_old(features: Tensor) -> Tensor:
        parts = features.split(CHUNK)  # 100,000 classes against as many means would not fit
        return torch.cat([(part @ weight.T + bias).max(dim=1).values for part in parts])

    lead = (rows * means).sum(1) - best_old(means)
    if not old:
        return rows, SURE - lead
    nearest = (known @ rows.T - best_old(known)[:, None]).max(dim=0).values
    return rows, -(lead + nearest) / 2


@torch.no_grad()
def expand_head(
    module: nn.Module,
    grown: nn.Module,
    kept: Sequence[int],
    statistics: Sequence[FeatureStatistics],
    new: Sequence[int],
) -> None:
    """Fill ``grown`` with the network ``module`` and a classifier of its rows ``kept``, then one a new class.

    Args:
        kept: rows of ``module``, in the order that they have in ``grown``.
        statistics: of each layer, by the label that a class has in ``grown``.
        new: labels of the new classes: they follow the kept rows.
    """
    tensors = grown.state_dict()
    for name, tensor in module.state_dict().items():
        if tensors[name].shape == tensor.shape:
            tensors[name].copy_(tensor)
    for old, layer, found in zip(classifiers(module), classifiers(grown), statistics, strict=True):
        weight = old.weight[list(kept)]
        bias = weight.new_zeros(len(kept)) if old.bias is None else old.bias[list(kept)]
        known = {label: found.means[label] for label in range(len(kept)) if label in found.means}
        rows, biases = init_new_classes(
            weight, bias, known, [found.means[label] for label in new], found.within
        )
        layer.weight.copy_(torch.cat([weight, rows.to(weight.dtype)]))
        if old.bias is not None:
            layer.bias.copy_(torch.cat([bias, biases.to(bias.dtype)]))

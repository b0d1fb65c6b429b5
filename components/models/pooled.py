"""What the last layers of a timm network read, while it computes its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from components.common.errors import RetortError
from components.models import heads


class Pooled:
    """Listens to the input of a network's classifier; of several classifiers, to all of their inputs.

    Attributes:
        width: D, of the vector.

    Raises:
        RetortError: the network does not end in layers that read one vector an image.
    """

    def __init__(self, network: nn.Module) -> None:
        layers: list[Any] = [network.get_submodule(name) for name in heads.names(network)]
        if not layers or not all(
            isinstance(layer, nn.Linear | nn.Conv2d | heads.Bottleneck) for layer in layers
        ):
            raise RetortError(
                f"{type(network).__name__} does not end in fully connected layers: it has no features that "
                "could be compared; take another distill.method"
            )
        widths = [
            layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features for layer in layers
        ]
        self.width: int = sum(widths)
        self._read: list[Tensor | None] = [None] * len(layers)
        for place, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._listener(place))

    def _listener(self, place: int) -> Any:
        def listen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._read[place] = inputs[0]

        return listen

    def take(self) -> Tensor:
        """What was read in the last forward pass, float [B, D]; forgotten with that."""
        found = [each.flatten(1) for each in self._read if each is not None]
        assert len(found) == len(self._read), "the network has not computed"
        self._read = [None] * len(self._read)
        return torch.cat(found, dim=1)

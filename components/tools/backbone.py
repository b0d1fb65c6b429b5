"""A classifier as a backbone (row 5.5 of the FAQ): no FC layer, but maps, tokens, or one vector."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from components.common.errors import RetortError

KINDS = ("pooled", "last", "stages", "cls", "patches")


class Backbone(nn.Module):
    """What stands in front of a timm network's classifier.

    - ``pooled``: the vector that the FC layer would read, [N, D]; of a distilled DeiT, which has two such
      layers, the mean of both vectors;
    - ``last``: the last feature map, [N, C, H, W]; of a transformer, its patch tokens in their places;
    - ``stages``: the map before each down-sampling, and the last one; named by their strides
      (``stride_4``: [N, C, H / 4, W / 4]). A plain transformer has one resolution, and gives one map;
    - ``cls``: the [CLS] token, [N, D];
    - ``patches``: the tokens of the patches, [N, T, D], row by row.

    Args:
        network: takes the loss of its classifier; goes to eval mode.
        kind: one of KINDS.
        size: height and width of its images, in pixels.

    Attributes:
        shapes: of each output, by name, without the batch, in the order in which ``forward`` gives them.

    Raises:
        RetortError: when the network has no such features.
    """

    def __init__(self, network: nn.Module, kind: str, size: int) -> None:
        super().__init__()
        self.network = cast(Any, network.eval())
        self.network.reset_classifier(0)
        self.kind = kind
        self.prefix = int(getattr(network, "num_prefix_tokens", 0))  # [CLS] and its like, before the patches
        self._last_of_size: list[int] = []
        example = torch.zeros(1, 3, size, size)
        with torch.inference_mode():
            if kind == "stages":
                maps = self.network.forward_intermediates(example, intermediates_only=True)
                heights = [each.shape[-2] for each in maps]
                self._last_of_size = [
                    index for index, height in enumerate(heights) if height not in heights[index + 1 :]
                ]
            found = self(example)
        names = [f"stride_{round(size / each.shape[-2])}" for each in found] if kind == "stages" else [kind]
        self.shapes = {name: tuple(each.shape[1:]) for name, each in zip(names, found, strict=True)}

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalised float32 [N, 3, size, size] -> one float32 tensor for each of ``shapes``."""
        if self.kind == "pooled":
            return (self.network(images),)
        if self.kind == "stages":
            indices = self._last_of_size or None
            return tuple(self.network.forward_intermediates(images, indices=indices, intermediates_only=True))
        features = self.network.forward_features(images)
        if not isinstance(features, Tensor):
            name = type(self.network).__name__
            raise RetortError(f"--from {self.kind}: {name} has several maps at once; use pooled")
        if self.kind == "last":
            return (self._as_map(features),)
        self._need_tokens(features)
        return (features[:, 0] if self.kind == "cls" else features[:, self.prefix :],)

    def _as_map(self, features: Tensor) -> Tensor:
        if features.ndim == 3:
            patches = features[:, self.prefix :]
            side = math.isqrt(patches.shape[1])  # images are square, and so is the grid of their patches
            if side * side != patches.shape[1]:
                name = type(self.network).__name__
                raise RetortError(
                    f"--from last: the tokens of {name} are no square map; use pooled or patches"
                )
            return patches.transpose(1, 2).reshape(-1, patches.shape[2], side, side)
        if str(getattr(self.network, "output_fmt", "NCHW")).endswith("NHWC"):
            return features.permute(0, 3, 1, 2)
        return features

    def _need_tokens(self, features: Tensor) -> None:
        name = type(self.network).__name__
        if features.ndim != 3:
            raise RetortError(f"--from {self.kind}: {name} has maps, not tokens; use pooled, last or stages")
        if self.kind == "cls" and (not self.prefix or getattr(self.network, "cls_token", None) is None):
            raise RetortError(f"--from cls: {name} has no [CLS] token; use pooled or patches")

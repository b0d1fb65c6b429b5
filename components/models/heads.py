"""Heads: the plain fully connected layer, and a bottleneck for very many classes (row 2.2 of the FAQ)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from components.common.errors import RetortError


class Bottleneck(nn.Module):
    """A narrow layer between the pooled features and the classes: C x w + w x classes, not C x classes.

    Args:
        features: C, inputs.
        width: w, the narrow layer's outputs.
        classes: outputs.
    """

    def __init__(self, features: int, width: int, classes: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(features, width, bias=False)  # the next layer's bias does for both
        self.expand = nn.Linear(width, classes)

    @property
    def in_features(self) -> int:
        return self.reduce.in_features

    @property
    def out_features(self) -> int:
        return self.expand.out_features

    def forward(self, features: Tensor) -> Tensor:
        """Float [N, C] -> logits float [N, classes]."""
        return self.expand(self.reduce(features))


def names(module: nn.Module) -> tuple[str, ...]:
    """Names of a timm network's last layers: one, or two where it is distilled by a token of its own."""
    config: Any = getattr(module, "pretrained_cfg", None) or {}
    classifier = config.get("classifier") or ()
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)


def narrow(module: nn.Module, arch: str, width: int) -> None:
    """Put a bottleneck of ``width`` in front of the classes of a timm network, in place.

    Raises:
        RetortError: when the network does not end in a fully connected layer, or ``width`` is no bottleneck.
    """
    for name in names(module):
        last = module.get_submodule(name)
        if not isinstance(last, nn.Linear):
            raise RetortError(
                f"arch.head.bottleneck: {arch} ends in {type(last).__name__}, not in a fully connected "
                "layer; set it to null"
            )
        if width >= min(last.in_features, last.out_features):
            raise RetortError(
                f"arch.head.bottleneck: {width} narrows nothing between {last.in_features} features and "
                f"{last.out_features} classes; set it lower, or to null"
            )
        parent, _, child = name.rpartition(".")
        head = Bottleneck(last.in_features, width, last.out_features)
        setattr(module.get_submodule(parent), child, head)

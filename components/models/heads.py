"""Heads: the plain fully connected layer, and a bottleneck for very many classes (row 2.2 of the FAQ)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from components.common.errors import RetortError
from components.common.storage import human_bytes

LIMIT = 0.5  # share of a model's parameters above which a bottleneck is advised
NARROWEST = 16  # width below which none is advised: too few numbers to tell many classes apart


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


@dataclass(frozen=True)
class FCShare:
    """What the last fully connected layer holds of a model; a bottleneck counts as a part of it.

    Attributes:
        features, classes: C and the number of classes.
        fc, whole: parameters of the layer, and of the model with it.
        heads: how many such layers there are: two, where a token of its own is distilled.
    """

    features: int
    classes: int
    fc: int
    whole: int
    heads: int = 1

    @property
    def share(self) -> float:
        return self.fc / self.whole

    def narrowed(self, width: int) -> int:
        """Parameters of the layer with a bottleneck: C x w + w x classes, and a bias for each class."""
        return self.heads * (width * (self.features + self.classes) + self.classes)

    @property
    def width(self) -> int | None:
        """The widest bottleneck, a power of two, that leaves the layer at most half of the model.

        NARROWEST where none does; None where the layer holds no more than half as it is, or where a
        bottleneck saves nothing.
        """
        if self.share <= LIMIT:
            return None
        width = NARROWEST
        while self._fits(2 * width):
            width *= 2
        return width if width < min(self.features, self.classes) and self.narrowed(width) < self.fc else None

    def _fits(self, width: int) -> bool:
        held = self.narrowed(width)
        return width < min(self.features, self.classes) and held <= LIMIT * (self.whole - self.fc + held)


def fc_share(module: nn.Module) -> FCShare | None:
    """How much of a timm network its classifier holds (row 2.2 of the FAQ); None when it has no FC layer.

    Works on the device ``meta`` too.
    """
    last = [module.get_submodule(name) for name in names(module)]
    last = [layer for layer in last if isinstance(layer, nn.Linear | Bottleneck)]
    if not last:
        return None
    first: Any = last[0]
    return FCShare(
        features=first.in_features,
        classes=first.out_features,
        fc=sum(tensor.numel() for layer in last for tensor in layer.parameters()),
        whole=sum(tensor.numel() for tensor in module.parameters()),
        heads=len(last),
    )


def fc_finding(found: FCShare, where: str) -> dict[str, Any]:
    """The finding ``head.fc_share``, as ``Finding`` takes it.

    Args:
        where: the section of params.yaml whose network it is, such as ``teacher``.
    """
    said = (
        f"the last FC layer holds {found.share:.1%} of all parameters: {found.fc:,} of {found.whole:,} "
        f"({found.features} features, {found.classes:,} classes)"
    )
    advice = ""
    if found.share > LIMIT:
        width = found.width
        advice = "No bottleneck would make it smaller."
        if width is not None:
            saved = found.fc - found.narrowed(width)
            advice = (
                f"A bottleneck of {width} ({where}.arch.head.bottleneck={width}) takes "
                f"C x w + w x classes = {found.features} x {width} + {width} x {found.classes:,} in place of "
                f"C x classes: {saved:,} parameters less, {human_bytes(4 * saved)} in float32."
            )
    return {
        "rule": "head.fc_share",
        "level": "warning" if found.share > LIMIT else "info",
        "subject": f"{where}.arch.head",
        "message": said,
        "measured": round(found.share, 4),
        "limit": LIMIT,
        "advice": advice,
        "row": "2.2",
    }

"""Published weights as a classifier: with the head that they were published with, if they were."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from components.common.errors import RetortError
from components.models import heads
from components.weights.convert import Target, convert
from components.weights.coverage import Coverage, compare, shapes
from components.weights.load import backbone, fill
from components.weights.readers import read

if TYPE_CHECKING:
    from torch import nn


def load_classifier(module: nn.Module, arch: str, path: Path) -> Coverage:
    """Load published weights as they are, head and all, so that the network predicts their own classes.

    Args:
        module: a plain network of the architecture ``arch``, with as many classes as the weights have.
        path: a file or folder of any kind that can be read.

    Raises:
        RetortError: when the weights have no head, so that nothing can be predicted with them; when class
            counts do not fit; when any tensor of the network is not filled.
    """
    own = module.state_dict()
    target = Target(arch, shapes(backbone(module)), heads.names(module))
    converted = convert(read(path), target, path)
    if converted.classes is None:
        raise RetortError(
            f"{path}: these weights have no head, so they cannot predict: finetune a network that starts "
            "from them ('retort finetune'), and predict with that"
        )
    found = {**converted.backbone, **converted.head}
    coverage = compare(shapes(own), shapes(found))
    if coverage.share < 1:
        head = [fault for fault in coverage.wrong_shape if fault[0] in converted.head]
        way = "; build the network with as many classes as the weights have" if head else ""
        raise RetortError(f"{path}: fills {coverage.share:.1%} of {arch}: {coverage.faults()}{way}")
    fill(own, found)
    return coverage

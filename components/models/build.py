"""Networks by name: any of timm's, or one of our variants, with the head and the blocks of ``arch``."""

from __future__ import annotations

import difflib
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from components.common.errors import RetortError
from components.models import acb, heads
from components.models.params import Arch

if TYPE_CHECKING:
    from torch import nn


def create(arch: Arch, class_num: int) -> nn.Module:
    """The network that ``arch`` describes, with random weights; ``class_num`` 0: without a head.

    Images float32 [N, 3, H, W] -> logits float32 [N, class_num], or pooled features float32 [N, D].

    Raises:
        RetortError: when there is no such architecture, or it does not take such a head.
    """
    return with_blocks(plain(arch, class_num), arch)


def plain(arch: Arch, class_num: int) -> nn.Module:
    """The same with plain convolutions: what published weights are made for, and loaded into.

    Its backbone's tensor names are those of ``timm.create_model(arch.name)``.
    """
    module = _timm(arch.name, class_num)
    if class_num and arch.head.bottleneck:
        heads.narrow(module, arch.name, arch.head.bottleneck)
    return module


def with_blocks(module: nn.Module, arch: Arch) -> nn.Module:
    """Turn a plain network's convolutions into the blocks of ``arch``; its outputs stay the same.

    Raises:
        RetortError: when there is none that they can stand for.
    """
    if arch.blocks == "acb" and not acb.widen(module):
        raise RetortError(
            f"arch.blocks: {arch.name} has no square convolution that an ACB block can stand for "
            "(or only in blocks with branches of their own); set it to plain"
        )
    return module


def preprocessing(arch: Arch) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation per RGB channel, for pixels in 0..1, that the architecture expects."""
    config = _config(arch.name)
    mean, std = ((float(r), float(g), float(b)) for r, g, b in (config.mean, config.std))
    return mean, std


def is_transformer(module: nn.Module) -> bool:
    """Whether a network is a plain vision transformer: patches, global attention, no convolutions but one."""
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(module, VisionTransformer)


def has_distillation_head(arch: Arch) -> bool:
    """Whether the network has a second head, for what a teacher says (Touvron et al., "DeiT", 2021)."""
    classifier = _config(arch.name).classifier
    return isinstance(classifier, tuple | list) and len(classifier) == 2 and "head_dist" in classifier[1]


def _timm(name: str, class_num: int) -> nn.Module:
    import timm

    # a transformer's position embedding then fits any image size; its tensor keeps its shape
    options: dict[str, Any] = {"dynamic_img_size": True} if _config(name).fixed_input_size else {}
    try:
        return timm.create_model(name, num_classes=class_num, **options)
    except TypeError:  # a family with windows of fixed size knows no such option
        return timm.create_model(name, num_classes=class_num)


@lru_cache
def _config(name: str) -> Any:
    """timm's description of an architecture, from its registry: nothing is downloaded or built."""
    import timm

    import components.models.variants  # noqa: F401 - registers ours with timm

    base = name.partition(".")[0]  # timm appends the weights' tag after a point
    try:
        config = timm.get_pretrained_cfg(name) if timm.is_model(base) else None
    except RuntimeError:  # no such tag
        config = None
    if config is None:
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise RetortError(f"arch.name: '{name}' is no architecture of timm, nor one of ours{hint}")
    return config

"""What follows what in a network, seen by running it: names and order of registration only suggest it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SIZE = 128  # pixels, for networks that take images of any size


def made_for(module: nn.Module) -> int:
    """Height and width in pixels of the images that a timm network was designed for."""
    config: Any = getattr(module, "pretrained_cfg", None) or {}
    return int(config["input_size"][-1]) if config.get("input_size") else SIZE


def image_size(module: nn.Module) -> int:
    """Height and width in pixels of images that a timm network takes, small ones where it does not mind."""
    config: Any = getattr(module, "pretrained_cfg", None) or {}
    return made_for(module) if config.get("fixed_input_size") or config.get("min_input_size") else SIZE


def norms_behind(module: nn.Module, kind: type[nn.Module]) -> dict[str, nn.BatchNorm2d]:
    """The batch norm that takes the output of each layer of ``kind``, as it is; by the layer's name.

    Layers whose output goes to other modules too, or through anything else first, are left out. The network
    is unchanged afterwards, and may be in training: it computes one image in eval mode.
    """
    outputs: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept, so that no other takes their id
    takers: dict[str, list[nn.Module]] = {}

    def gave(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            outputs[id(output)] = (name, output)

        return hook

    def takes(part: nn.Module, inputs: tuple[Any, ...]) -> None:
        for value in inputs:
            name, output = outputs.get(id(value), ("", None))
            if output is value:
                takers.setdefault(name, []).append(part)

    hooks = []
    for name, part in module.named_modules():
        if isinstance(part, kind):
            hooks.append(part.register_forward_hook(gave(name)))
        else:
            hooks.append(part.register_forward_pre_hook(takes))
    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()
        size, like = image_size(module), next(module.parameters())
        with torch.inference_mode():
            module(torch.zeros(1, 3, size, size, device=like.device, dtype=like.dtype))
    finally:
        for hook in hooks:
            hook.remove()
        for part, training in modes.items():
            part.training = training
    return {
        name: parts[0]
        for name, parts in takers.items()
        if len(parts) == 1 and isinstance(parts[0], nn.BatchNorm2d)
    }

"""Asymmetric convolution blocks: three branches while training, one convolution afterwards.

Ding et al., "ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks",
ICCV 2019; row 3.3 of the FAQ.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Conv2dSame
from timm.layers.padding import get_same_padding
from torch import Tensor, nn
from torch.nn import functional

from components.models.dataflow import norms_behind


class ACB(nn.Module):
    """``d x d + 1 x d + d x 1``, each with a batch norm, in place of a ``d x d`` convolution.

    It begins as the convolution that it replaces: the square branch takes over its kernel, with a batch norm
    that changes nothing; the other two begin at zero.

    Args:
        conv: the convolution to replace: any d above 1, strides, dilation, groups, padding (also
            TensorFlow's SAME, which depends on the input's size).
        behind: the batch norm that takes the convolution's output. It knows that output's statistics, which
            the square branch's norm then begins with: it changes nothing in training either, and what
            ``behind`` has learnt stays true. Without it, or before any training of it, only norms that use
            their running statistics change nothing.
    """

    def __init__(self, conv: nn.Conv2d, behind: nn.BatchNorm2d | None = None) -> None:
        super().__init__()
        d = conv.kernel_size[0]
        options: dict[str, Any] = {
            "stride": conv.stride,
            "dilation": conv.dilation,
            "groups": conv.groups,
            "bias": False,
        }
        channels = conv.in_channels, conv.out_channels
        self.square = nn.Conv2d(*channels, (d, d), **options)
        self.horizontal = nn.Conv2d(*channels, (1, d), **options)
        self.vertical = nn.Conv2d(*channels, (d, 1), **options)
        self.square_bn, self.horizontal_bn, self.vertical_bn = (
            nn.BatchNorm2d(conv.out_channels) for _ in range(3)
        )
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone())
        self._same = isinstance(conv, Conv2dSame)
        self._class = type(conv)
        # as the convolution had them: networks of timm look at some of these
        self.in_channels, self.out_channels, self.groups = *channels, conv.groups
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        self.padding, self.dilation = conv.padding, conv.dilation
        with torch.no_grad():
            self.square.weight.copy_(conv.weight)
            mean, variance = _statistics(behind, conv)
            # scale and shift undo the statistics: the norm is the identity
            scale = torch.sqrt(variance + self.square_bn.eps)
            begin = {"running_mean": mean, "running_var": variance, "weight": scale, "bias": mean}
            self.square_bn.load_state_dict(begin, strict=False)
            self.horizontal_bn.weight.zero_()
            self.vertical_bn.weight.zero_()

    @property
    def _around(self) -> tuple[int, int, int, int]:
        """What the lines through the kernel's centre leave out: (before, after) in both directions."""
        d = self.square.kernel_size[0]
        rows, columns = self.square.dilation
        middle = d // 2
        return middle * rows, (d - 1 - middle) * rows, middle * columns, (d - 1 - middle) * columns

    def forward(self, images: Tensor) -> Tensor:
        """Float [N, C, H, W] -> float [N, Cout, H', W']."""
        padded = functional.pad(images, self._pad(images))
        top, bottom, left, right = self._around
        height, width = padded.shape[-2:]
        result = self.square_bn(self.square(padded))
        result = result + self.horizontal_bn(self.horizontal(padded[:, :, top : height - bottom, :]))
        result = result + self.vertical_bn(self.vertical(padded[:, :, :, left : width - right]))
        return result if self.bias is None else result + self.bias.view(1, -1, 1, 1)

    def _pad(self, images: Tensor) -> list[int]:
        """Left, right, top, bottom, as ``functional.pad`` takes them."""
        kernel, stride, dilation = self.square.kernel_size, self.square.stride, self.square.dilation
        if self._same:
            sides = [
                get_same_padding(size, k, s, d)
                for size, k, s, d in zip(images.shape[-2:], kernel, stride, dilation, strict=True)
            ]
            (top, bottom), (left, right) = ((side // 2, side - side // 2) for side in sides)
            return [left, right, top, bottom]
        assert not isinstance(self.padding, str)  # see ``fits``
        rows, columns = self.padding
        return [columns, columns, rows, rows]

    def fold(self) -> nn.Conv2d:
        """The plain convolution of the same outputs: kernels times their norms' scales, summed (sec. 3.3)."""
        options: dict[str, Any] = {
            "stride": self.square.stride,
            "padding": self.padding,
            "dilation": self.square.dilation,
            "groups": self.square.groups,
        }
        channels = self.square.in_channels, self.square.out_channels
        conv = self._class(*channels, self.square.kernel_size[0], **options).to(self.square.weight)
        middle = self.square.kernel_size[0] // 2
        with torch.no_grad():
            kernel, bias = _scaled(self.square, self.square_bn)
            across, across_bias = _scaled(self.horizontal, self.horizontal_bn)
            down, down_bias = _scaled(self.vertical, self.vertical_bn)
            kernel[:, :, middle : middle + 1, :] += across
            kernel[:, :, :, middle : middle + 1] += down
            bias = bias + across_bias + down_bias
            conv.weight.copy_(kernel)
            assert conv.bias is not None
            conv.bias.copy_(bias if self.bias is None else bias + self.bias)
        return conv


def _statistics(behind: nn.BatchNorm2d | None, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Mean and variance of a convolution's outputs before its bias, float [Cout]; 0 and 1 if not known."""
    if behind is None or behind.running_mean is None or behind.running_var is None:
        return torch.zeros(conv.out_channels), torch.ones(conv.out_channels)
    bias = 0 if conv.bias is None else conv.bias
    return behind.running_mean - bias, behind.running_var


def _scaled(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Kernel and bias of a convolution and the batch norm after it, as one."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return conv.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale


def fits(conv: nn.Module) -> bool:
    """Whether a layer is a square convolution that a block can stand for."""
    if not isinstance(conv, nn.Conv2d) or type(conv) not in (nn.Conv2d, Conv2dSame):
        return False
    d, other = conv.kernel_size
    return d == other and d > 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _folds(block: nn.Module) -> bool:
    return any(callable(getattr(block, way, None)) for way in ("reparameterize", "fuse"))


def widen(module: nn.Module) -> int:
    """Replace every square convolution of a network by a block, in place; returns how many.

    Those inside blocks that timm folds (RepVGG's, MobileOne's, ...) stay: these blocks have branches of their
    own, and their folding takes a convolution without a bias for granted, which a folded block has.
    """
    folded = tuple(f"{name}." for name, block in module.named_modules() if name and _folds(block))
    found = [
        (name, conv) for name, conv in module.named_modules() if fits(conv) and not name.startswith(folded)
    ]
    behind = norms_behind(module, nn.Conv2d) if found else {}
    for name, conv in found:
        assert isinstance(conv, nn.Conv2d)
        _replace(module, name, ACB(conv, behind.get(name)).to(conv.weight).train(conv.training))
    return len(found)


def narrow(module: nn.Module) -> int:
    """Fold every block of a network to the plain convolution that it stands for, in place; returns how many.

    The bias that folding leaves goes into the mean of the norm behind, so that the network has the tensors of
    the plain one again. It computes the same with running statistics.
    """
    behind = norms_behind(module, ACB)
    found = [(name, block) for name, block in module.named_modules() if isinstance(block, ACB)]
    for name, block in found:
        conv, norm = block.fold().train(block.training), behind.get(name)
        if block.bias is None and conv.bias is not None and norm is not None:
            assert norm.running_mean is not None
            with torch.no_grad():
                norm.running_mean -= conv.bias
            conv.bias = None
        _replace(module, name, conv)
    return len(found)


def _replace(module: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, part)

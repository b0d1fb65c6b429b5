"""Operations on the pixels of many images at once, each image with its own argument; on a CPU or a GPU.

Pixels are float32 [n, 3, S, S] in 0..255, arguments float32 [n, 1, 1, 1]. No result depends on which images
are beside it: there is no fused multiply-add, which the end of a vector would go without, and sums over
pixels are of whole numbers, so that their order is of no account. The definitions are those of
torchvision.transforms.v2.functional, which takes one argument for all images; here nothing is rounded in
between.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from components.models.recipes import Op

GREY = (0.2989, 0.587, 0.114)  # weights of R, G, B in a pixel's lightness (ITU-R BT.601)


def grid(theta: Tensor, size: int) -> Tensor:
    """Where each pixel of a picture lies in its source: theta float32 [n, 2, 3] -> float32 [n, S, S, 2]."""
    at = (torch.arange(size, dtype=torch.float32, device=theta.device) * 2 + 1) / size - 1
    places = torch.empty((len(theta), size, size, 2), device=theta.device)
    for k in (0, 1):
        x, y, add = (theta[:, k, part, None, None] for part in range(3))
        torch.add(at[None, None, :] * x, at[None, :, None] * y + add, out=places[..., k])
    return places


def sample(pixels: Tensor, places: Tensor) -> Tensor:
    """Interpolate bilinearly; beyond the source its border goes on.

    Args:
        pixels: uint8 [n, 3, H, W].
        places: float32 [n, S, S, 2], see ``grid``.
    """
    values = (
        pixels.float()
    )  # in the layout it has: bringing channels first costs a third of the interpolation
    return functional.grid_sample(values, places, mode="bilinear", padding_mode="border", align_corners=False)


def grey(values: Tensor) -> Tensor:
    """The lightness of each pixel, float32 [n, 1, S, S]."""
    red, green, blue = values.split(1, dim=1)
    return red * GREY[0] + green * GREY[1] + blue * GREY[2]


def linear(values: Tensor, weights: Tensor, mixes: bool = True) -> Tensor:
    """``a`` x pixel + ``b`` x its grey + ``c`` x the image's mean grey + ``d``, clipped to 0..255; in place.

    Brightness is (f, 0, 0, 0), contrast (f, 0, 1 - f, 0), saturation (f, 1 - f, 0, 0).

    Args:
        weights: float32 [n, 4]: a, b, c, d.
        mixes: whether b or c are anything but 0.
    """
    a, b, c, d = (part[:, :, None, None] for part in weights.split(1, dim=1))
    if not mixes:
        return values.mul_(a).add_(d).clamp_(0, 255)
    lightness = grey(values)
    mean = lightness.round().sum((2, 3), keepdim=True, dtype=torch.float64) / lightness[0].numel()
    return values.mul_(a).add_(lightness.mul_(b).add_(mean.float() * c + d)).clamp_(0, 255)


def sharpness(values: Tensor, factor: Tensor) -> Tensor:
    """Away from (factor below 1: towards) the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13; its rim stays."""
    inner = values[..., 1:-1, 1:-1]
    smooth = (functional.avg_pool2d(values, 3, stride=1) * 9 + inner * 4) / 13
    result = values.clone()
    result[..., 1:-1, 1:-1] += (smooth - inner) * (1 - factor)
    return result.clamp_(0, 255)


def posterize(values: Tensor, kept: Tensor) -> Tensor:
    """Keep the upper ``kept`` bits of each byte."""
    step = torch.exp2(8 - kept)
    return (values.round() / step).floor() * step


def solarize(values: Tensor, threshold: Tensor) -> Tensor:
    """Invert what is at least ``threshold``."""
    return torch.where(values >= threshold, 255 - values, values)


def solarize_add(values: Tensor, added: Tensor) -> Tensor:
    """Add to what is below 128."""
    return torch.where(values < 128, (values + added).clamp_(max=255), values)


def autocontrast(values: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel from its smallest and largest value to 0 and 255."""
    low, high = values.amin((2, 3), keepdim=True), values.amax((2, 3), keepdim=True)
    flat = high <= low
    scale = torch.where(flat, 1.0, 255 / torch.where(flat, 1.0, high - low))
    return (values - torch.where(flat, 0.0, low)) * scale


def equalize(values: Tensor, _: Tensor) -> Tensor:
    """Even out the histogram of each channel, by Pillow's rule (ImageOps.equalize)."""
    level = values.round().to(torch.int64).flatten(2)
    pixels = level.shape[2]
    counts = torch.zeros((*level.shape[:2], 256), dtype=torch.int64, device=values.device)
    counts.scatter_add_(2, level, torch.ones_like(level[:1, :1, :1]).expand_as(level))
    step = (pixels - counts.gather(2, level.amax(2, keepdim=True))) // 255
    below = counts.cumsum(2) - counts
    table = ((below + step // 2) // step.clamp_min(1)).clamp_(max=255)
    table = torch.where(step == 0, torch.arange(256, device=values.device), table)
    return table.gather(2, level).view_as(values).float()


def linear_weights(op: np.ndarray, argument: np.ndarray) -> np.ndarray:
    """The weights of ``linear``, float64 [n, 4], of operations that are LINEAR: op and argument [n]."""
    weights = np.zeros((len(op), 4))
    weights[:, 0] = np.where(op == Op.INVERT, -1, argument)
    weights[:, 1] = np.where(op == Op.COLOUR, 1 - argument, 0)
    weights[:, 2] = np.where(op == Op.CONTRAST, 1 - argument, 0)
    weights[:, 3] = np.where(op == Op.INVERT, 255, 0)
    return weights


OPERATIONS: dict[Op, Callable[[Tensor, Tensor], Tensor]] = {
    Op.SHARPNESS: sharpness,
    Op.POSTERIZE: posterize,
    Op.SOLARIZE: solarize,
    Op.SOLARIZE_ADD: solarize_add,
    Op.AUTOCONTRAST: autocontrast,
    Op.EQUALIZE: equalize,
}


def erase(values: Tensor, boxes: Tensor, places: Tensor, tile: Tensor) -> Tensor:
    """Noise in a box of each image.

    Args:
        boxes: float32 [n, 4]: top, left, bottom, right.
        places: float32 [n, 2]: where an image's noise begins in the tile, which goes on at its other side.
        tile: float32 [3, S, S].
    """
    size = values.shape[-1]
    at = torch.arange(size, device=values.device)
    top, left, bottom, right = boxes[:, :, None, None].unbind(1)
    down, along = at[:, None], at[None, :]
    inside = ((down >= top) & (down < bottom) & (along >= left) & (along < right))[:, None]
    y, x = ((places.long()[:, :, None] + at) % size).unbind(1)
    return torch.where(inside, tile[:, y[:, :, None], x[:, None, :]].movedim(0, 1), values)


def fill_outside(values: Tensor, places: Tensor, colour: Tensor) -> Tensor:
    """One colour, float32 [1, 3, 1, 1], where ``places`` lie beyond the source."""
    return torch.where((places.abs() > 1).any(3)[:, None], colour, values)

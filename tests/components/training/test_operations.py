"""Operations on pixels give what torchvision gives for one image at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from components.models.recipes import LINEAR, Op
from components.training import operations
from tests.components.training.pictures import differs, pictures

SIZE = 40
FACTORS = (0.1, 0.6, 1.0, 1.5, 1.9)
BESIDE: dict[Op, Callable[[Tensor, float], Tensor]] = {
    Op.BRIGHTNESS: reference.adjust_brightness,
    Op.CONTRAST: reference.adjust_contrast,
    Op.COLOUR: reference.adjust_saturation,
    Op.INVERT: lambda picture, _: reference.invert(picture),
    Op.SHARPNESS: reference.adjust_sharpness,
    Op.POSTERIZE: lambda picture, bits: reference.posterize(picture, int(bits)),
    Op.SOLARIZE: reference.solarize,
    Op.AUTOCONTRAST: lambda picture, _: reference.autocontrast(picture),
    Op.EQUALIZE: lambda picture, _: reference.equalize(picture),
}
IN_FLOAT = (Op.BRIGHTNESS, Op.CONTRAST, Op.COLOUR, Op.SHARPNESS)  # torchvision rounds bytes down, twice here
ARGUMENTS = {Op.POSTERIZE: (1.0, 2.0, 4.0, 7.0, 8.0), Op.SOLARIZE: (0.0, 1.0, 100.0, 200.0, 255.0)}


def after(pixels: Tensor, op: Op, arguments: tuple[float, ...]) -> Tensor:
    """Uint8 images after one operation, each with its own argument."""
    values = pixels.float()
    if op in LINEAR:
        weights = operations.linear_weights(np.full(len(pixels), op), np.array(arguments))
        return operations.linear(values, torch.from_numpy(weights).float()).round().to(torch.uint8)
    argument = torch.tensor(arguments).view(-1, 1, 1, 1)
    return operations.OPERATIONS[op](values, argument).round().to(torch.uint8)


def noise(count: int, size: int) -> Tensor:
    made = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(1))
    return made.to(torch.uint8)


def dark(count: int, size: int) -> Tensor:
    """Images that use some of the grey levels only, so that stretching them does something."""
    return (noise(count, size) * 0.2 + pictures(count, size, seed=2) * 0.3 + 30).to(torch.uint8)


@pytest.mark.parametrize("op", list(BESIDE))
@pytest.mark.parametrize("make", [noise, dark])
def test_an_operation_is_torchvisions(op: Op, make: Callable[[int, int], Tensor]) -> None:
    arguments = ARGUMENTS.get(op, FACTORS)
    source = make(len(arguments), SIZE)
    made = after(source, op, arguments)
    for before, result, argument in zip(source, made, arguments, strict=True):
        if op in IN_FLOAT:
            expected = BESIDE[op](before.float() / 255, argument) * 255
            assert (result.float() - expected).abs().max() <= 0.7, argument  # 0.5 of it is our rounding
        assert differs(result, BESIDE[op](before, argument)).max() <= (2 if op is Op.COLOUR else 1), argument
    if make is dark:  # noise has the whole range of levels already
        assert differs(made, source).max() > 10, "something happens at all"


def test_images_of_one_colour_stay() -> None:
    flat = torch.full((3, 3, 16, 16), 90, dtype=torch.uint8)
    for op in (Op.AUTOCONTRAST, Op.EQUALIZE, Op.SHARPNESS, Op.COLOUR, Op.CONTRAST):
        assert torch.equal(after(flat, op, (0.5, 1.0, 1.7)), flat), op.name


def test_dark_pixels_become_brighter() -> None:
    """timm's solarize_add: below 128 ``min(255, level + added)``."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    made = after(levels, Op.SOLARIZE_ADD, (110.0,))[0, 0].flatten().tolist()
    assert made == [level + 110 if level < 128 else level for level in range(256)]


def test_brightness_contrast_and_saturation_in_any_order() -> None:
    """One linear map does what torchvision's ColorJitter does one after the other, in whichever order."""
    source = (pictures(1, SIZE)[0] * 0.4 + 70).to(torch.uint8)  # nothing is clipped on the way
    bright, contrast, saturation = 1.1, 0.7, 1.3
    weights = torch.tensor(
        [[bright * contrast * saturation, bright * contrast * (1 - saturation), bright * (1 - contrast), 0.0]]
    )
    made = operations.linear(source.float()[None], weights)[0].round().to(torch.uint8)
    steps = [
        lambda image: reference.adjust_brightness(image, bright),
        lambda image: reference.adjust_contrast(image, contrast),
        lambda image: reference.adjust_saturation(image, saturation),
    ]
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        expected = source
        for step in order:
            expected = steps[step](expected)
        assert differs(made, expected).max() <= 3, "three roundings down"

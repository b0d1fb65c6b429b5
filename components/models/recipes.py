"""Recipes of augmentation, by name: what ``train.augment`` may be. Data alone, without torch.

A recipe is an entry in ``RECIPES``. An operation that none has yet is a name at the end of ``Op``, and its
function in ``OPERATIONS`` of ``components/training/operations.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal


class Op(IntEnum):
    """Operations of RandAugment and TrivialAugment."""

    IDENTITY = 0
    ROTATE = 1  # argument in degrees
    SHEAR_X = 2  # pixels along, for each pixel across
    SHEAR_Y = 3
    TRANSLATE_X = 4  # share of the side
    TRANSLATE_Y = 5
    BRIGHTNESS = 6  # factor: 1 changes nothing
    CONTRAST = 7
    COLOUR = 8
    INVERT = 9
    SHARPNESS = 10
    POSTERIZE = 11  # bits that stay
    SOLARIZE = 12  # grey level from which on pixels are inverted
    SOLARIZE_ADD = 13  # added to pixels below 128
    AUTOCONTRAST = 14
    EQUALIZE = 15


GEOMETRIC = range(Op.ROTATE, Op.BRIGHTNESS)
LINEAR = range(Op.BRIGHTNESS, Op.SHARPNESS)  # those that are one linear map of a pixel, its grey and the mean


@dataclass(frozen=True)
class Policy:
    """Which operations an image draws, and how strong they are.

    Args:
        ops: what is drawn from, each equally often, with replacement.
        count: operations an image.
        probability: that one that was drawn is applied.
        level: mean of the strength in 0..1; None: one of 31 steps from 0 to 1, equally often.
        deviation: of the level, which is normally distributed and clipped to 0..1.
        spans: operation, its argument at level 0, the change up to level 1, whether that has a random sign.
        whole_bits: how the bits that ``POSTERIZE`` keeps become whole: rounded up, or to the nearest.
    """

    ops: tuple[Op, ...]
    count: int
    probability: float
    level: float | None
    deviation: float
    spans: tuple[tuple[Op, float, float, bool], ...]
    whole_bits: Literal["up", "nearest"]


# Cubuk et al., "RandAugment", 2020, as DeiT uses it: "rand-m9-mstd0.5-inc1" of timm/data/auto_augment.py.
# Shears are about the centre here, not about a corner, and one bit is the least that is kept.
RAND_AUGMENT = Policy(
    ops=(
        Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.BRIGHTNESS, Op.CONTRAST,
        Op.COLOUR, Op.INVERT, Op.SHARPNESS, Op.POSTERIZE, Op.SOLARIZE, Op.SOLARIZE_ADD, Op.AUTOCONTRAST,
        Op.EQUALIZE,
    ),
    count=2,
    probability=0.5,
    level=0.9,
    deviation=0.05,
    spans=(
        (Op.ROTATE, 0, 30, True),
        (Op.SHEAR_X, 0, 0.3, True), (Op.SHEAR_Y, 0, 0.3, True),
        (Op.TRANSLATE_X, 0, 0.45, True), (Op.TRANSLATE_Y, 0, 0.45, True),
        (Op.BRIGHTNESS, 1, 0.9, True), (Op.CONTRAST, 1, 0.9, True),
        (Op.COLOUR, 1, 0.9, True), (Op.SHARPNESS, 1, 0.9, True),
        (Op.POSTERIZE, 4, -4, False), (Op.SOLARIZE, 256, -256, False), (Op.SOLARIZE_ADD, 0, 110, False),
    ),
    whole_bits="up",
)  # fmt: skip
# Mueller and Hutter, "TrivialAugment", 2021, table 5 (wide), as torchvision's TrivialAugmentWide has it: a
# translation of 32 of 224 pixels, at every size.
TRIVIAL_AUGMENT = Policy(
    ops=(
        Op.IDENTITY, Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.BRIGHTNESS,
        Op.CONTRAST, Op.COLOUR, Op.SHARPNESS, Op.POSTERIZE, Op.SOLARIZE, Op.AUTOCONTRAST, Op.EQUALIZE,
    ),
    count=1,
    probability=1.0,
    level=None,
    deviation=0.0,
    spans=(
        (Op.ROTATE, 0, 135, True),
        (Op.SHEAR_X, 0, 0.99, True), (Op.SHEAR_Y, 0, 0.99, True),
        (Op.TRANSLATE_X, 0, 32 / 224, True), (Op.TRANSLATE_Y, 0, 32 / 224, True),
        (Op.BRIGHTNESS, 1, 0.99, True), (Op.CONTRAST, 1, 0.99, True),
        (Op.COLOUR, 1, 0.99, True), (Op.SHARPNESS, 1, 0.99, True),
        (Op.POSTERIZE, 8, -6, False), (Op.SOLARIZE, 255, -255, False),
    ),
    whole_bits="nearest",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What is done to an image, and how images and labels are mixed.

    Args:
        source: what it reads: the central square of the image, or its canvas (``images.canvas``).
        zoom, shift: largest change of scale, and of place as a share of the side.
        crop: smallest and largest share of the area in a random crop with an aspect of 3/4 to 4/3 (Szegedy et
            al., "Going deeper with convolutions", 2015, sec. 6); None: the whole square.
        flip: whether an image is mirrored half the time.
        gain, offset: largest change of contrast (about mid-grey) and of brightness (as a share of 128).
        jitter: largest change of brightness, contrast and saturation, each as a factor.
        policy: further operations.
        erase: probability that a box of 2 to 33 % of the area becomes noise (Zhong et al., "Random Erasing",
            2020, alg. 1; its pixels as in DeiT).
        mixup, cutmix: parameter of the Beta distribution, see ``mix``; 0: never.
        label_smoothing: share of a hard label that is spread over all classes (Szegedy et al., "Rethinking
            the Inception architecture", 2016, sec. 7).
        repeats: views of an image in one batch (Hoffer et al., "Augment your batch", 2020); see
            ``sampling.Epochs``.
    """

    source: Literal["square", "canvas"] = "square"
    zoom: float = 0.0
    shift: float = 0.0
    crop: tuple[float, float] | None = None
    flip: bool = False
    gain: float = 0.0
    offset: float = 0.0
    jitter: float = 0.0
    policy: Policy | None = None
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    repeats: int = 1


_LIGHT = Recipe(zoom=0.1, shift=0.08, gain=0.2, offset=0.2)
RECIPES: dict[str, Recipe] = {
    "none": Recipe(),
    "light": _LIGHT,
    "flip": replace(_LIGHT, flip=True),
    # crop, mirror and colour as timm's train.py has them when nothing is asked for, but no crop below 70 % of
    # the area: with 35 %, finetunes of a few epochs and hundreds of images lost another three points
    "standard": Recipe(source="canvas", crop=(0.7, 1.0), flip=True, jitter=0.4),
    # torchvision's recipe of 2021 (references/classification, "new training recipe": ResNet-50, 80.9 %)
    "strong": Recipe(
        source="canvas", crop=(0.08, 1.0), flip=True, policy=TRIVIAL_AUGMENT, erase=0.1,
        mixup=0.2, cutmix=1.0, label_smoothing=0.1,
    ),
    # Touvron et al., "Training data-efficient image transformers", 2021, table 9
    "deit": Recipe(
        source="canvas", crop=(0.08, 1.0), flip=True, policy=RAND_AUGMENT, erase=0.25,
        mixup=0.8, cutmix=1.0, label_smoothing=0.1, repeats=3,
    ),
}  # fmt: skip

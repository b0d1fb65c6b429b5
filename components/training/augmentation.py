"""Augmentation: named recipes, made for whole batches, whose pictures depend on (seed, view, row) alone.

All random numbers come from the host, from a counter-based generator; pixels are computed where they lie, on
a CPU or a GPU, without waiting for it. Crop, mirror and every other geometric operation of an image are one
affine map, so its pixels are read once and interpolated once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.common.errors import ConfigError
from components.models.recipes import GEOMETRIC, LINEAR, RECIPES, Op, Policy, Recipe
from components.training import operations
from components.training.sampling import generator

NO_AUGMENT = -1  # the view that is not augmented
VERSION = 2  # of what is computed here: caches of what another number computed are not used
MIXING = 0x4D4958  # part of the key of what ``mix`` draws, so that nothing else draws the same
TRIES = 10  # crops, and boxes to erase, that are drawn before an image goes without (Inception's code)
CHUNK_BYTES = 2 << 20  # pixels as float that a CPU works on at once: more leaves its caches, and takes longer
MEAN, DEVIATION = (124.0, 116.0, 104.0), (58.0, 57.0, 57.0)  # of ImageNet, RGB in 0..255


def recipe_of(name: str, **values: float | None) -> Recipe:
    """The recipe of a name; values that are not None take the place of its own.

    Raises:
        ConfigError: when there is none of that name.
    """
    if name not in RECIPES:
        raise ConfigError(f"train.augment: '{name}' is none of {', '.join(RECIPES)}")
    return replace(RECIPES[name], **{key: value for key, value in values.items() if value is not None})  # type: ignore[arg-type]


def canvas_size(size: int) -> int:
    """Side of the canvas for pictures of ``size`` pixels: a crop of half the area needs no enlarging."""
    return math.ceil(size * math.sqrt(2) / 4) * 4


# ---- random numbers -------------------------------------------------------------------------------------

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64; uint64, of any shape, wrapping around."""
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))


def bits(key: np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` outputs of SplitMix64 (Steele et al., 2014, fig. 13) for each state in ``key``.

    Args:
        key: uint64 [B].

    Returns:
        uint64 [B, count].
    """
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return _mixed(key[:, None] + steps)


def uniforms(seed: int, views: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """Numbers in [0, 1), float64 [B, count], that depend on (seed, view, row) and their place alone.

    Args:
        views, rows: int64 [B].
    """
    key = _mixed(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) + _GOLDEN)
    for part in (views, rows):
        key = _mixed((key ^ part.astype(np.int64).view(np.uint64)) + _GOLDEN)
    return (bits(key, count) >> np.uint64(11)) * 2.0**-53


class _Stream:
    """Where in its row of uniforms each draw of an image lies: a new one goes at the end."""

    AREA = slice(0, TRIES)
    ASPECT = slice(TRIES, 2 * TRIES)
    PLACE = slice(20, 22)
    FLIP = 22
    COLOUR = slice(23, 26)
    ZOOM = 26
    ERASE = 27
    BOX_AREA = slice(28, 28 + TRIES)
    BOX_ASPECT = slice(38, 38 + TRIES)
    BOX_PLACE = slice(48, 50)
    NOISE = slice(50, 52)
    OPS = 52  # five numbers for each operation
    COUNT = 62


# ---- what is drawn for each image -----------------------------------------------------------------------


@dataclass(frozen=True)
class Draws:
    """What happens to each of B images; numpy, on the host.

    Args:
        theta: float32 [B, 2, 3]: place in the picture -> place in the source, both in [-1, 1].
        moved: bool [B]: the map may leave the source, whose outside is filled then.
        colour: float32 [B, 4]: factors of a pixel, of its grey and of the mean grey, and what is added.
        ops: int [B, count] and their ``arguments`` float64 [B, count].
        boxes: int [B, 4]: top, left, bottom, right of what is erased; empty where nothing is.
        noise: int [B, 2]: where in the tile of noise an image reads.
    """

    theta: np.ndarray
    moved: np.ndarray
    colour: np.ndarray
    ops: np.ndarray
    arguments: np.ndarray
    boxes: np.ndarray
    noise: np.ndarray

    def __getitem__(self, part: slice) -> Draws:
        return Draws(*(getattr(self, item.name)[part] for item in fields(self)))


def draw(
    recipe: Recipe, seed: int, rows: np.ndarray, views: np.ndarray, aspects: np.ndarray, size: int
) -> Draws:
    """Draw for each image; NO_AUGMENT views draw the central square and nothing else.

    Args:
        rows, views: int64 [B].
        aspects: float [B], width over height of the image that the source shows.
        size: pixels a side of the picture.
    """
    count = len(rows)
    u = uniforms(seed, views, rows, _Stream.COUNT)
    theta = _maps(np.minimum(1, 1 / aspects), np.minimum(1, aspects))
    colour = np.tile([1.0, 0.0, 0.0, 0.0], (count, 1))
    ops, arguments = np.zeros((count, 0), dtype=np.int64), np.zeros((count, 0))
    if recipe.crop is not None:
        theta = _crops(recipe.crop, u, aspects)
    if recipe.zoom or recipe.shift:
        zoom = 1 / _between(u[:, _Stream.ZOOM], 1 - recipe.zoom, 1 + recipe.zoom)
        place = _between(u[:, _Stream.PLACE], -2 * recipe.shift, 2 * recipe.shift)
        theta = theta @ _maps(zoom, zoom, *place.T)
    if recipe.flip:
        theta = theta @ _maps(np.where(u[:, _Stream.FLIP] < 0.5, -1.0, 1.0), np.ones(count))
    if recipe.gain or recipe.offset:
        gain = _between(u[:, _Stream.COLOUR.start], 1 - recipe.gain, 1 + recipe.gain)
        added = _between(u[:, _Stream.COLOUR.start + 1], -recipe.offset, recipe.offset) * 128
        colour[:, 0], colour[:, 3] = gain, 128 * (1 - gain) + added
    if recipe.jitter:
        # as long as nothing is clipped in between these three commute, so their order, which others draw too,
        # makes no difference: contrast keeps the mean grey, saturation every pixel's grey
        light, contrast, saturation = _between(u[:, _Stream.COLOUR], 1 - recipe.jitter, 1 + recipe.jitter).T
        colour[:, 0] = light * contrast * saturation
        colour[:, 1] = light * contrast * (1 - saturation)
        colour[:, 2] = light * (1 - contrast)
    if recipe.policy is not None:
        ops, arguments = _operations(recipe.policy, u)
        for op, argument in zip(ops.T, arguments.T, strict=True):
            theta = theta @ _moves(op, argument)
    boxes = _boxes(recipe.erase, u, size) if recipe.erase else np.zeros((count, 4), dtype=np.int64)
    plain = views == NO_AUGMENT
    if plain.any():
        theta[plain] = _maps(np.minimum(1, 1 / aspects), np.minimum(1, aspects))[plain]
        colour[plain], ops[plain], boxes[plain] = [1, 0, 0, 0], Op.IDENTITY, 0
    return Draws(
        theta=theta[:, :2].astype(np.float32),
        moved=np.asarray(_in(ops, GEOMETRIC).any(1)),
        colour=colour.astype(np.float32),
        ops=ops,
        arguments=arguments,
        boxes=boxes,
        noise=(u[:, _Stream.NOISE] * size).astype(np.int64),
    )


def _in(ops: np.ndarray, kind: range) -> np.ndarray:
    return (ops >= kind.start) & (ops < kind.stop)


def _between(u: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + u * (high - low)


def _maps(
    width: np.ndarray, height: np.ndarray, x: np.ndarray | float = 0.0, y: np.ndarray | float = 0.0
) -> np.ndarray:
    """Maps float64 [B, 3, 3] onto boxes of relative size [B] with their centres at (x, y) in [-1, 1]."""
    maps = np.zeros((len(width), 3, 3))
    maps[:, 0, 0], maps[:, 1, 1], maps[:, 2, 2] = width, height, 1
    maps[:, 0, 2], maps[:, 1, 2] = x, y
    return maps


def _first(fits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of tries bool [B, n]: an index of each row, and the first that fits (0 where none does)."""
    return np.arange(len(fits)), fits.argmax(1)


def _crops(area: tuple[float, float], u: np.ndarray, aspects: np.ndarray) -> np.ndarray:
    """Random crops, in relative coordinates: the first of ten tries that lies within the image.

    Where none does, as in a panorama, the largest with an aspect of 3/4 to 4/3: somewhere, so that all of the
    image is seen, not at the centre as torchvision's RandomResizedCrop has it.
    """
    share = _between(u[:, _Stream.AREA], *area)
    aspect = np.exp(_between(u[:, _Stream.ASPECT], math.log(3 / 4), math.log(4 / 3)))
    widths, heights = np.sqrt(share * aspect / aspects[:, None]), np.sqrt(share / aspect * aspects[:, None])
    fits = (widths <= 1) & (heights <= 1)
    found = fits.any(1)
    width = np.where(found, widths[_first(fits)], np.minimum(1, 4 / 3 / aspects))
    height = np.where(found, heights[_first(fits)], np.minimum(1, aspects / (3 / 4)))
    x, y = (2 * u[:, _Stream.PLACE].T - 1) * (1 - np.array([width, height]))
    return _maps(width, height, x, y)


def _boxes(probability: float, u: np.ndarray, size: int) -> np.ndarray:
    """Boxes int64 [B, 4] (top, left, bottom, right) to erase, as timm's RandomErasing draws them."""
    area = _between(u[:, _Stream.BOX_AREA], 0.02, 1 / 3) * size**2
    aspect = np.exp(_between(u[:, _Stream.BOX_ASPECT], math.log(0.3), -math.log(0.3)))
    heights, widths = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (heights < size) & (widths < size)
    height, width = heights[_first(fits)], widths[_first(fits)]
    top, left = np.floor(u[:, _Stream.BOX_PLACE].T * (size + 1 - np.array([height, width])))
    erased = fits.any(1) & (u[:, _Stream.ERASE] < probability)
    return (np.stack([top, left, top + height, left + width], axis=1) * erased[:, None]).astype(np.int64)


def _operations(policy: Policy, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Operations int64 [B, count] and their arguments float64 [B, count]."""
    drawn = u[:, _Stream.OPS : _Stream.OPS + 5 * policy.count].reshape(len(u), policy.count, 5)
    which, applied, sign, *strength = np.moveaxis(drawn, 2, 0)
    ops = np.array(policy.ops)[(which * len(policy.ops)).astype(np.int64)]
    ops = np.where(applied < policy.probability, ops, Op.IDENTITY)
    if policy.level is None:
        level = np.floor(strength[0] * 31) / 30
    else:  # Box and Muller: two uniforms to a normal deviate
        normal = np.sqrt(-2 * np.log1p(-strength[0])) * np.cos(2 * np.pi * strength[1])
        level = np.clip(policy.level + policy.deviation * normal, 0, 1)
    start, change, signed = (np.zeros(len(Op)) for _ in range(3))
    for op, *span in policy.spans:
        start[op], change[op], signed[op] = span
    arguments = start[ops] + change[ops] * level * np.where((signed[ops] > 0) & (sign < 0.5), -1, 1)
    whole = np.ceil(arguments) if policy.whole_bits == "up" else np.rint(arguments)
    return ops, np.where(ops == Op.POSTERIZE, np.maximum(whole, 1), arguments)


def _moves(op: np.ndarray, argument: np.ndarray) -> np.ndarray:
    """Maps float64 [B, 3, 3] from a picture to the one before the operation, if that is GEOMETRIC."""
    moves = _maps(np.ones(len(op)), np.ones(len(op)))
    angle = np.deg2rad(np.where(op == Op.ROTATE, argument, 0.0))
    moves[:, 0, 0] = moves[:, 1, 1] = np.cos(angle)
    moves[:, 0, 1] = np.where(op == Op.SHEAR_X, argument, np.sin(angle))
    moves[:, 1, 0] = np.where(op == Op.SHEAR_Y, argument, -np.sin(angle))
    moves[:, 0, 2] = np.where(op == Op.TRANSLATE_X, -2 * argument, 0.0)
    moves[:, 1, 2] = np.where(op == Op.TRANSLATE_Y, -2 * argument, 0.0)
    return moves


def _change(values: Tensor, index: Tensor, change: Callable[..., Tensor], *arguments: Tensor) -> None:
    """Change some images of a batch, in place; their number is known on the host, so nothing waits."""
    index = index.long()
    values.index_copy_(0, index, change(values.index_select(0, index), *arguments))


def _send(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays to float32 tensors on a device: in one copy, which nobody waits for."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]).astype(np.float32))
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    parts = flat.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


class Augment:
    """Makes views of images: each depends on (seed, view, row) alone, whatever else is in the batch.

    The same bytes come of it in every batch on the same kind of device; those of a CPU and a GPU may differ.

    Args:
        recipe: a name in RECIPES, or a recipe.
        size: pixels a side of the pictures.
    """

    def __init__(self, recipe: str | Recipe, seed: int, size: int) -> None:
        self.recipe = recipe_of(recipe) if isinstance(recipe, str) else recipe
        self.seed, self.size = seed, size
        self._kept: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Augment, (self.recipe, self.seed, self.size)

    def key(self, device: torch.device) -> list[object]:
        """What decides a view beside its number and the source's pixels, as keys of caches name it."""
        mixed = ("mixup", "cutmix", "label_smoothing", "repeats")  # what comes after the view
        own = {
            part.name: repr(getattr(self.recipe, part.name))
            for part in fields(Recipe)
            if part.name not in mixed
        }
        return [VERSION, device.type, self.seed, self.size, own]

    def __call__(
        self, pixels: Tensor, rows: np.ndarray, views: np.ndarray, aspects: np.ndarray | None = None
    ) -> Tensor:
        """Views of a batch; on a GPU nothing waits for it.

        Args:
            pixels: uint8 [B, 3, H, W]: squares or canvases, on any device.
            rows, views: int64 [B]; a view is the number of an epoch or crop, or NO_AUGMENT.
            aspects: float [B], width over height of the image that a canvas shows; None: pixels are squares,
                as they always are for a recipe whose source is one.

        Returns:
            uint8 [B, 3, S, S] on the same device: 8 bits, as the pixels are when the model is used.
        """
        if aspects is None or self.recipe.source == "square":
            aspects = np.ones(len(rows))
        plain = self.recipe == RECIPES["none"] or bool((views == NO_AUGMENT).all())
        if plain and pixels.shape[2:] == (self.size, self.size) and (aspects == 1).all():
            return pixels
        draws = draw(self.recipe, self.seed, rows, views, aspects, self.size)
        result = torch.empty((len(rows), 3, self.size, self.size), dtype=torch.uint8, device=pixels.device)
        step = max(1, len(rows))
        if pixels.device.type == "cpu":
            step = max(1, CHUNK_BYTES // (12 * self.size**2))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            result[part] = self._pictures(pixels[part], draws[part]).round_()
        return result

    def _pictures(self, pixels: Tensor, draws: Draws) -> Tensor:
        """Float32 [n, 3, S, S] in 0..255."""
        moved, erased = np.flatnonzero(draws.moved), np.flatnonzero(draws.boxes.any(1))
        sent = [draws.theta, draws.colour, moved, erased, draws.boxes[erased], draws.noise[erased]]
        steps: list[Callable[[Tensor, Tensor], Tensor]] = []
        for ops, arguments in zip(draws.ops.T, draws.arguments.T, strict=True):
            at = np.flatnonzero(_in(ops, LINEAR))
            if len(at):
                weights = operations.linear_weights(ops[at], arguments[at])
                steps.append(partial(operations.linear, mixes=bool(weights[:, 1:3].any())))
                sent += [at, weights]
            others = (ops != Op.IDENTITY) & ~_in(ops, LINEAR) & ~_in(ops, GEOMETRIC)
            for op in np.unique(ops[others]).tolist():
                at = np.flatnonzero(ops == op)
                steps.append(operations.OPERATIONS[Op(op)])
                sent += [at, arguments[at, None, None, None]]
        theta, colour, moved_at, erased_at, boxes, noise, *changes = _send(sent, pixels.device)
        places = operations.grid(theta, self.size)
        values = operations.sample(pixels, places)
        fill, tile = self._constants(pixels.device)
        if len(moved):
            seen = places.index_select(0, moved_at.long())
            _change(values, moved_at, operations.fill_outside, seen, fill)
        if self.recipe.gain or self.recipe.offset or self.recipe.jitter:
            values = operations.linear(values, colour, mixes=self.recipe.jitter > 0)
        for step, index, argument in zip(steps, changes[::2], changes[1::2], strict=True):
            _change(values, index, step, argument)
        if len(erased):
            _change(values, erased_at, operations.erase, boxes, noise, tile)
        return values

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """What fills the outside, float32 [1, 3, 1, 1], and a tile of noise, float32 [3, S, S]."""
        if device not in self._kept:
            mean, deviation = (np.array(part)[:, None, None] for part in (MEAN, DEVIATION))
            noise = generator(VERSION).normal(size=(3, self.size, self.size)) * deviation + mean
            tile = torch.from_numpy(noise.clip(0, 255).astype(np.float32)).to(device)
            fill = torch.tensor(MEAN, device=device).view(1, 3, 1, 1)
            self._kept[device] = fill, tile
        return self._kept[device]


# ---- mixing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mix:
    """How the images of one batch are mixed: each with the one ``shift`` places further on, around the end.

    Args:
        share: what an image keeps of itself, or float [B], what each does; its partner's is the rest.
        box: top, left, bottom, right of what comes from the partner (CutMix); None: all is blended (MixUp).
    """

    shift: int
    share: float | Tensor
    box: tuple[int, int, int, int] | None = None

    def partners(self, values: Tensor) -> Tensor:
        """What belongs to the partners: of any shape [B, ...], such as labels."""
        return values.roll(-self.shift, 0)

    def pixels(self, pixels: Tensor) -> Tensor:
        """Mixed images [B, 3, S, S]: uint8, rounded to whole levels, or float after normalisation."""
        if self.box is not None:
            top, left, bottom, right = self.box
            mixed = pixels.clone()
            mixed[..., top:bottom, left:right] = self.partners(pixels[..., top:bottom, left:right])
            return mixed
        if pixels.dtype == torch.uint8:
            values = pixels.float()
            return (self.partners(values) * (1 - self.share) + values * self.share).round_().to(torch.uint8)
        return self.partners(pixels) * (1 - self.share) + pixels * self.share

    def targets(self, probabilities: Tensor) -> Tensor:
        """Mixed soft labels, float [B, C]."""
        return self.partners(probabilities) * (1 - self.share) + probabilities * self.share

    def loss(self, loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> Tensor:
        """Of hard labels: ``share * L(own) + (1 - share) * L(partner's)`` (Zhang et al., 2018, sec. 2)."""
        return loss(logits, labels) * self.share + loss(logits, self.partners(labels)) * (1 - self.share)


def mix(recipe: Recipe, seed: int, epoch: int, step: int, rank: int, count: int, size: int) -> Mix | None:
    """How one worker mixes a step's batch: one share and one box for all its images, as timm's Mixup does.

    MixUp (Zhang et al., "mixup", 2018, eq. 1) or CutMix (Yun et al., "CutMix", 2019, eq. 1 and 2), each half
    the time where the recipe has both; the share is drawn from Beta(a, a). A box that reaches over the border
    is cut, and the share is that of the box that is left.

    Args:
        count: images of the batch.
        size: pixels a side.

    Returns:
        None where the recipe mixes nothing, or there is no second image.
    """
    if count < 2 or not (recipe.mixup or recipe.cutmix):
        return None
    rng = generator(seed, MIXING, epoch, step, rank)
    shift, cut = int(rng.integers(1, count)), rng.uniform() < 0.5
    if not recipe.cutmix or (recipe.mixup and not cut):
        return Mix(shift, float(rng.beta(recipe.mixup, recipe.mixup)))
    share = rng.beta(recipe.cutmix, recipe.cutmix)
    side = int(size * math.sqrt(1 - share))
    top, left = rng.integers(0, size, 2) - side // 2
    box = tuple(int(edge) for edge in np.clip([top, left, top + side, left + side], 0, size))
    return cut_mix(shift, box, size)


def cut_mix(shift: int, box: tuple[int, ...], size: int) -> Mix:
    """CutMix with a box inside an image of ``size`` pixels a side: what is kept follows from its area."""
    top, left, bottom, right = box
    return Mix(shift, 1 - (bottom - top) * (right - left) / size**2, (top, left, bottom, right))

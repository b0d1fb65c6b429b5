"""MixUp and CutMix whose partner, share and box depend on (seed, view, row) alone.

``augmentation.mix`` pairs the images that happen to be in a batch. What a teacher says of a mixed picture can
only be kept if the same picture comes again: so here a row brings its partner along. The teacher is asked
about the mixture, as in Beyer et al., "Knowledge distillation: A good teacher is patient and consistent",
2022, sec. 3.1 ("function matching"), not about both pictures apart.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import betaincinv
from torch import Tensor

from components.training.augmentation import MIXING, Mix, Recipe, uniforms
from components.training.sampling import Draw, Mixture

VERSION = 1  # of what is drawn here: soft labels of another number are of other pictures
SHARES = 1024  # steps of a share: the last digits of a quantile differ between versions of SciPy
PARTNER, CUT, SHARE, PLACE, COUNT = 0, 1, 2, slice(3, 5), 5  # where in a row of uniforms each draw lies


class Mixer:
    """Gives each row of a draw its partner: MixUp or CutMix, each half the time where a recipe has both.

    Partners of images with a label are drawn from those with one, and of those without from those without,
    so that a mixture's own label is known whole or not at all.

    Args:
        size: pixels a side.
        rows: all that partners are drawn from, int64, ascending.
        labels: by row of the manifest; -1 where there is none.
    """

    def __init__(self, recipe: Recipe, seed: int, size: int, rows: np.ndarray, labels: np.ndarray) -> None:
        self._recipe, self._seed, self._size, self._labels = recipe, seed ^ MIXING << 32, size, labels
        known = labels[rows] >= 0
        self._partners = rows[~known], rows[known]

    def key(self) -> list[object]:
        """What decides a mixture beside seed, view, size and rows, for keys of caches."""
        return [VERSION, self._recipe.mixup, self._recipe.cutmix]

    def __call__(self, draw: Draw) -> Draw:
        """The same draw, each row with its partner."""
        u = uniforms(self._seed, draw.views, draw.rows, COUNT)
        partners = np.empty(len(draw.rows), np.int64)
        known = self._labels[draw.rows] >= 0
        for here, others in zip((~known, known), self._partners, strict=True):
            partners[here] = others[(u[here, PARTNER] * len(others)).astype(np.int64)]
        mixup, cutmix = self._recipe.mixup, self._recipe.cutmix
        cut = (u[:, CUT] < 0.5) | (not mixup) if cutmix else np.zeros(len(u), bool)
        share = _beta(u[:, SHARE], np.where(cut, cutmix, mixup))
        boxes = _boxes(share, u[:, PLACE], self._size) * cut[:, None]
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        share = np.where(cut, 1 - area / self._size**2, share).astype(np.float32)
        return replace(draw, mixture=Mixture(partners, share, boxes))


class Brought(Mix):
    """How images that came mixed were: their partners are not in the batch, and only their labels known.

    Args:
        share: what each keeps of itself, float32 [B].
        labels: of the partners, int64 [B]; -1 where there is none.
    """

    _labels: Tensor

    def __init__(self, share: Tensor, labels: Tensor) -> None:
        super().__init__(0, share)
        object.__setattr__(self, "_labels", labels)  # of a frozen dataclass

    def partners(self, values: Tensor) -> Tensor:
        """The partners' labels, int64 [B], in place of the images' own."""
        return self._labels

    def targets(self, probabilities: Tensor) -> Tensor:
        """The same: they are of the mixtures."""
        return probabilities


def _beta(u: npt.NDArray[np.float64], parameter: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Quantiles of Beta(a, a), in steps of 1 / ``SHARES``."""
    return np.asarray(np.rint(betaincinv(parameter, parameter, u) * SHARES) / SHARES)


def _boxes(
    share: npt.NDArray[np.float64], place: npt.NDArray[np.float64], size: int
) -> npt.NDArray[np.int64]:
    """CutMix's boxes int64 [B, 4]: top, left, bottom, right; centres anywhere, cut at the border.

    Yun et al., "CutMix", 2019, eq. 2: sides of ``sqrt(1 - share)`` of the image's.
    """
    side = (size * np.sqrt(1 - share)).astype(np.int64)[:, None]
    first = (place * size).astype(np.int64) - side // 2
    return np.concatenate([first, first + side], axis=1).clip(0, size)


def mixed(pixels: Tensor, mixture: Mixture) -> Tensor:
    """Pictures uint8 [2 B, 3, S, S], all partners' behind the rows' own -> mixtures uint8 [B, 3, S, S].

    Blended (Zhang et al., "mixup", 2018, eq. 1) and rounded to whole levels; in a box the partner's own.
    """
    own, other = pixels.chunk(2)
    share, boxes = (torch.from_numpy(part) for part in (mixture.share, mixture.boxes))
    if pixels.device.type == "cuda":
        share, boxes = (part.pin_memory().to(pixels.device, non_blocking=True) for part in (share, boxes))
    cut = boxes[:, 2] > boxes[:, 0]
    weight = torch.where(cut, 1.0, share)[:, None, None, None]
    blended = (own * weight + other * (1 - weight)).round_().to(torch.uint8)
    top, left, bottom, right = boxes.T[:, :, None]
    at = torch.arange(pixels.shape[-1], device=pixels.device)
    inside = ((at >= top) & (at < bottom))[:, None, :, None] & ((at >= left) & (at < right))[:, None, None, :]
    return torch.where(inside, other, blended)

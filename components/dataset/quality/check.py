"""What a quality check is: a number per image, and how that number is judged against the others."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL.Image import Resampling

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image


ENOUGH = 128  # pixels of the shorter side


class View:
    """One image as the checks see it: grey, its shorter side below 256 pixels."""

    def __init__(self, grey: Image.Image) -> None:
        self.grey = grey

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """The grey levels: [height, width]."""
        return np.frombuffer(self.grey.tobytes(), np.uint8).reshape(self.grey.height, self.grey.width)

    @cached_property
    def sample(self) -> Image.Image:
        """Every fourth pixel where there are many: enough for the levels."""
        width, height = self.grey.size
        if min(width, height) < ENOUGH:
            return self.grey
        return self.grey.resize((width // 2, height // 2), Resampling.NEAREST)

    @cached_property
    def up_to(self) -> list[int]:
        """How many pixels of the sample are at each of the 256 grey levels or below it."""
        return list(accumulate(self.sample.histogram()))  # numpy asks more first

    def level(self, share: float) -> float:
        """The grey level, 0..255, that ``share`` of the pixels do not exceed."""
        return float(bisect_left(self.up_to, share * self.up_to[-1]))


@dataclass(frozen=True)
class Scale:
    """On which the measure is judged, there and back: one on which the spread does not hang on the value."""

    there: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    back: Callable[[NDArray[np.float64]], NDArray[np.float64]]


AS_IT_IS = Scale(lambda values: values, lambda scaled: scaled)
LOGARITHM = Scale(np.log, np.exp)
# the variance-stabilising one of shares
ARCSINE = Scale(
    lambda shares: np.arcsin(np.sqrt(np.clip(shares, 0, 1))),
    lambda angles: np.sin(np.clip(angles, 0, np.pi / 2)) ** 2,
)


@dataclass(frozen=True)
class Check:
    """One rule: a measure, and the bounds of its judgement.

    The limit is where an image lies ``judge.FAR`` spreads from the median of the data on the scale
    ``scale``, but never beyond ``sure`` nor before ``never``: an image worse than ``sure`` is always named,
    whatever the others look like, one better than ``never`` is not.
    """

    rule: str
    measure: Callable[[View], float]
    bad: Literal["low", "high"]  # which end of the measure is the bad one
    never: float
    sure: float
    floor: float  # the least spread that the data are taken to have, on the scale
    what: str  # "images are blurry"
    number: str  # what is measured, as a person reads it
    scale: Scale = AS_IT_IS
    advice: str = "They stay: look at them, and take out or replace those that show nothing."

    @property
    def sign(self) -> float:
        return 1.0 if self.bad == "high" else -1.0

    def badness(self, values: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Measures on the check's scale, turned so that more is worse."""
        return self.sign * self.scale.there(np.asarray(values, np.float64))

    def value(self, badness: float) -> float:
        """The measure that has this badness."""
        return float(self.scale.back(np.asarray(self.sign * badness)))

"""The quality audit: blurry, dark, light, low information, flat. One file a check, registered here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL.Image import Resampling

from components.dataset.quality import blurry, dark, flat, information, light
from components.dataset.quality.check import Check, View

if TYPE_CHECKING:
    from PIL import Image

SIDE = 128  # pixels of the shorter side, at least, where the image has them
# A new check is a file, and its place here; inspection.VERSION is raised with it.
CHECKS: tuple[Check, ...] = (blurry.CHECK, dark.CHECK, light.CHECK, information.CHECK, flat.CHECK)


def measure(grey: Image.Image) -> bytes:
    """The number of each of CHECKS for one grey image, as float32: 4 bytes each, in that order."""
    view = View(_thinned(grey))
    return np.array([check.measure(view) for check in CHECKS], np.float32).tobytes()


def _thinned(grey: Image.Image) -> Image.Image:
    """Its shorter side 128 to 255 pixels, if it was longer: what is finer, no network sees.

    Most is thinned out, which is fast and keeps the levels; the last step averages, against a sensor's noise.
    """
    times = min(grey.size) // SIDE
    if times < 2:
        return grey
    if times >= 4:
        half = times // 2
        grey = grey.resize((grey.width // half, grey.height // half), Resampling.NEAREST)
        return grey.reduce(2)
    return grey.reduce(times)

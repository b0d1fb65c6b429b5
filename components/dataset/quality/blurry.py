"""Blurry: edges are wide, however strong they are."""

from __future__ import annotations

import math

import numpy as np

from components.dataset.quality.check import LOGARITHM, Check, View

STEPS = 64  # to the shorter side; the step is one pixel at least
ROUNDING = 1 / 6  # mean squared difference of two pixels that rounding to whole levels makes by itself
LEAST = 0.02  # squared grey levels: less is no edge


def blur_width(view: View) -> float:
    """How wide edges are, in steps: their standard deviation where they are Gaussian.

    The variance of the Laplacian, the usual measure of focus (Pech-Pacheco et al., ICPR 2000), grows with
    contrast too; over the squared gradient it no longer does. With D the mean squared difference of pixels
    one step apart and B that of two such differences in a row, sqrt(D / 2B) is 0.5 for sharp edges, where
    D / B is 1/2; 0.41 for white noise, with 1/3; and s steps for edges that a Gaussian of deviation s has
    blurred, where s is large, with 2 s^2. What rounding to whole levels adds to both is taken off.
    """
    pixels = view.pixels
    side = min(pixels.shape)
    step = max(1, side // STEPS)
    each = 4 * step if side >= STEPS else 1  # rows: neighbours say much the same
    slope = curve = 0.0  # sums of squares
    slopes = curves = 0
    for lines in (pixels, pixels.T):
        chosen = lines[::each].astype(np.float32, order="C")
        rise = chosen[:, step:] - chosen[:, :-step]
        bend = rise[:, step:] - rise[:, :-step]
        slope, slopes = slope + float(np.vdot(rise, rise)), slopes + rise.size
        curve, curves = curve + float(np.vdot(bend, bend)), curves + bend.size
    slope, curve = slope / max(slopes, 1), curve / max(curves, 1)
    return math.sqrt(max(slope - ROUNDING, LEAST) / (2 * max(curve - 3 * ROUNDING, LEAST)))


CHECK = Check(
    rule="quality.blurry",
    measure=blur_width,
    bad="high",
    never=0.65,
    sure=4.0,
    floor=0.15,
    scale=LOGARITHM,
    what="images are blurry",
    number="width of edges, in 64ths of the shorter side or pixels; sharp ones: 0.5",
)

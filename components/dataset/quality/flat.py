"""Flat: next to no contrast, one colour in the extreme."""

from __future__ import annotations

from components.dataset.quality.check import LOGARITHM, Check, View


def contrast(view: View) -> float:
    """How many grey levels all but the darkest and the brightest hundredth span: 1 is one colour."""
    return 1.0 + view.level(0.99) - view.level(0.01)


CHECK = Check(
    rule="quality.flat",
    measure=contrast,
    bad="low",
    never=40.0,
    sure=24.0,
    floor=0.15,
    scale=LOGARITHM,
    what="images are flat",
    number="contrast: grey levels from the darkest to the brightest hundredth",
)

"""Light: over-exposed, so that what was there is white."""

from __future__ import annotations

from components.dataset.quality.check import ARCSINE, Check, View

WHITE = 245  # grey level from which a pixel counts as white
BLACK = 10  # grey level up to which it counts as black: a dark background stays so at any exposure


def clipped(view: View) -> float:
    """The share of white pixels among those not black: clipped highlights, as a camera's histogram shows."""
    white, shown = float(view.histogram[WHITE:].sum()), float(view.histogram[BLACK + 1 :].sum())
    return white / shown if shown else 0.0


CHECK = Check(
    rule="quality.light",
    measure=clipped,
    bad="high",
    never=0.35,
    sure=0.995,
    floor=0.1,
    scale=ARCSINE,
    what="images are over-exposed",
    number="share of white pixels, of those not black",
)

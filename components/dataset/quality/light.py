"""Light: over-exposed, so that what was there is white."""

from __future__ import annotations

from components.dataset.quality.check import ARCSINE, Check, View

WHITE = 245  # grey level from which a pixel counts as white
BLACK = 10  # grey level up to which it counts as black: a dark background stays so at any exposure


def clipped(view: View) -> float:
    """The share of white pixels among those not black: clipped highlights, as a camera's histogram shows."""
    up_to = view.up_to
    shown = up_to[-1] - up_to[BLACK]
    return (up_to[-1] - up_to[WHITE - 1]) / shown if shown else 0.0


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

"""Dark: even the brightest parts are dark."""

from __future__ import annotations

from components.dataset.quality.check import Check, View


def highlights(view: View) -> float:
    """The grey level, 0..255, that 99 in 100 pixels do not exceed: a lamp in the night is light enough."""
    return view.level(0.99)


CHECK = Check(
    rule="quality.dark",
    measure=highlights,
    bad="low",
    never=100.0,
    sure=40.0,
    floor=10.0,
    what="images are dark",
    number="grey level of the brightest hundredth, 0..255",
)

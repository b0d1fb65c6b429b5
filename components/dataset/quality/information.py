"""Low information: few grey levels make up the image."""

from __future__ import annotations

import numpy as np

from components.dataset.quality.check import Check, Scale, View


def entropy(view: View) -> float:
    """Shannon's entropy of the grey levels, bits: 0 for one level, 8 for all 256 alike."""
    return max(0.0, float(view.sample.entropy()))


CHECK = Check(
    rule="quality.information",
    measure=entropy,
    bad="low",
    never=4.5,
    sure=1.05,
    floor=0.08,
    # what is missing of 8 bits: most photographs lie close to them, and vary less there
    scale=Scale(lambda bits: -np.sqrt(np.clip(8 - bits, 0, None)), lambda roots: 8 - roots**2),
    what="images hold little information",
    number="entropy of grey levels, bits",
)

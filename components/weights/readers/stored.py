"""What every reader returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass
class Stored:
    """Tensors by name in the file's order, as stored (views of the mapped file where the format allows).

    ``kind`` names the format; ``notes`` say what was unwrapped or converted; ``arch`` is the architecture
    that the file itself claims to be for; ``metadata`` are a .safetensors file's own words.
    """

    tensors: dict[str, Array]
    kind: str
    notes: list[str] = field(default_factory=list)
    arch: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """float32 [...] of bfloat16 given as its bits: the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)

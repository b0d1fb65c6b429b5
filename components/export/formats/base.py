"""What a format of exported files is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import onnx


@dataclass(frozen=True)
class Format:
    """How a network is written to a file, and how that file is run to prove it.

    Attributes:
        suffix: of the file's name.
        write: writes an ONNX graph, with ``metadata`` in the file where it has room for that. The same bytes
            each time.
        open: makes a function of a written file: images uint8 [N, H, W, 3], prepared as the file itself says,
            -> scores float32 [N, classes]; on one thread of the CPU, batches of any size.
    """

    suffix: str
    write: Callable[[onnx.ModelProto, Path, Mapping[str, str]], None]
    open: Callable[[Path], Callable[[np.ndarray], np.ndarray]]

    def file(self, precision: str) -> str:
        """The name of the file in an export's folder."""
        return f"model{'' if precision == 'fp32' else f'.{precision}'}{self.suffix}"

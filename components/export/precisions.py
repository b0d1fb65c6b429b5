"""Precisions in which an exported model answers. To add one, add a record to ``PRECISIONS``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import onnx

Batches = Callable[[], "Iterator[np.ndarray]"]
"""Normalised training images, float32 [n, 3, size, size], a few at a time: what calibrating may look at."""


@dataclass(frozen=True)
class Precision:
    """What export, benchmark and the curves know of a precision.

    Attributes:
        convert: makes the graph in this precision of the float32 one; None: there is no file of its own, an
            engine computes in it from the float32 file.
        tolerance: largest difference of scores at which an exported file is still the network's equal; None:
            ``export.tolerance``, and a file that exceeds it is not shipped.
        drop: top-1, 0..1, that it may cost before it is advised against.
        rule: what the finding about that cost is called.
        score_limit: largest difference of a score from ONNX Runtime's of the same file, in an engine.
        fill: how the curves fill its marker (matplotlib's ``fillstyle``).
        colour, hatch: of its bars in the histogram of differences.
        note: what a reader has to know of its file, a clause.
    """

    convert: Callable[[onnx.ModelProto, Batches], onnx.ModelProto] | None = None
    tolerance: float | None = None
    drop: float = 0.0
    rule: str = "export.precision"
    score_limit: float = 0.1
    fill: str = "right"
    colour: str = "#56B4E9"
    hatch: str = ".."
    note: Callable[[], str] = str


LOOSE = 0.05  # scores of int8, or of a graph that resizes, move; a lead below this is a tie
INT8_DROP = 0.01
CALIBRATION_IMAGES = 128


def _same(model: onnx.ModelProto, _: Batches) -> onnx.ModelProto:
    return model


def _int8(model: onnx.ModelProto, batches: Batches) -> onnx.ModelProto:
    import copy

    from components.common.progress import at
    from components.export import exported, graph

    at("calibrating int8")
    return graph.quantise(copy.deepcopy(model), batches(), reduce_range=not exported.has_vnni())


def _int8_note() -> str:
    from components.export import exported

    reduced = "" if exported.has_vnni() else ", with 7-bit weights because this processor has no VNNI"
    return f"calibrated on {CALIBRATION_IMAGES} training images at most{reduced}"


# by name, the plainer to deploy first: where nothing else decides, the choice takes the first
PRECISIONS: dict[str, Precision] = {
    "fp32": Precision(convert=_same, score_limit=1e-3, fill="full", colour="#0072B2", hatch=""),
    "int8": Precision(
        convert=_int8, tolerance=LOOSE, drop=INT8_DROP, rule="export.int8", fill="none", colour="#E69F00",
        hatch="//", note=_int8_note,
    ),
    "bf16": Precision(tolerance=LOOSE, fill="left", colour="#009E73", hatch="\\\\"),
}  # fmt: skip


def of_own_file() -> list[str]:
    """The precisions that export can write a file of."""
    return [name for name, precision in PRECISIONS.items() if precision.convert is not None]

"""ONNX: what every export writes, and what the others are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from components.export.formats.base import Format

if TYPE_CHECKING:
    import numpy as np
    import onnx


def write(model: onnx.ModelProto, path: Path, metadata: Mapping[str, str]) -> None:
    """Check the graph and write it with ``metadata`` as its metadata_props."""
    from components.export import graph

    graph.save(model, path, metadata)


def open_file(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Open a file in ONNX Runtime; its metadata say how images are prepared."""
    from components.export import exported

    # on a machine that is busy, threads that wait for each other take several times as long
    session = exported.session(path, threads=1)
    about = exported.describe(session, path)
    return lambda pixels: exported.run(session, about.feed(pixels))


FORMAT = Format(suffix=".onnx", write=write, open=open_file)

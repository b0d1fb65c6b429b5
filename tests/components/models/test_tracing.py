"""From a torch module to an ONNX graph."""

from __future__ import annotations

import ctypes
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from components.models import tracing


class Resizing(nn.Module):
    """An operator that the tracing exporter lacks, as a ViT's position embedding has it."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(images, (8, 8), mode="bicubic", antialias=True)


def _flush() -> None:
    """What C++ has printed and Python does not know of."""
    ctypes.CDLL(None).fflush(None)


def test_what_one_exporter_lacks_the_other_writes_and_no_graph_is_printed(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    network, images = Resizing(), torch.rand(2, 3, 16, 16)
    with pytest.raises(torch.onnx.errors.OnnxExporterError):
        torch.onnx.export(network, (images,), tmp_path / "n.onnx", dynamo=False, opset_version=18)
    _flush()
    capfd.readouterr()

    graph = tracing.trace(network, images, ("images", "resized"))
    _flush()
    said = capfd.readouterr()
    assert "graph(" not in said.out + said.err

    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (given,) = session.run(None, {"images": images[:1].numpy()})
    assert given.shape == (1, 3, 8, 8), "of any batch size"

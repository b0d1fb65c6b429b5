"""From a torch module to an ONNX graph."""

from __future__ import annotations

import ctypes
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from components.common.errors import RetortError
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


def test_a_traced_graph_that_no_runtime_takes_is_written_by_the_newer_exporter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As an EVA-02's, whose positions are traced with a wrong shape."""
    honest = torch.onnx.export

    def damaged(module: nn.Module, inputs: object, path: Path, **settings: object) -> object:
        if settings["dynamo"]:
            return honest(module, inputs, path, **settings)  # type: ignore[arg-type]
        return path.write_bytes(b"no graph")

    monkeypatch.setattr(torch.onnx, "export", damaged)
    graph = tracing.trace(nn.Conv2d(3, 4, 3), torch.rand(2, 3, 8, 8), ("images", "maps"))
    assert {node.op_type for node in graph.graph.node} == {"Conv"}
    monkeypatch.setattr(torch.onnx, "export", lambda module, inputs, path, **_: path.write_bytes(b"no graph"))
    with pytest.raises(RetortError, match="cannot be written as ONNX: ONNX Runtime refuses the file"):
        tracing.trace(nn.Conv2d(3, 4, 3), torch.rand(2, 3, 8, 8), ("images", "maps"))

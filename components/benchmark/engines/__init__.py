"""Inference engines that the benchmark measures. One file an engine, registered here."""

from __future__ import annotations

from components.benchmark.engines import onnxruntime, openvino
from components.benchmark.engines.base import Engine, Job, Run

# by name, the simpler to deploy first: where nothing else decides, the choice takes the first
ENGINES: dict[str, Engine] = {"onnxruntime": onnxruntime.ENGINE, "openvino": openvino.ENGINE}
# asked for, and not there
UNWRITTEN = {"tensorrt": "opening a model in TensorRT is not written yet"}

__all__ = ["ENGINES", "UNWRITTEN", "Engine", "Job", "Run"]

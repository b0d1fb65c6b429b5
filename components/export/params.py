"""The section ``export`` of params.yaml."""

from __future__ import annotations

from pydantic import Field

from components.common.params import Section, StepParams
from components.dataset.params import Data


class Export(Section):
    preprocess_in_graph: bool = Field(
        False, description="true: model.onnx takes uint8 images of any size and resizes by itself"
    )
    int8: bool = Field(False, description="also write a statically quantised model.int8.onnx")
    tolerance: float = Field(
        1e-4,
        gt=0,
        description="largest difference of scores between training graph and exported file; float32's "
        "rounding may exceed it where logits are large, and raises it to half of 1e-5 of the largest",
    )
    min_accuracy: float = Field(
        0.8, ge=0, le=1, description="validation top-1 below which the checkpoint itself is called weak"
    )


class ExportParams(StepParams):
    data: Data = Field(default_factory=Data)
    export: Export = Field(default_factory=Export)

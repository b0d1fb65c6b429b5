"""The section ``export`` of params.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from components.common.params import Section, StepParams, named
from components.dataset.params import Data
from components.export.formats import FORMATS, Format
from components.export.precisions import PRECISIONS, of_own_file


def _has_file(name: str) -> str:
    if name not in of_own_file():
        raise PydanticCustomError(
            "no_file", "{name} has no file of its own: engines compute in it", {"name": name}
        )
    return name


class Export(Section):
    preprocess_in_graph: bool = Field(
        False, description="true: model.onnx takes uint8 images of any size and resizes by itself"
    )
    int8: bool = Field(False, description="also write a statically quantised model.int8.onnx")
    precisions: list[Annotated[str, named(PRECISIONS), AfterValidator(_has_file)]] = Field(
        default=[], description="also write a file in each of these precisions; int8: true is [int8]"
    )
    formats: list[Annotated[str, named(FORMATS)]] = Field(
        default=[], description="also write each file in these formats; ONNX is always written"
    )
    tolerance: float = Field(
        1e-4,
        gt=0,
        description="largest difference of scores between training graph and exported file; float32's "
        "rounding may exceed it where logits are large, and raises it to half of 1e-5 of the largest",
    )
    min_accuracy: float = Field(
        0.8, ge=0, le=1, description="validation top-1 below which the checkpoint itself is called weak"
    )

    def files(self) -> Iterator[tuple[str, Format, str]]:
        """Precision, format and name of each file that is asked for, ``model.onnx`` first."""
        precisions = dict.fromkeys(["fp32", *(["int8"] if self.int8 else []), *self.precisions])
        for form in dict.fromkeys(["onnx", *self.formats]):
            for precision in precisions:
                yield precision, FORMATS[form], FORMATS[form].file(precision)


class ExportParams(StepParams):
    data: Data = Field(default_factory=Data)
    export: Export = Field(default_factory=Export)

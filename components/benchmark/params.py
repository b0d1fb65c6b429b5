"""The section ``benchmark`` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from components.common.params import Section, StepParams
from components.dataset.params import Data

Count = Annotated[int, Field(ge=1)]


class Benchmark(Section):
    engines: list[Literal["onnxruntime", "openvino", "tensorrt"]] = Field(
        default=["onnxruntime", "openvino"], min_length=1, description="engines to measure"
    )
    threads: list[Count] = Field(default=[1, 2], min_length=1, description="threads per inference")
    batch_sizes: list[Count] = Field(default=[1, 16], min_length=1, description="images per inference")
    precisions: list[Literal["fp32", "bf16", "int8"]] = Field(
        default=["fp32"], min_length=1, description="precisions to measure"
    )
    latency_budget_ms: float | None = Field(
        None, gt=0, description="p50 of one image that the choice must keep; null: none"
    )
    candidates: list[str] = Field(
        default=["student", "teacher"], min_length=1, description="exported models to compare"
    )
    time_budget_s: float = Field(20, gt=0, description="time for the whole sweep")


class BenchmarkParams(StepParams):
    data: Data = Field(default_factory=Data)
    benchmark: Benchmark = Field(default_factory=Benchmark)

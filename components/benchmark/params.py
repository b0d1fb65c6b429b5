"""The section ``benchmark`` of params.yaml."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from components.benchmark.engines import ENGINES, UNWRITTEN
from components.common.params import Section, StepParams, named
from components.dataset.params import Data
from components.export.precisions import PRECISIONS

Count = Annotated[int, Field(ge=1)]


class Benchmark(Section):
    engines: list[Annotated[str, named(ENGINES, unwritten=UNWRITTEN)]] = Field(
        default=["onnxruntime", "openvino"], min_length=1, description="engines to measure"
    )
    threads: list[Count] = Field(default=[1, 2], min_length=1, description="threads per inference")
    batch_sizes: list[Count] = Field(default=[1, 16], min_length=1, description="images per inference")
    precisions: list[Annotated[str, named(PRECISIONS)]] = Field(
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

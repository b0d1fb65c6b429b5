"""OpenVINO."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from components.benchmark.engines.base import Engine, Job, Run

CAPABILITIES = {"fp32": "FP32", "bf16": "BF16", "int8": "INT8", "fp16": "FP16"}  # OpenVINO's names


@lru_cache(maxsize=1)
def _core() -> Any:
    import openvino

    return openvino.Core()


def refusal(precision: str) -> str:
    """Why OpenVINO cannot run at ``precision`` on this processor; empty when it can."""
    able = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if CAPABILITIES.get(precision) in able:
        return ""
    return f"this processor has no {precision} instructions that OpenVINO uses"


def open_model(job: Job) -> Run:
    """Compile the file of ``job``."""
    model = _core().read_model(str(job.path))
    shape = model.input(0).partial_shape
    shape[0] = job.batch
    model.reshape(shape)
    compiled = _core().compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": job.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            # without the hint it would choose bf16 by itself where the processor has it
            "INFERENCE_PRECISION_HINT": "bf16" if job.precision == "bf16" else "f32",
        },
    )
    request = compiled.create_infer_request()
    return lambda images: request.infer([images], share_inputs=True)[0]


ENGINE = Engine(refusal, open_model)

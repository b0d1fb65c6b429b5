"""ONNX Runtime."""

from __future__ import annotations

from components.benchmark.engines.base import Engine, Job, Run


def refusal(precision: str) -> str:
    """Why ONNX Runtime cannot run at ``precision``; empty when it can."""
    if precision == "bf16":
        return "ONNX Runtime has no bf16 convolutions on the CPU; OpenVINO has"
    return ""


def open_model(job: Job) -> Run:
    """Open the file of ``job``."""
    from components.export import exported

    session = exported.session(job.path, job.threads, N=job.batch)
    return lambda images: exported.run(session, images)


ENGINE = Engine(refusal, open_model)

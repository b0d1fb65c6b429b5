"""Inference engines: what each can run here, and how to open a model in it. Adding one: two functions."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from components.export import exported

Run = Callable[[np.ndarray], np.ndarray]
"""Images as the model's graph takes them -> scores float32 [N, classes]."""


@dataclass(frozen=True)
class Job:
    """One thing to measure. The model takes ``batch`` images at a time, fixed when it is opened."""

    path: Path
    precision: str
    threads: int
    batch: int


def refusal(engine: str, precision: str) -> str:
    """Why this machine cannot run this engine at this precision; empty when it can."""
    return REFUSALS[engine](precision)


def open_model(engine: str, job: Job) -> Run:
    """Open a model for one number of threads and one batch size, on the CPU."""
    return OPENERS[engine](job)


def _onnxruntime_refusal(precision: str) -> str:
    if precision == "bf16":
        return "ONNX Runtime has no bf16 convolutions on the CPU; OpenVINO has"
    return ""


def _onnxruntime(job: Job) -> Run:
    session = exported.session(job.path, job.threads, N=job.batch)
    return lambda images: exported.run(session, images)


@lru_cache(maxsize=1)
def _core() -> Any:
    import openvino

    return openvino.Core()


def _openvino_refusal(precision: str) -> str:
    able = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    wanted = {"fp32": "FP32", "bf16": "BF16", "int8": "INT8"}[precision]
    return "" if wanted in able else f"this processor has no {precision} instructions that OpenVINO uses"


def _openvino(job: Job) -> Run:
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


def _tensorrt_refusal(precision: str) -> str:
    if not Path("/dev/nvidiactl").exists():
        return "there is no NVIDIA GPU here"
    if importlib.util.find_spec("tensorrt") is None:
        return "there is a GPU, but the package tensorrt is not installed"
    return f"there is a GPU, but opening a model in TensorRT ({precision}) is not written yet"


REFUSALS: dict[str, Callable[[str], str]] = {
    "onnxruntime": _onnxruntime_refusal,
    "openvino": _openvino_refusal,
    "tensorrt": _tensorrt_refusal,
}
OPENERS: dict[str, Callable[[Job], Run]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}


@dataclass(frozen=True)
class Processors:
    """How many processors this process may use, and what limits it."""

    count: float
    limit: str

    @property
    def threads(self) -> int:
        """Threads that can run at once: at least one."""
        return max(1, math.floor(self.count + 1e-6))


def processors(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Processors:
    """The smallest of the processors this process is bound to and the CPU quotas of its cgroups (v1 and v2).

    Thread pools look at the machine, not at the quota: more threads than the quota allows are stopped and
    started by the kernel, and what is measured is that.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    best = Processors(bound, "processors of this machine that the process may use")
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return best
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if controllers == "":
            places, quota = [cgroups, cgroups / "unified"], _quota_v2
        elif "cpu" in controllers.split(","):
            places, quota = [cgroups / "cpu", cgroups / controllers], _quota_v1
        else:
            continue
        for place in places:
            folder = place / inside.lstrip("/")
            # the quota of any ancestor holds too; in a container the path may not be visible: then the root
            for level in [folder, *folder.parents]:
                if place not in (level, *level.parents):
                    break
                allowed = quota(level)
                if allowed is not None and allowed < best.count:
                    best = Processors(allowed, "CPU quota of the container")
    return best


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
        period = int((folder / "cpu.cfs_period_us").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None

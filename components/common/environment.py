"""The process around the work: its environment variables, its processors, its garbage collector."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables inside the block; afterwards they are what they were, whatever the block made of them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def cores() -> int:
    """Processors that this process may use: by its affinity, and by the CPU quota of its container.

    Threads beyond a quota are stopped and started by the kernel: a pod of 4 CPUs on a node of 64 has 4.
    """
    import joblib

    return joblib.cpu_count()


def bound_threads() -> None:
    """Hold the libraries that count the machine's processors themselves to ``cores()``.

    BLAS and OpenMP (numpy, scipy, torch) know no quota. ``OMP_NUM_THREADS`` is for those that are loaded
    later, and for processes below this one; where it is set, it stays.
    """
    import threadpoolctl

    count = cores()
    if count < len(os.sched_getaffinity(0)) and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(count)
        threadpoolctl.threadpool_limits(count)


def collect_less_often() -> None:
    """Let the garbage collector run when 10,000 objects are new, instead of 700, and over old ones rarely.

    Importing torch, timm and MLflow makes a great many objects that stay; at Python's own thresholds, going
    through them again and again takes half as long as the imports themselves.
    """
    gc.set_threshold(10_000, 20, 50)

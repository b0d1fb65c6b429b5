"""What an engine of the benchmark is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Run = Callable[["np.ndarray"], "np.ndarray"]
"""Images as the model's graph takes them -> scores float32 [N, classes]."""


@dataclass(frozen=True)
class Job:
    """One thing to measure. The model takes ``batch`` images at a time, fixed when it is opened."""

    path: Path
    precision: str
    threads: int
    batch: int


@dataclass(frozen=True)
class Engine:
    """An inference engine on the CPU.

    Attributes:
        refusal: why this machine cannot run it at a precision; empty when it can.
        open: opens a model for one number of threads and one batch size.
    """

    refusal: Callable[[str], str]
    open: Callable[[Job], Run]

"""How a step is computed on a device: number formats, deterministic kernels, compilation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from components.common.errors import RetortError
from components.models.params import Train

COMPILE_SECONDS = 90.0  # that a compilation takes: a network of 300 layers, forward and backward
COMPILED = 0.65  # of an eager step, that a compiled one takes: 49 of 79 ms, resnet50d at 224 px on an H100


@dataclass(frozen=True)
class Precision:
    """What ``train.precision``, ``train.deterministic`` and ``train.compile`` mean on one device."""

    device: torch.device
    bf16: bool
    deterministic: bool
    compile: bool | None  # None: when it pays for itself

    @staticmethod
    def of(train: Train, device: torch.device) -> Precision:
        """The settings, where they are left open, as the device has them: bf16 and speed on a GPU."""
        gpu = device.type == "cuda"
        bf16 = train.precision == "bf16" or (train.precision == "auto" and gpu)
        if bf16 and gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
            if train.precision == "bf16":
                raise RetortError(
                    f"train.precision: bf16: {torch.cuda.get_device_name(device)} does not compute in it; "
                    "use float32"
                )
            bf16 = False
        deterministic = not gpu if train.deterministic is None else train.deterministic
        return Precision(device, bf16, deterministic, train.compile if gpu or train.compile else False)

    def prepare(self, threads: int) -> None:
        """Set what torch keeps for the whole process."""
        torch.set_num_threads(threads)
        gpu = self.device.type == "cuda"
        # a vision transformer's position embedding is resampled by a kernel that has no deterministic
        # backward on a GPU: that is a warning there, not the end
        torch.use_deterministic_algorithms(self.deterministic, warn_only=gpu)
        # that would also overwrite every tensor before its first use, to show reads of what was never written
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = not self.deterministic
        torch.backends.cudnn.deterministic = self.deterministic
        if gpu:
            torch.set_float32_matmul_precision("highest" if self.deterministic else "high")
            torch.backends.cudnn.allow_tf32 = not self.deterministic

    def autocast(self) -> AbstractContextManager[object]:
        """For the forward pass and the loss."""
        if not self.bf16:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def eager(self) -> AbstractContextManager[object]:
        """Without compiled code: for batches of several sizes, each of which would be compiled for itself."""
        return nullcontext() if self.compile is False else torch.compiler.set_stance("force_eager")

    def pays(self, left: float) -> bool:
        """Whether compilation gains time where so many seconds of eager steps are left."""
        return left * (1 - COMPILED) > 2 * COMPILE_SECONDS

    def said(self) -> str:
        """In words, for a person."""
        numbers = "bf16" if self.bf16 else "float32"
        if self.device.type == "cpu":
            return numbers
        how = "deterministic kernels" if self.deterministic else "fastest kernels, TF32"
        return f"{numbers}, {how}"


def fitting_parts(attempt: Callable[[int], object], batch: int) -> int:
    """Into how many parts a batch must be cut to fit into the GPU's memory: 1, 2, 4, ...

    Args:
        attempt: takes a step with so many images, and may raise torch.OutOfMemoryError.

    Raises:
        RetortError: when not even two images fit.
    """
    parts = 1
    while True:
        size = -(-batch // parts)
        try:
            attempt(size)
            return parts
        except torch.OutOfMemoryError:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if size <= 2:
                raise RetortError(
                    f"the GPU's memory is too small for a step of {size} images of this network: take a "
                    "smaller network or global.image_size, or end what else runs on that GPU"
                ) from None
            parts *= 2

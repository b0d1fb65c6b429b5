"""Features: a backbone as an ONNX file that needs no torch, fed with plain pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from components.common.errors import RetortError
from components.models import tracing

if TYPE_CHECKING:
    import torch
    from torch import nn

INPUT, OUTPUT = "images", "features"
AGREES = 1e-3  # largest difference to torch, of the features' largest value


def write_onnx(module: nn.Module, size: int, mean: Sequence[float], std: Sequence[float], path: Path) -> None:
    """Write a backbone as ``images`` uint8 [N, size, size, 3] RGB -> ``features`` float32 [N, D].

    The pixels are those of ``components.dataset.images.load_rgb``; they are normalised in the graph. The
    file's metadata names ``size``. The same module gives the same bytes.

    Args:
        module: a network without a head.
        mean, std: per RGB channel, for pixels in 0..1.

    Raises:
        RetortError: when the network cannot be written, or the file does not compute what the network does.
    """
    import numpy as np
    import onnxruntime
    import torch
    from torch import nn

    class FromPixels(nn.Module):
        scale: torch.Tensor
        shift: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.network = module
            scale = 255 * torch.tensor(list(std)).view(1, 3, 1, 1)
            self.register_buffer("scale", 1 / scale)
            self.register_buffer("shift", -255 * torch.tensor(list(mean)).view(1, 3, 1, 1) / scale)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            values = images.permute(0, 3, 1, 2).float()
            return self.network(values * self.scale + self.shift)

    pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    example = torch.from_numpy(pixels)
    network = FromPixels().eval()
    tracing.save(tracing.trace(network, example, (INPUT, OUTPUT)), path, {"size": str(size)}, name="features")
    with torch.inference_mode():
        expected = network(example).numpy()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = session.run([OUTPUT], {INPUT: pixels})[0]
    apart = float(np.abs(given - expected).max() / max(np.abs(expected).max(), 1e-12))
    if not apart <= AGREES:
        raise RetortError(
            f"{path.name}: ONNX Runtime's features differ from torch's by {apart:.1e} of their size"
        )

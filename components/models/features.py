"""Features: a backbone as an ONNX file that needs no torch, fed with plain pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from components.common.errors import RetortError
from components.models import tracing

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import nn

INPUT, OUTPUT = "images", "features"
AGREES = 1e-3  # largest difference to torch, of the features' largest value


def write_onnx(
    module: nn.Module,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    path: Path,
    *,
    outputs: Sequence[str] = (OUTPUT,),
    metadata: Mapping[str, str] | None = None,
    pixels: NDArray[np.uint8] | None = None,
) -> None:
    """Write a backbone as ``images`` uint8 [N, size, size, 3] RGB -> float32 features [N, ...].

    The pixels are those of ``components.dataset.images.load_rgb``; they are normalised in the graph. The
    file's metadata names ``size``. The same module gives the same bytes.

    Args:
        module: a network without a head: gives a tensor, or a tuple of them.
        mean, std: per RGB channel, for pixels in 0..1.
        outputs: a name for each tensor that the module gives.
        metadata: more of it.
        pixels: uint8 [N, size, size, 3], N above 1: images to prove the file on; None: random ones.

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

        def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
            values = images.permute(0, 3, 1, 2).float()
            return self.network(values * self.scale + self.shift)

    noise = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    network = FromPixels().eval()
    graph = tracing.trace(network, torch.from_numpy(noise), (INPUT, *outputs))
    tracing.save(graph, path, {**(metadata or {}), "size": str(size)}, name="features")
    pixels = noise if pixels is None else pixels
    with torch.inference_mode():
        found = network(torch.from_numpy(pixels))
    expected = (found,) if isinstance(found, torch.Tensor) else found
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for name, own, given in zip(outputs, expected, session.run(list(outputs), {INPUT: pixels}), strict=True):
        apart = float(np.abs(given - own.numpy()).max() / max(float(own.abs().max()), 1e-12))
        if not apart <= AGREES:
            raise RetortError(
                f"{path.name}: ONNX Runtime's {name} differ from torch's by {apart:.1e} of their size"
            )

"""``.pth`` and ``.pt``: what ``torch.save`` writes."""

from __future__ import annotations

from pathlib import Path

from components.common.errors import RetortError
from components.weights.readers.stored import Stored


def looks_like(head: bytes) -> bool:
    """Whether a file begins as a zip archive, or as a pickle."""
    return head.startswith((b"PK\x03\x04", b"\x80"))


def read(path: Path) -> Stored:
    """Raises RetortError naming the file when it is none, or holds more than tensors and containers."""
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RetortError(f"{path}: not a file of tensors ({str(error).splitlines()[0]})") from None
    tensors = {name: t.float().numpy() if t.is_floating_point() else t.numpy() for name, t in content.items()}
    return Stored(tensors=tensors, kind=".pth")

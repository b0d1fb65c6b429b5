"""``.safetensors``: read, and refused where it is damaged, by the format's own library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from components.common.errors import RetortError
from components.weights.readers.stored import WIDENED, Array, Stored, shown, unprefixed

if TYPE_CHECKING:
    import torch

MAX_HEADER = 100_000_000  # bytes; the library's own limit


def looks_like(head: bytes) -> bool:
    """Whether a file begins as this format does: a length, and the brace that opens the header."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER


def read(path: Path) -> Stored:
    """Tensors as views of the mapped file, in its order; bfloat16 as float32.

    Raises:
        RetortError: naming the file, and what the library finds wrong with it; or a tensor whose numbers
            numpy has not (float8).
    """
    from safetensors import SafetensorError, safe_open

    stored = Stored({}, ".safetensors")
    try:
        with safe_open(path, framework="pt") as file:  # numpy knows no bfloat16
            stored.metadata = dict(file.metadata() or {})
            for name in file.offset_keys():
                stored.tensors[name] = _array(path, name, file.get_tensor(name), stored)
    except (SafetensorError, OSError) as error:
        said = str(error).removeprefix("Error while deserializing header: ").partition("\n")[0]
        raise RetortError(f"{path}: not a whole .safetensors file ({said[:160]}); fetch it again") from None
    return unprefixed(stored)


def _array(path: Path, name: str, tensor: torch.Tensor, stored: Stored) -> Array:
    import torch

    if tensor.dtype == torch.bfloat16:
        stored.notes = [WIDENED]
        tensor = tensor.float()
    try:
        return tensor.numpy()
    except TypeError:
        raise RetortError(
            f"{path}: tensor '{shown(name)}' is of {tensor.dtype}, which no start weights are"
        ) from None

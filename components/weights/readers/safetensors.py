"""``.safetensors``: uint64 length of a JSON header, the header, raw little-endian data."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from components.common.errors import RetortError
from components.weights.readers.stored import Array, Stored, widened

MAX_HEADER = 100_000_000  # the limit of the format's own library
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
    "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip


def looks_like(head: bytes) -> bool:
    """Whether a file begins as this format does: a length, and the brace that opens the header."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER


def read(path: Path) -> Stored:
    """Tensors as views of the mapped file; bfloat16 as float32.

    Raises:
        RetortError: naming the file, and the tensor whose entry does not fit its data.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
            if length > min(MAX_HEADER, size - 8):
                raise RetortError(f"{path}: not a whole .safetensors file: its header is cut off")
            header = file.read(length)
        begin = 8 + length
        data = np.memmap(path, np.uint8, "r", begin) if size > begin else np.empty(0, np.uint8)
    except OSError as error:
        raise RetortError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError):
        raise RetortError(f"{path}: not a .safetensors file: its header is no JSON") from None
    if not isinstance(entries, dict):
        raise RetortError(f"{path}: not a .safetensors file: its header is no table of tensors")
    metadata = entries.pop("__metadata__", {})
    return Stored(
        tensors={name: _tensor(path, name, entry, data) for name, entry in entries.items()},
        kind=".safetensors",
        metadata={str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {},
    )


def _tensor(path: Path, name: str, entry: Any, data: Array) -> Array:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        counts = [*shape, begin, end]
    except (KeyError, TypeError, ValueError):
        raise RetortError(f"{path}: tensor '{name}' has no dtype, shape and data_offsets") from None
    if not all(type(count) is int and count >= 0 for count in counts):
        raise RetortError(f"{path}: tensor '{name}' has a shape or offsets that are no counts")
    if dtype not in DTYPES:
        raise RetortError(f"{path}: tensor '{name}' is of dtype {dtype}; known: {', '.join(DTYPES)}")
    kind = np.dtype(DTYPES[dtype])
    wanted = math.prod(shape) * kind.itemsize
    if end - begin != wanted or len(shape) > 32:
        raise RetortError(f"{path}: tensor '{name}' needs {wanted} bytes, its offsets give {end - begin}")
    if end > len(data):
        raise RetortError(f"{path}: tensor '{name}' ends beyond the file: half a file? Fetch it again")
    array = data[begin:end].view(kind).reshape(shape)
    return widened(array) if dtype == "BF16" else np.asarray(array)

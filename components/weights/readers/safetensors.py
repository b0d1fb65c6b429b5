"""``.safetensors``: uint64 length of a JSON header, the header, raw little-endian data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from components.common.errors import RetortError
from components.weights.readers.stored import (
    WIDENED,
    Array,
    Stored,
    array,
    mapped,
    shown,
    unprefixed,
    widened,
)

MAX_HEADER = 10_000_000  # bytes; those of large networks have some hundred thousand
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
    "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip


def looks_like(head: bytes) -> bool:
    """Whether a file begins as this format does: a length, and the brace that opens the header."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER


def read(path: Path) -> Stored:
    """Tensors as views of the mapped file; bfloat16 as float32.

    Raises:
        RetortError: naming the file, and the tensor whose entry does not fit its data.
    """
    content = mapped(path)
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(MAX_HEADER, len(content) - 8):
        raise RetortError(f"{path}: not a whole .safetensors file: its header is cut off; fetch it again")
    try:
        entries = json.loads(bytes(content[8 : 8 + length]).decode())
    except (ValueError, RecursionError):
        raise RetortError(f"{path}: not a .safetensors file: its header is no JSON") from None
    if not isinstance(entries, dict):
        raise RetortError(f"{path}: not a .safetensors file: its header is no table of tensors")
    widens = any(isinstance(entry, dict) and entry.get("dtype") == "BF16" for entry in entries.values())
    metadata = entries.pop("__metadata__", None)
    data = content[8 + length :]
    stored = Stored(
        tensors=_tensors(path, entries, data),
        kind=".safetensors",
        notes=[WIDENED] if widens else [],
        metadata={k: str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {},
    )
    return unprefixed(stored)


def _tensors(path: Path, entries: dict[str, Any], data: memoryview) -> dict[str, Array]:
    tensors = {}
    left = len(data)
    for name, entry in entries.items():
        where = f"{path}: tensor '{shown(name)}'"
        begin, end = _extent(where, entry, len(data))
        left -= end - begin
        if left < 0:
            raise RetortError(f"{where} shares its bytes with another one, which the format does not allow")
        tensors[name] = _tensor(where, entry, data[begin:end])
    return tensors


def _extent(where: str, entry: Any, size: int) -> tuple[int, int]:
    try:
        begin, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise RetortError(f"{where} has no data_offsets") from None
    if not (type(begin) is int and type(end) is int and 0 <= begin <= end <= size):
        raise RetortError(f"{where} lies beyond the end of the file: half a file? Fetch it again")
    return begin, end


def _tensor(where: str, entry: Any, data: memoryview) -> Array:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
    except (KeyError, TypeError):
        raise RetortError(f"{where} has no dtype and shape") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise RetortError(f"{where} is of dtype {shown(str(dtype))}; known: {', '.join(DTYPES)}")
    found = array(data, DTYPES[dtype], shape, where)
    return widened(found) if dtype == "BF16" else found

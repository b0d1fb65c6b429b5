"""Paddle's static graph: one file a variable, each a LoDTensor, in a folder or a tar.

A file: uint32 version 0; uint64 LoD levels, each a uint64 byte length and its bytes; uint32 tensor version 0;
int32 length of a protobuf TensorDesc (field 1: data type; field 2, repeated: dims); raw little-endian data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from components.common.errors import RetortError
from components.weights.readers import tar
from components.weights.readers.stored import Array, Stored, array, mapped, shown, widened

# VarType.Type of Paddle's framework.proto
DTYPES = {
    0: "?", 1: "<i2", 2: "<i4", 3: "<i8", 4: "<f2", 5: "<f4", 6: "<f8", 20: "u1", 21: "i1", 22: "<u2",
}  # fmt: skip
BF16 = 22
MAX_LEVELS = 16
PROGRAM = "__model__"  # the graph beside the variables, where a folder was saved for inference


def read_folder(path: Path) -> Stored:
    """The variables of a folder; a folder in it, alone, is gone into.

    Raises:
        RetortError: naming the file that is none, or a link.
    """
    folder = path
    for _ in range(4):
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise RetortError(f"{folder}: cannot be read ({error.strerror})") from None
        entries = [entry for entry in entries if not entry.name.startswith(".")]
        if len(entries) != 1 or not entries[0].is_dir(follow_symlinks=False):
            break
        folder = Path(entries[0].path)
    tensors = {}
    for entry in entries:
        if entry.is_symlink() or not entry.is_file(follow_symlinks=False):
            raise RetortError(f"{entry.path}: not a plain file; a folder of weights has one file a variable")
        if entry.name != PROGRAM:
            tensors[entry.name] = parse(mapped(Path(entry.path)), entry.path)
    if not tensors:
        raise RetortError(f"{path}: an empty folder, no weights")
    return Stored(tensors, "a folder of LoDTensor variables")


def read_tar(path: Path) -> Stored:
    """The variables of a tar, as views of it; their names are those of the files, without folders.

    Raises:
        RetortError: naming the member that is no variable, or should not be in a tar of weights.
    """
    tensors: dict[str, Array] = {}
    for member, data in _variables(path):
        name = member.rpartition("/")[2]
        if name in tensors:
            raise RetortError(f"{path}: holds two files called {shown(name)}")
        tensors[name] = parse(data, f"{path}: {shown(member)}")
    if not tensors:
        raise RetortError(f"{path}: a tar without files, no weights")
    return Stored(tensors, "a tar of LoDTensor variables")


def _variables(path: Path) -> Iterator[tuple[str, memoryview]]:
    for member, data in tar.members(path):
        name = member.rpartition("/")[2]
        if name != PROGRAM and not name.startswith("."):
            yield member, data


def parse(data: memoryview, where: str) -> Array:
    """One variable, a view of ``data``; bfloat16 as float32.

    Args:
        where: what error messages begin with.

    Raises:
        RetortError: when it is no LoDTensor, or its data are not as long as its dims say.
    """
    at = 0

    def take(count: int) -> memoryview:
        nonlocal at
        if not 0 <= count <= len(data) - at:
            raise RetortError(f"{where}: no LoDTensor, or half of one")
        at += count
        return data[at - count : at]

    def number(size: int) -> int:
        return int.from_bytes(take(size), "little")

    version, levels = number(4), number(8)
    if version != 0 or levels > MAX_LEVELS:
        raise RetortError(f"{where}: no LoDTensor of version 0, the one that is known")
    for _ in range(levels):
        take(number(8))
    if number(4) != 0:
        raise RetortError(f"{where}: no LoDTensor of version 0, the one that is known")
    dtype, dims = _description(take(number(4)), where)
    if dtype not in DTYPES:
        raise RetortError(f"{where}: its data type {dtype} is none that weights have")
    found = array(data[at:], DTYPES[dtype], tuple(dims), where)
    return widened(found) if dtype == BF16 else found


def _description(data: memoryview, where: str) -> tuple[int, list[int]]:
    """Data type and dims of a protobuf TensorDesc."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while at < len(data) and shift < 64:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value
        raise RetortError(f"{where}: its description is damaged")

    dtype, dims = -1, []
    while at < len(data):
        key = varint()
        if key == 0x08:
            dtype = varint()
        elif key == 0x10:
            dims.append(varint())
        elif key == 0x12:  # packed
            end = varint() + at
            if end > len(data):
                raise RetortError(f"{where}: its description is damaged")
            while at < end:
                dims.append(varint())
        else:
            raise RetortError(f"{where}: its description is damaged")
    return dtype, dims

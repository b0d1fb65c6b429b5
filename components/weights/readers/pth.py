"""``.pth`` and ``.pt``: what ``torch.save`` writes, as a zip archive or (before PyTorch 1.6) in a row."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from components.common.errors import RetortError
from components.weights.readers import numpy_pickles, pickles
from components.weights.readers.pickles import Buildable, Global, PickleError
from components.weights.readers.stored import (
    MAX_DIMS,
    WIDENED,
    Array,
    Stored,
    array,
    mapped,
    shown,
    unwrap,
    widened,
)

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
BF16 = "bfloat16"
STORAGES = {
    "Float": "<f4", "Double": "<f8", "Half": "<f2", "Long": "<i8", "Int": "<i4", "Short": "<i2",
    "Char": "i1", "Byte": "u1", "Bool": "?", "BFloat16": BF16,
}  # fmt: skip
LOCAL_HEADER = 30  # bytes of a zip member's own header, before its name


def looks_like(head: bytes) -> bool:
    """Whether a file begins as either form does: as a zip, or with a pickle of the magic number."""
    magic = b"\x8a\x0a" + MAGIC.to_bytes(10, "little")
    return head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[2:14] == magic)


def read(path: Path) -> Stored:
    """Tensors as views of the mapped file; bfloat16 as float32.

    Raises:
        RetortError: naming the file, when it is none of the two forms, or wants to run something.
    """
    data = mapped(path)
    storages = _Storages()
    try:
        content = _read_zip(path, data, storages) if bytes(data[:2]) == b"PK" else _read_row(data, storages)
        content = numpy_pickles.resolved(content, _finished)
    except (PickleError, RetortError) as error:
        raise RetortError(f"{path}: not a readable .pth: {error}") from None
    stored = unwrap(content, ".pth", path)
    if any(storage.dtype == BF16 for storage in storages.by_key.values()):
        stored.notes.append(WIDENED)
    return stored


@dataclass
class _Storage:
    """A run of values that tensors are views of: ``numel`` of them, of one type."""

    dtype: str
    key: str
    numel: int
    values: Array | None = None

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == BF16 else np.dtype(self.dtype).itemsize

    def fill(self, data: memoryview) -> None:
        where = f"storage {shown(self.key)}"
        values = array(data, "<u2" if self.dtype == BF16 else self.dtype, (self.numel,), where)
        self.values = widened(values) if self.dtype == BF16 else values


@dataclass
class _Tensor(Buildable):
    """Part of a storage, by strides in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def build(self, state: Any) -> None:
        """A parameter's attributes are of no use here."""

    def array(self) -> Array:
        values = self.storage.values
        if values is None:
            raise PickleError(f"the values of storage {shown(self.storage.key)} are not in the file")
        count = 1
        for side in self.shape:
            count *= side
        last = self.offset + sum(
            (side - 1) * step for side, step in zip(self.shape, self.strides, strict=True)
        )
        if count > len(values) or (count and last >= len(values)):
            raise PickleError(f"a tensor is larger than its storage {shown(self.storage.key)}")
        if not count:
            return np.empty(self.shape, values.dtype)
        strides = [step * values.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides, writeable=False)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    counts = [offset, *shape, *strides]
    if not isinstance(storage, _Storage) or len(shape) != len(strides) or len(shape) > MAX_DIMS:
        raise PickleError("a tensor has no storage, shape and strides")
    if not all(type(count) is int and count >= 0 for count in counts):
        raise PickleError("a tensor has a shape or strides that are no counts")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(tensor: Any, *_: Any) -> _Tensor:
    if not isinstance(tensor, _Tensor):
        raise PickleError("a parameter is no tensor")
    return tensor


CALLS: pickles.Constructors = {
    "collections.OrderedDict": pickles.ordered_dict,
    "collections.defaultdict": lambda *_: {},
    "argparse.Namespace": lambda *_: {},  # timm's checkpoints carry their arguments
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": lambda sides=(): tuple(sides) if isinstance(sides, tuple | list) else (),
    "torch.device": lambda *_: None,
    "pathlib.PosixPath": lambda *_: None,
    "pathlib.WindowsPath": lambda *_: None,
    "pathlib._local.PosixPath": lambda *_: None,  # as Python 3.13 names them in a pickle
    "pathlib._local.WindowsPath": lambda *_: None,
    "builtins.set": lambda items=(): list(items) if isinstance(items, tuple | list) else [],
    "__builtin__.set": lambda items=(): list(items) if isinstance(items, tuple | list) else [],
}


def _calls(data: memoryview) -> pickles.Constructors:
    return {**numpy_pickles.Arrays(len(data)).calls, **CALLS}


class _Storages:
    """The storages that a pickle refers to, each once."""

    def __init__(self) -> None:
        self.by_key: dict[str, _Storage] = {}

    def __call__(self, reference: Any) -> _Storage:
        if not isinstance(reference, tuple) or len(reference) < 5 or reference[0] != "storage":
            raise PickleError("the pickle refers to what is no storage of values")
        _, kind, key, _, numel, *view = reference
        name = (
            kind.name.removesuffix("Storage") if isinstance(kind, Global) and kind.module == "torch" else ""
        )
        if name not in STORAGES or type(numel) is not int or numel < 0 or not isinstance(key, str):
            raise PickleError(f"the pickle refers to values of type {shown(str(kind)[:60])}")
        if view and view[0] is not None:
            raise PickleError("a storage is part of another one, as files before PyTorch 0.4 have it")
        found = self.by_key.setdefault(key, _Storage(STORAGES[name], key, numel))
        if (found.dtype, found.numel) != (STORAGES[name], numel):
            raise PickleError(f"storage {shown(key)} is said to be of two sizes or types: a damaged file")
        return found


def _read_row(data: memoryview, storages: _Storages) -> Any:
    """Pickles of magic number, protocol, system, content, keys; then each storage: int64 count, values."""
    at = 0
    heads = []
    for _ in range(3):
        value, at = pickles.load(data, at, {})
        heads.append(value)
    system = heads[2]
    if (
        heads[:2] != [MAGIC, PROTOCOL]
        or not isinstance(system, dict)
        or system.get("little_endian") is not True
    ):
        raise PickleError("its first words are not those of torch.save on a little-endian machine")
    content, at = pickles.load(data, at, _calls(data), storages)
    keys, at = pickles.load(data, at, {})
    if not isinstance(keys, list):
        raise PickleError("the list of its storages is missing")
    for key in keys:
        storage = storages.by_key.get(key) if isinstance(key, str) else None
        count = int.from_bytes(data[at : at + 8], "little")
        if storage is None or count != storage.numel or len(data) - at < 8:
            raise PickleError("a storage is missing or of another size: half a file? Fetch it again")
        size = count * storage.itemsize
        storage.fill(data[at + 8 : at + 8 + size])
        at += 8 + size
    return content


def _read_zip(path: Path, data: memoryview, storages: _Storages) -> Any:
    """``NAME/data.pkl``, and ``NAME/data/KEY`` for each storage; all stored, none compressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, RuntimeError) as error:
        raise PickleError(f"a zip archive that is damaged or cut off ({error})") from None
    main = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
    if len(main) != 1:
        raise PickleError("a zip archive, but not one of torch.save (no data.pkl in it)")
    root = main[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise PickleError("a TorchScript program, which would have to be run; save its state_dict instead")
    order = entries.get(f"{root}byteorder")
    if order is not None and bytes(_member(data, order)) != b"little":
        raise PickleError("it is not little-endian")
    main_pickle = _member(data, entries[main[0]])
    content, _ = pickles.load(main_pickle, 0, _calls(main_pickle), storages)
    for key, storage in storages.by_key.items():
        entry = entries.get(f"{root}data/{key}")
        if entry is None:
            raise PickleError(f"the values of storage {shown(key)} are not in the archive")
        storage.fill(_member(data, entry)[: storage.numel * storage.itemsize])
    return content


def _member(data: memoryview, entry: zipfile.ZipInfo) -> memoryview:
    """A member's content, where it lies in the file."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise PickleError(f"{shown(entry.filename)} is compressed or encrypted, which torch.save never does")
    start = entry.header_offset
    header = data[start : start + LOCAL_HEADER] if start >= 0 else data[:0]
    if len(header) < LOCAL_HEADER or bytes(header[:4]) != b"PK\x03\x04":
        raise PickleError("a zip archive that is damaged or cut off")
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    begin = start + LOCAL_HEADER + names
    if entry.file_size != entry.compress_size or begin + entry.file_size > len(data):
        raise PickleError("a zip archive that is damaged or cut off")
    return data[begin : begin + entry.file_size]


def _finished(value: Any) -> Any:
    return value.array() if isinstance(value, _Tensor) else numpy_pickles.finished(value)

"""What every reader returns, and how it looks at a file: mapped, not copied, every length checked first."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.common.errors import RetortError

Array = NDArray[Any]
MAX_DIMS = 32  # numpy's own limit was this for long; networks have up to five
MAX_SIDE = 1 << 40
MAX_NAME = 500


@dataclass
class Stored:
    """Tensors by name in the file's order, as stored (views of the mapped file where the format allows).

    ``kind`` names the format; ``notes`` say what was unwrapped or left out; ``arch`` is the architecture that
    the file itself claims to be for; ``metadata`` are a .safetensors file's own words.
    """

    tensors: dict[str, Array]
    kind: str
    notes: list[str] = field(default_factory=list)
    arch: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)


def mapped(path: Path) -> memoryview:
    """A file's bytes, mapped read-only: they take memory only as they are touched.

    Raises:
        RetortError: naming the file, when it cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
    except (OSError, ValueError) as error:
        raise RetortError(f"{path}: cannot be read ({error})") from None


def array(data: memoryview | bytes, dtype: str, shape: tuple[Any, ...], where: str) -> Array:
    """The array that raw little-endian data hold, exactly: a view.

    Args:
        where: what error messages begin with: file and tensor.

    Raises:
        RetortError: when ``shape`` is none, or asks for more or fewer bytes than there are.
    """
    if len(shape) > MAX_DIMS or not all(type(side) is int and 0 <= side < MAX_SIDE for side in shape):
        raise RetortError(f"{where}: its shape is no list of up to {MAX_DIMS} counts")
    kind = np.dtype(dtype)
    wanted = math.prod(shape) * kind.itemsize
    if wanted != len(data):
        have = "only " if len(data) < wanted else ""
        raise RetortError(
            f"{where}: its shape {'x'.join(map(str, shape))} needs {wanted:,} bytes, there are {have}"
            f"{len(data):,}: half a file? Fetch it again"
        )
    return np.frombuffer(data, kind).reshape(shape)


def shown(name: str) -> str:
    """A name out of a file, fit for one line of a message."""
    return name if len(name) <= 120 and name.isprintable() else f"{name[:100]!a}..."


WIDENED = "bfloat16 converted to float32"


def widened(bits: Array) -> NDArray[np.float32]:
    """float32 [...] of bfloat16 given as its bits, uint16: the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


PREFIXES = ("module.", "_orig_mod.", "model.")
# the first of equals is taken: averaged weights only where there are no others
WRAPPERS = (
    "state_dict", "model", "model_state_dict", "model_state", "net", "network", "params",
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema",
)  # fmt: skip


def unwrap(content: Any, kind: str, path: Path) -> Stored:
    """The tensors of what a file holds: a table of arrays, or one inside ``{"model": ...}`` and the like.

    Raises:
        RetortError: when there are no tensors by name in it.
    """
    notes: list[str] = []
    arch = None
    for _ in range(3):
        if not isinstance(content, dict):
            break
        if isinstance(content.get("arch"), str):
            arch = shown(content["arch"])
        inside = {name: content[name] for name in WRAPPERS if isinstance(content.get(name), dict)}
        # beside the table there may be other arrays, such as the best accuracy
        if _arrays(content) > max(map(_arrays, inside.values()), default=0):
            return _without_prefix(content, kind, notes, arch)
        if not inside:
            break
        name = max(inside, key=lambda name: _arrays(inside[name]))
        others = [f"'{other}'" for other in inside if other != name and _arrays(inside[other])]
        notes.append(f"taken from inside '{name}'" + (f", not {', '.join(others)}" if others else ""))
        content = inside[name]
    keys = ", ".join(shown(str(key)) for key in list(content)[:5]) if isinstance(content, dict) else ""
    has = f"; it has {keys}" if keys else ""
    raise RetortError(f"{path}: holds no table of tensors by name (a 'state dict'), nor one in 'model'{has}")


def _arrays(table: Mapping[Any, Any]) -> int:
    return sum(isinstance(value, np.ndarray) for value in table.values())


def _without_prefix(content: Mapping[Any, Any], kind: str, notes: list[str], arch: str | None) -> Stored:
    tensors = {name: value for name, value in content.items() if isinstance(value, np.ndarray)}
    tensors = {str(name): value for name, value in tensors.items()}
    stored = Stored(tensors, kind, notes, arch)
    return unprefixed(stored)


def unprefixed(stored: Stored) -> Stored:
    """Take off what wrappers put in front of every name, such as ``module.``; said in the notes."""
    for prefix in PREFIXES * 2:
        if stored.tensors and all(name.startswith(prefix) for name in stored.tensors):
            stored.tensors = {name[len(prefix) :]: value for name, value in stored.tensors.items()}
            stored.notes.append(f"'{prefix}' taken off every name")
    return stored

"""What numpy's arrays call when they are unpickled, over the bytes of the file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from components.weights.readers.pickles import Buildable, Constructors, Global, PickleError, Text
from components.weights.readers.stored import Array, array, shown, widened

KINDS = {
    "f2": "<f2", "f4": "<f4", "f8": "<f8", "i1": "i1", "i2": "<i2", "i4": "<i4", "i8": "<i8",
    "u1": "u1", "u2": "<u2", "u4": "<u4", "u8": "<u8", "b1": "?",
}  # fmt: skip


class Dtype(Buildable):
    """``numpy.dtype(code, align, copy)``; its state is (version, byte order, ...)."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or code not in KINDS:
            raise PickleError(f"an array in the pickle is of dtype {shown(str(code))}, which no weights are")
        self.code = KINDS[code]

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "|", "="):
            raise PickleError("an array in the pickle is not little-endian")


class Pending(Buildable):
    """An array that has no values yet; its state is (version, shape, dtype, is Fortran-ordered, bytes)."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        self.array: Array | None = None

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise PickleError("an array in the pickle has no shape, dtype and values")
        _, shape, dtype, fortran, data = state
        self.array = self._arrays.array(data, dtype, shape, bool(fortran))


class Arrays:
    """The constructors, for one file: what they build takes no more bytes than the file has.

    Args:
        size: bytes of the file.
    """

    def __init__(self, size: int) -> None:
        self._bytes_left = self._text_left = size
        self.calls: Constructors = {
            **{
                f"{module}.{name}": call
                for module in ("numpy.core", "numpy._core")
                for name, call in (
                    ("multiarray._reconstruct", self._pending),
                    ("multiarray.scalar", self._scalar),
                    ("numeric._frombuffer", self._from_buffer),
                )
            },
            "numpy.dtype": Dtype,
            "_codecs.encode": self._encode,
        }

    def _pending(self, kind: Any = None, *_: Any) -> Pending:
        if kind != Global("numpy", "ndarray"):
            raise PickleError("the pickle makes an array of an unknown class")
        return Pending(self)

    def _from_buffer(self, data: Any, dtype: Any, shape: Any, order: Any = "C") -> Pending:
        """Of protocol 5."""
        made = Pending(self)
        made.build((1, shape, dtype, order == "F", data))
        return made

    def _scalar(self, dtype: Any, data: Any = b"") -> Pending:
        return self._from_buffer(data, dtype, ())

    def _encode(self, text: Any, encoding: Any = "latin1") -> memoryview:
        """How protocol 2 writes bytes: as a string of so many characters."""
        if encoding not in ("latin1", "latin-1"):
            raise PickleError("the pickle has bytes in an unknown encoding")
        decoded = text.decode() if isinstance(text, Text) else text
        if not isinstance(decoded, str):
            raise PickleError("the pickle encodes what is no string")
        self._text_left -= len(decoded)
        if self._text_left < 0:
            raise PickleError("the pickle uses the same bytes again and again")
        return memoryview(decoded.encode("latin1"))

    def array(self, data: Any, dtype: Any, shape: Any, fortran: bool) -> Array:
        if not (isinstance(dtype, Dtype) and isinstance(shape, tuple) and isinstance(data, memoryview)):
            raise PickleError("an array in the pickle has no shape, dtype and values")
        self._bytes_left -= len(data)
        if self._bytes_left < 0:
            raise PickleError("the pickle uses the same bytes again and again")
        found = array(data, dtype.code, shape[::-1] if fortran else shape, "an array in the pickle")
        if fortran:
            found = found.T
        return widened(found) if dtype.code == "<u2" else found  # bfloat16, which numpy does not know


def resolved(value: Any, finished: Callable[[Any], Any], depth: int = 4) -> Any:
    """A pickle's value, with ``finished`` of everything that is no table; tables are followed ``depth`` deep.

    A table that stands in several places is followed once, so that references cannot multiply the work.
    """
    seen: dict[int, dict[Any, Any]] = {}

    def follow(part: Any, left: int) -> Any:
        if not isinstance(part, dict) or not left:
            return finished(part)
        if id(part) not in seen:
            made: dict[Any, Any] = {}
            seen[id(part)] = made
            made |= {key: follow(item, left - 1) for key, item in part.items()}
        return seen[id(part)]

    return follow(value, depth)


def finished(value: Any) -> Any:
    """The array of what was one; anything else stays."""
    if isinstance(value, tuple) and len(value) == 2:  # paddle.save of a single tensor: its name, its values
        value = value[1]
    return value.array if isinstance(value, Pending) else value

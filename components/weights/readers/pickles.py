"""A machine for pickles that can build containers, and nothing else: no name in a pickle is ever looked up.

Python's own unpickler can be kept from importing, but not from taking memory that a length in the file merely
claims. Here every length is held against the file, strings stay views of it, and what a pickle would call is
handed to a table of known constructors.

The format: https://docs.python.org/3/library/pickletools.html (protocols 2 to 5).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from components.weights.readers.stored import shown

MAX_STEPS = 3_000_000  # about thirty for a tensor
LAZY = 4096  # longer strings are kept as views until they are needed


class PickleError(Exception):
    """What is wrong with a pickle; the reader that asked adds the file's name."""


@dataclass(frozen=True)
class Global:
    """A name that a pickle refers to, such as ``numpy.ndarray``; it stays a name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class Text:
    """A long string, as UTF-8 in the file."""

    data: memoryview

    def decode(self) -> str:
        return _utf8(self.data)


class Buildable:
    """What a constructor may return so that the pickle gives it a state afterwards."""

    def build(self, state: Any) -> None:
        """Take the state; raise PickleError when it is none of this kind."""
        raise NotImplementedError


Constructors = Mapping[str, Callable[..., Any]]


class _Mark:
    pass


MARK = _Mark()


def load(
    data: memoryview, start: int, calls: Constructors, persistent: Callable[[Any], Any] | None = None
) -> tuple[Any, int]:
    """The value of the pickle that begins at ``start``, and where it ends.

    Args:
        calls: what a name (``numpy.dtype``) does when the pickle calls it, given the arguments.
        persistent: what the pickle's references to things outside it stand for.

    Raises:
        PickleError: when it is no whole pickle, or wants anything else than containers and ``calls``.
    """
    machine = _Machine(data, start, calls, persistent)
    try:
        return machine.run(), machine.at
    except (IndexError, struct.error):
        raise PickleError("the pickle is cut off or damaged") from None
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        raise PickleError(f"the pickle is damaged ({type(error).__name__})") from None


class _Machine:
    def __init__(
        self, data: memoryview, at: int, calls: Constructors, persistent: Callable[[Any], Any] | None
    ) -> None:
        self.data, self.at = data, at
        self.calls, self.persistent = calls, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        stack = self.stack
        for _ in range(MAX_STEPS):
            code = self.data[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                return stack.pop()
            step = _STEPS.get(code)
            if step is None:
                raise PickleError(f"the pickle is damaged, or uses what no weights need (opcode {code:#04x})")
            step(self)
        raise PickleError(f"the pickle has more than {MAX_STEPS:,} steps; weights have some thousands")

    # --- reading -----------------------------------------------------------------------------------------

    def take(self, count: int) -> memoryview:
        if count < 0 or count > len(self.data) - self.at:
            raise PickleError("a string in the pickle is longer than the file: half a file? Fetch it again")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        end = self.at
        while self.data[end] != 0x0A:
            end += 1
            if end - self.at > 200:
                raise PickleError("the pickle is damaged (an endless name)")
        text = _utf8(self.data[self.at : end])
        self.at = end + 1
        return text

    def text(self, count: int) -> None:
        view = self.take(count)
        self.stack.append(Text(view) if count > LAZY else _utf8(view))

    def marked(self) -> list[Any]:
        """What lies above the last mark, which goes too."""
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise PickleError("the pickle is damaged (a mark is missing)")

    # --- building ----------------------------------------------------------------------------------------

    def tuple(self, count: int) -> None:
        if count > len(self.stack):
            raise IndexError
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        self.stack.append(items)

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise PickleError("the pickle is damaged (items for no table)")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | int):
                raise PickleError("a table in the pickle has keys that are no names")
            target[key] = value

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise PickleError("the pickle is damaged (items for no list)")
        target.extend(items)

    def reduce(self) -> None:
        arguments, callee = self.stack.pop(), self.stack.pop()
        if not isinstance(callee, Global) or not isinstance(arguments, tuple):
            raise PickleError("the pickle calls what is no function")
        call = self.calls.get(str(callee))
        if call is None:
            raise PickleError(
                f"it asks to run {shown(str(callee))}, which no weights need; refused, nothing was run"
            )
        self.stack.append(call(*arguments))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Buildable):
            target.build(state)
        elif not isinstance(target, dict):  # an ordered table's attributes are of no use here
            raise PickleError("the pickle sets the state of what has none")

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleError("the pickle is damaged (a name that is none)")
        self.stack.append(Global(module, name))

    def put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def get(self, key: int) -> None:
        if key not in self.memo:
            raise PickleError("the pickle is damaged (it refers to what is not there)")
        self.stack.append(self.memo[key])

    def refer(self) -> None:
        if self.persistent is None:
            raise PickleError("the pickle refers to things outside it")
        self.stack.append(self.persistent(self.stack.pop()))


def _utf8(view: memoryview) -> str:
    return bytes(view).decode("utf-8", "surrogatepass")


def _long(view: memoryview) -> int:
    if len(view) > 16:
        raise PickleError("the pickle has a number that is too long")
    return int.from_bytes(view, "little", signed=True)


_STEPS: dict[int, Callable[[_Machine], Any]] = {
    0x80: lambda m: m.take(1),  # PROTO
    0x95: lambda m: m.take(8),  # FRAME
    ord("("): lambda m: m.stack.append(MARK),
    ord("0"): lambda m: m.stack.pop(),
    ord("1"): lambda m: m.marked(),  # POP_MARK
    ord("2"): lambda m: m.stack.append(m.stack[-1]),
    ord("N"): lambda m: m.stack.append(None),
    0x88: lambda m: m.stack.append(True),
    0x89: lambda m: m.stack.append(False),
    ord("J"): lambda m: m.stack.append(m.number("<i")),
    ord("K"): lambda m: m.stack.append(m.number("<B")),
    ord("M"): lambda m: m.stack.append(m.number("<H")),
    0x8A: lambda m: m.stack.append(_long(m.take(m.number("<B")))),
    0x8B: lambda m: m.stack.append(_long(m.take(m.number("<i")))),
    ord("G"): lambda m: m.stack.append(m.number(">d")),
    ord("X"): lambda m: m.text(m.number("<I")),
    0x8C: lambda m: m.text(m.number("<B")),
    0x8D: lambda m: m.text(m.number("<Q")),
    ord("T"): lambda m: m.stack.append(m.take(m.number("<i"))),
    ord("U"): lambda m: m.stack.append(m.take(m.number("<B"))),
    ord("B"): lambda m: m.stack.append(m.take(m.number("<I"))),
    ord("C"): lambda m: m.stack.append(m.take(m.number("<B"))),
    0x8E: lambda m: m.stack.append(m.take(m.number("<Q"))),
    0x96: lambda m: m.stack.append(m.take(m.number("<Q"))),  # BYTEARRAY8
    ord("}"): lambda m: m.stack.append({}),
    ord("]"): lambda m: m.stack.append([]),
    0x8F: lambda m: m.stack.append([]),  # EMPTY_SET, whose order does not matter here
    ord(")"): lambda m: m.stack.append(()),
    ord("t"): lambda m: m.stack.append(tuple(m.marked())),
    0x85: lambda m: m.tuple(1),
    0x86: lambda m: m.tuple(2),
    0x87: lambda m: m.tuple(3),
    ord("s"): lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    ord("u"): lambda m: m.set_items(m.marked()),
    ord("a"): lambda m: m.append([m.stack.pop()]),
    ord("e"): lambda m: m.append(m.marked()),
    0x90: lambda m: m.append(m.marked()),  # ADDITEMS
    ord("c"): lambda m: m.stack.append(Global(m.line(), m.line())),
    0x93: lambda m: m.stack_global(),
    ord("R"): lambda m: m.reduce(),
    0x81: lambda m: m.reduce(),  # NEWOBJ
    ord("b"): lambda m: m.build(),
    ord("q"): lambda m: m.put(m.number("<B")),
    ord("r"): lambda m: m.put(m.number("<I")),
    0x94: lambda m: m.put(len(m.memo)),  # MEMOIZE
    ord("h"): lambda m: m.get(m.number("<B")),
    ord("j"): lambda m: m.get(m.number("<I")),
    ord("Q"): lambda m: m.refer(),
}


def ordered_dict(*pairs: Any) -> dict[Any, Any]:
    """``collections.OrderedDict``: in use, always called without arguments and filled afterwards."""
    if pairs and pairs != ([],):
        raise PickleError("an ordered table in the pickle is not empty when it is made")
    return {}

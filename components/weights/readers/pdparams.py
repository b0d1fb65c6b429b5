"""``.pdparams``: Paddle's pickle of a table from names to numpy arrays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.common.errors import RetortError
from components.weights.readers import numpy_pickles, pickles
from components.weights.readers.stored import Stored, mapped, unwrap

NAMES = "StructuredToParameterName@@"  # from structured names to those of the static graph: not needed


def read(path: Path) -> Stored:
    """Tensors as views of the mapped file.

    Raises:
        RetortError: naming the file, when it holds anything but arrays and containers.
    """
    data = mapped(path)
    calls: dict[str, Callable[..., Any]] = {
        **numpy_pickles.Arrays(len(data)).calls,
        "collections.OrderedDict": pickles.ordered_dict,
        "builtins.tuple": _tuple,
        "__builtin__.tuple": _tuple,
    }
    try:
        content, _ = pickles.load(data, 0, calls)
    except (pickles.PickleError, RetortError) as error:
        raise RetortError(f"{path}: not a readable .pdparams: {error}") from None
    content = numpy_pickles.resolved(content, numpy_pickles.finished)
    if isinstance(content, dict):
        content.pop(NAMES, None)
    return unwrap(content, ".pdparams", path)


def _tuple(items: object = ()) -> tuple[object, ...]:
    if not isinstance(items, tuple | list):
        raise pickles.PickleError("the pickle makes a tuple of what is no list")
    return tuple(items)

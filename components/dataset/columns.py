"""Arrow columns: what is said of one value in Python, done to millions of rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

Columns = dict[str, pa.Array]  # of one portion of rows, by name


def by_value(column: pa.Array, function: Callable[[Any], Any], kind: pa.DataType) -> pa.Array:
    """``function`` of each value, called once a distinct value; a null stays null."""
    coded = column.dictionary_encode()
    values = pa.array([function(value) for value in coded.dictionary.to_pylist()], kind)
    return values.take(coded.indices)


def matches(pattern: re.Pattern[str], column: pa.Array) -> pa.Array:
    """Whether ``pattern`` matches the whole of each string: Python's own, as everywhere in the house."""
    match = pattern.fullmatch
    return pa.array([match(text) is not None for text in column.to_pylist()], pa.bool_())


def equals(column: pa.Array, value: str) -> pa.Array:
    """Where the column has this value; false where it is null."""
    return pc.fill_null(pc.equal(column, value), False)


def put(column: pa.Array, where: pa.Array, values: Any) -> pa.Array:
    """The column with ``values`` (one, or as many as ``where`` is true) where ``where`` is true."""
    if not isinstance(values, (list, pa.Array)):
        return pc.if_else(where, pa.scalar(values, column.type), column)
    return pc.replace_with_mask(column, where, pa.array(values, column.type))


def kept(columns: Columns, where: pa.Array) -> Columns:
    """The rows for which ``where`` is true."""
    return {name: column.filter(where) for name, column in columns.items()}

"""The process around the work: its environment variables, its garbage collector."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables inside the block; afterwards they are what they were, whatever the block made of them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def collect_less_often() -> None:
    """Let the garbage collector run when 10,000 objects are new, instead of 700, and over old ones rarely.

    Importing torch, timm and MLflow makes a great many objects that stay; at Python's own thresholds, going
    through them again and again takes half as long as the imports themselves.
    """
    gc.set_threshold(10_000, 20, 50)

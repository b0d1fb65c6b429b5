"""Coverage: which tensors of a network weights fill, which they do not, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.weights.readers.stored import shown

NAMED = 3  # tensors that a message names
COUNTER = "num_batches_tracked"  # how often a norm was updated: no part of what a network computes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Coverage:
    """A network's tensors against those of a file, by name; counters of batch norms are left out.

    ``wrong_shape`` holds (name, shape in the file, shape in the network); ``parameters`` and ``covered``
    count values, running statistics among them.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shape: tuple[tuple[str, Shape, Shape], ...]
    parameters: int
    covered: int

    @property
    def share(self) -> float:
        """Share of the network's values that the file fills, 0..1; exactly 1.0 only when it fills all."""
        return self.covered / self.parameters if self.parameters else 0.0

    def deeper(self) -> list[str]:
        """Unexpected tensors of blocks behind the network's last: ``layer1.2`` where it ends at ``layer1.1``.

        They are what tells a deeper network's weights, which fill this one to the last tensor.
        """
        highest: dict[str, int] = {}
        for name in (*self.matched, *self.missing, *(name for name, _, _ in self.wrong_shape)):
            for above, number in _numbered(name):
                highest[above] = max(highest.get(above, 0), number)
        return [
            name
            for name in self.unexpected
            if any(number > highest.get(above, number) for above, number in _numbered(name))
        ]

    def faults(self) -> str:
        """What is wrong, with the first tensors at fault; empty when there is nothing."""
        shapes = [
            f"{name} ({_shape(found)}, the network has {_shape(own)})"
            for name, found, own in self.wrong_shape
        ]
        parts = [
            f"{len(names)} {what}: {some(names)}"
            for what, names in (
                ("missing", self.missing),
                ("of another shape", shapes),
                ("without a place in the network", self.unexpected),
            )
            if names
        ]
        return "; ".join(parts)


def compare(network: Mapping[str, Shape], found: Mapping[str, Shape]) -> Coverage:
    """Compare a network's tensors with those found in a file, both as name -> shape."""
    own = {name: shape for name, shape in network.items() if not name.endswith(COUNTER)}
    matched = [name for name, shape in own.items() if found.get(name) == shape]
    return Coverage(
        matched=tuple(matched),
        missing=tuple(name for name in own if name not in found),
        unexpected=tuple(name for name in found if name not in network and not name.endswith(COUNTER)),
        wrong_shape=tuple(
            (name, found[name], shape)
            for name, shape in own.items()
            if name in found and found[name] != shape
        ),
        parameters=sum(_size(shape) for shape in own.values()),
        covered=sum(_size(own[name]) for name in matched),
    )


def shapes(tensors: Mapping[str, Any]) -> dict[str, Shape]:
    """Name -> shape, of numpy arrays or torch tensors."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def some(names: Sequence[str], count: int = NAMED) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(shown(name) for name in names[:count]) + more


def _numbered(name: str) -> Iterator[tuple[str, int]]:
    """``layers.1.blocks.0.weight``: (``layers``, 1) and (``layers.1.blocks``, 0)."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.isdecimal() and len(part) < 6:
            yield ".".join(parts[:at]), int(part)


def _size(shape: Shape) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def _shape(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "scalar"

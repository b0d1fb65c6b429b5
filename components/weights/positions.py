"""Matching two networks' tensors by position, where the names differ: only with a proof of the order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from components.common.errors import RetortError
from components.weights.coverage import Shape


def by_position(found: Mapping[str, Shape], network: Mapping[str, Shape], where: str) -> dict[str, str]:
    """Name in the file -> name in the network, tensor by tensor in the order of both.

    The proof: both have as many tensors; each pair has one shape and one role (``weight``, ``running_var``,
    ...); tensors of one layer stay together on both sides; and numbers in names only rise on both sides, so
    neither order was shuffled or sorted as text.

    Args:
        where: what error messages begin with.

    Raises:
        RetortError: naming the first pair that does not fit.
    """
    pairs = dict(zip(found, network, strict=False))
    for name, own in pairs.items():
        if found[name] != network[own] or _role(name) != _role(own):
            raise RetortError(
                f"{where}: does not match the network by position: {name} {list(found[name])} stands where "
                f"{own} {list(network[own])} is expected; are these another architecture's weights?"
            )
    if len(found) != len(network):
        extra = next(iter(list(found)[len(network) :] or list(network)[len(found) :]))
        raise RetortError(
            f"{where}: has {len(found)} tensors, the network {len(network)}; the first without a partner is "
            f"{extra}; are these another architecture's weights?"
        )
    layers: dict[str, str] = {}
    for name, own in pairs.items():
        if layers.setdefault(_layer(name), _layer(own)) != _layer(own):
            raise RetortError(f"{where}: {name} would become part of {_layer(own)}, its layer of another")
    for names in (pairs, pairs.values()):
        late = _out_of_order(names)
        if late:
            raise RetortError(
                f"{where}: its tensors are not in the network's order ({late} comes late), "
                "so they cannot be matched by position"
            )
    return pairs


def _role(name: str) -> str:
    return name.rpartition(".")[2]


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _out_of_order(names: Iterable[str]) -> str:
    """The first name with a number lower than one that stood there before (``blocks.2`` after ``.10``)."""
    highest: dict[tuple[str, str], int] = {}
    for name in names:
        above = ""
        for part in name.split("."):
            stem, number = re.fullmatch(r"(.*?)(\d*)", part, re.DOTALL).groups()  # type: ignore[union-attr]
            if number:
                if int(number) < highest.get((above, stem), -1):
                    return name
                highest[above, stem] = int(number)
            above = f"{above}.{part}"
    return ""

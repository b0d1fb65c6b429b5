"""Recipes to try: which values vary, between which bounds, and how a recipe is written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, log
from typing import Any

import numpy as np

from components.common.errors import RetortError
from components.models.params import Net
from components.tools.params import Tune

DIGITS = 3  # of a number that was drawn: more of them say nothing

Values = dict[str, Any]  # by key below the network's section, such as ``lr.initial``


@dataclass(frozen=True)
class Axis:
    """What is searched: from ``low`` to ``high``, on a logarithmic scale or not, or among ``choices``."""

    key: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[str, ...] = ()

    def at(self, share: float) -> Any:
        """The value at a share of the way, 0..1."""
        if self.choices:
            return self.choices[min(int(share * len(self.choices)), len(self.choices) - 1)]
        if self.log:
            value = exp(log(self.low) + share * (log(self.high) - log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return float(f"{value:.{DIGITS}g}")


@dataclass
class Tried:
    """One trial: its recipe, a row an epoch, and how it ended: ``done``, ``stopped``, or with a fault."""

    number: int
    values: Values
    rows: list[dict[str, Any]] = field(default_factory=list)
    end: str = "stopped"

    @property
    def score(self) -> float:
        """Macro recall on the validation split, of the best epoch: the one that training keeps."""
        return max((row["val_macro_recall"] for row in self.rows), default=0.0)


def axes(settings: Tune, net: Net) -> list[Axis]:
    """What the settings let vary.

    Raises:
        RetortError: when that is nothing.
    """
    found = []
    if settings.lr:
        low, high = (net.lr.initial * factor for factor in settings.lr)
        found.append(Axis("lr.initial", low, high, log=True))
    if settings.weight_decay:
        low, high = settings.weight_decay
        found.append(Axis("optimizer.weight_decay", low, high, log=True))
    if settings.label_smoothing:
        low, high = settings.label_smoothing
        found.append(Axis("train.label_smoothing", low, high))
    if settings.mixup:
        low, high = settings.mixup
        found.append(Axis("train.mixup", low, high))
    if settings.augment:
        found.append(Axis("train.augment", choices=tuple(settings.augment)))
    if not found:
        raise RetortError(
            "tune: every key is [], so there is nothing to search; give one, such as -o 'tune.lr=[0.1, 10]'"
        )
    return found


def proposals(space: Sequence[Axis], count: int, seed: int) -> list[Values]:
    """Recipes to try. The first changes nothing; the others lie evenly in the space.

    They are points of a scrambled Halton sequence: better spread than as many random ones (Bousquet et al.,
    "Critical hyper-parameters: no random, no cry", 2017).
    """
    from scipy.stats import qmc

    points = qmc.Halton(len(space), rng=np.random.default_rng(seed)).random(count - 1)
    return [
        {},
        *({axis.key: axis.at(float(u)) for axis, u in zip(space, row, strict=True)} for row in points),
    ]


def applied(net: Net, values: Values) -> Net:
    """The network's section with other values."""
    content = net.model_dump()
    for key, value in values.items():
        *parents, last = key.split(".")
        place = content
        for parent in parents:
            place = place[parent]
        place[last] = value
    return Net.model_validate(content)


def choose(tried: Sequence[Tried]) -> Tried:
    """The trial with the highest macro recall, of those that came to their end; of equal ones the first.

    Raises:
        RetortError: when none did.
    """
    whole = [one for one in tried if one.end == "done"]
    if not whole:
        faults = [one.end for one in tried if one.end != "stopped"]
        raise RetortError(f"tune: no trial came to its end ({faults[0] if faults else 'all were stopped'})")
    return max(whole, key=lambda one: (one.score, -one.number))


def described(values: Values) -> str:
    """A recipe in words."""
    said = (
        f"{key.rpartition('.')[2] if key != 'lr.initial' else 'lr'} {value}" for key, value in values.items()
    )
    return ", ".join(said) or "the fixed recipe"


def snippet(of: str, values: Values, verdict: str) -> str:
    """The best recipe as a piece of params.yaml, and as arguments of a command."""
    lines = [f"# The best recipe that 'retort tune' found ({verdict}). Put it into params.yaml, or type:"]
    lines += [f"#   -o {of}.{key}={value}" for key, value in values.items()] or [
        "#   nothing: it is the fixed one"
    ]
    sections: dict[str, list[str]] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, []).append(f"{name}: {value}")
    if sections:
        lines.append(f"{of}:")
        lines += [f"  {section}: {{{', '.join(items)}}}" for section, items in sections.items()]
    return "\n".join(lines) + "\n"

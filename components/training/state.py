"""Where a job stands, as checkpoints keep it, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass
class State:
    """Where a job stands, as its checkpoints keep it. Epochs of ``history`` are those that are done.

    Attributes:
        phase, epoch, step: how many are done of the phases, of its epochs, and of its steps.
        nets: tensors of each network that has finished a phase: those of its best epoch so far.
        scores: the row of the history of that epoch, by network.
        sizes: pixels a side of the images that it was judged on then.
        learner: state of the phase that has begun: its network, average and optimizer.
        best: the epoch of this phase that is kept (its row of the history), and its tensors.
        partial: of an epoch that was left off: what its steps came to (``watch.Sums``), and buffers by rank;
            what it has done is counted in steps of as many workers.
        predictions: classes int64 by network and split, when all is done.
        asked: what else each network says when all is done, for ``advice``: ``val_sure`` float32 [n], the
            probability that it gives to its prediction of each validation image; of some training images,
            as they are, their ``rows``, ``classes`` and ``sure``.
        chosen: unlabelled images used.
        astray: whether the phase that has begun ends with its epoch: it learns nothing, and the network was
            good before it.
    """

    phase: int = 0
    epoch: int = 0
    step: int = 0
    nets: dict[str, Tensors] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    learner: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    best_tensors: Tensors | None = None
    partial: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    predictions: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    asked: dict[str, Tensors] = field(default_factory=dict)
    chosen: int = 0
    astray: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {part.name: getattr(self, part.name) for part in fields(self)}


@dataclass(frozen=True)
class TrainResult:
    """What came out.

    Attributes:
        nets: tensors by network.
        history: one row an epoch.
        predictions: classes int64 [n] by network and split (val, test), in the order of the manifest's rows.
        chosen: unlabelled images used.
        sizes: pixels a side of the images that each network is made for.
        asked: as ``State`` has it, by network.
    """

    nets: dict[str, Tensors]
    history: list[dict[str, Any]]
    predictions: dict[str, dict[str, np.ndarray]]
    chosen: int
    sizes: dict[str, int]
    asked: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    @staticmethod
    def of(state: dict[str, Any]) -> TrainResult:
        """From the last checkpoint of a job that was done."""
        said, asked = (
            {net: {name: values.numpy() for name, values in of.items()} for net, of in state[part].items()}
            for part in ("predictions", "asked")
        )
        return TrainResult(state["nets"], state["history"], said, state["chosen"], state["sizes"], asked)

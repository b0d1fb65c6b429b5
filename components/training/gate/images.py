"""The validation images that the gate asks teachers and looks through networks with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from components.common.errors import RetortError
from components.training.augmentation import NO_AUGMENT, Augment
from components.training.inputs.feed import open_feed
from components.training.inputs.index import open_index
from components.training.inputs.pictures import Part, open_store
from components.training.params import CheckParams
from components.training.sampling import in_order


@dataclass(frozen=True)
class Judged:
    """Images of the validation split, as every later step sees them: decoded once, their central square.

    ``rows`` int [n] of the manifest; ``labels`` int64 [n].
    """

    part: Part
    size: int
    rows: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int64]

    def count(self, batch: int) -> int:
        """Batches of so many images."""
        return -(-len(self.rows) // batch)

    def batches(self, batch: int) -> Iterator[Tensor]:
        """Uint8 [B, 3, S, S] each, in the rows' order."""
        with open_feed(self.part, Augment("none", 0, self.size), torch.device("cpu")) as feed:
            for each in feed(in_order(self.rows, batch, NO_AUGMENT)):
                yield each.pixels

    def sample(self, count: int) -> Tensor:
        """At most ``count`` of them, evenly over the rows: uint8 [n, 3, S, S]."""
        places = np.unique(np.linspace(0, len(self.rows) - 1, min(count, len(self.rows))).astype(np.int64))
        few = Judged(self.part, self.size, self.rows[places], self.labels[places])
        return torch.cat(list(few.batches(64)))


def judged(params: CheckParams, manifest: Path) -> Judged:
    """Raises RetortError when there are none, or one cannot be read."""
    index = open_index(manifest)
    rows = index.rows("val")
    if not len(rows):
        raise RetortError(f"{manifest}: no rows in the split 'val'; see data.splits")
    size = params.general.image_size
    part = open_store(index, params.data.root, size).judge
    return Judged(part, size, rows, index.labels[rows].astype(np.int64))

"""Whether kept soft labels are still what the teacher says of those pictures: some are asked for again.

Seals find bytes that changed, and ``about.json`` what is known to decide a label. What neither knows of, such
as code that changed without its version, an image file without a hash, or another processor, shows here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from components.training import health
from components.training.augmentation import NO_AUGMENT
from components.training.group import Group
from components.training.inputs.feed import Feed
from components.training.inputs.index import Index
from components.training.precision import Precision
from components.training.soft_labels import Asker, SoftLabels

LABELS = 256  # that are asked for again before a run, over all caches
AGAIN = 8  # ... and before each epoch
# nats that log-probabilities of a label's surest classes may differ by. Seen, with EfficientNet-lite2 on 96
# photographs: 0 between batches of 3 and 32, one and two threads, AVX2 and AVX-512; 0.005 between these and
# SSE4.1, where a picture's rounding differs too. The next view of the same image is 0.5 to 19 away, 4 at the
# median
EXACT = 0.05
# ... where numbers are rounded to 8 or 10 bits, whose kernels may differ from card to card: bfloat16 and
# float32 were 0.3 apart at the median, 2.4 at most; no label is refused for that alone, many are
ROUNDED, ROUNDED_SHARE = 1.0, 0.1


@dataclass(frozen=True)
class _Apart:
    """A label, and how far it is from what the teacher says now, in nats."""

    cache: int
    row: int
    nats: float


class Replay:
    """Asks for some of the labels of each cache again."""

    def __init__(self, index: Index, group: Group, precision: Precision) -> None:
        self._index, self._group, self._precision = index, group, precision
        self._caches: list[tuple[SoftLabels, Asker]] = []

    def add(self, labels: SoftLabels, asker: Asker) -> None:
        """Take a cache, and what its labels were asked with."""
        self._caches.append((labels, asker))

    def again(self, feed: Feed, number: int) -> None:
        """The check before an epoch: of few labels that a student learns from, others in each.

        Args:
            feed: what the epoch learns from.
        """
        crops = [(place, each) for place, each in enumerate(self._caches) if each[1].view != NO_AUGMENT]
        self._check(
            AGAIN, number + 1, [(place, labels, replace(a, feed=feed)) for place, (labels, a) in crops]
        )

    def check(self) -> None:
        """Compare ``LABELS`` labels, of each cache as many, evenly over its rows. All workers must call it.

        Raises:
            Stop: labels are not what the teacher says.
        """
        self._check(LABELS, 0, [(place, *each) for place, each in enumerate(self._caches)])

    def _check(self, count: int, number: int, caches: Sequence[tuple[int, SoftLabels, Asker]]) -> None:
        found: list[_Apart] = []
        for place, labels, asker in caches:
            rows = _spread(labels.rows, -(-count // len(caches)), number * len(caches) + place)
            mine = rows[self._group.rank :: self._group.world]
            if not len(mine):
                continue
            again = replace(asker, advance=lambda count: None)(mine)
            nats = asker.form.apart(torch.from_numpy(labels.take(mine)), torch.from_numpy(again)).tolist()
            found += [_Apart(place, row, far) for row, far in zip(mine.tolist(), nats, strict=True)]
        of_all = [apart for part in self._group.gather(found) for apart in part]
        self._judge(sorted(of_all, key=lambda apart: (apart.cache, apart.row)))

    def _judge(self, labels: Sequence[_Apart]) -> None:
        exact = self._precision.device.type == "cpu" and not self._precision.bf16
        limit = EXACT if exact else ROUNDED
        wrong = [label for label in labels if not label.nats <= limit]  # what is no number is wrong, too
        if len(wrong) <= (0 if exact else ROUNDED_SHARE * len(labels)):
            return
        first, worst = wrong[0], max(label.nats for label in wrong)
        folder = self._caches[first.cache][0].folder
        raise health.labels_drift(
            f"{folder}: {len(wrong)} of {len(labels)} soft labels are not what the teacher says of the same "
            f"picture now, first that of row {first.row} ({self._index.path(first.row)}): its "
            f"log-probabilities are {first.nats:.3g} nats off, the worst {worst:.3g}; the image, the code "
            "that makes its view, or the teacher's file has changed",
            worst,
            limit,
        )


def _spread(rows: np.ndarray, count: int, number: int) -> np.ndarray:
    """So many of some rows, int64, evenly over them; another ``number`` takes others where there are more."""
    if len(rows) <= count:
        return np.asarray(rows, dtype=np.int64)
    start = (number * 0.6180339887498949) % 1  # the golden ratio: no two numbers start close to each other
    return np.asarray(rows[((np.arange(count) + start) * len(rows) / count).astype(np.int64)], dtype=np.int64)

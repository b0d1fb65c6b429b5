"""Which unlabelled images are learnt from: those that the teacher is surest of, of each class so many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from components.training.soft_labels import SoftLabels

# class, logarithm of its probability, and the energy of Liu et al., "Energy-based Out-of-distribution
# Detection", 2020, eq. 4 at temperature 1, with its sign turned: high where the network has seen the like
ANSWER = np.dtype([("label", "<i4"), ("log", "<f4"), ("energy", "<f4")])
VERSION = 1
BALANCE = 4.0  # times the smallest class that the largest may have: the rule imbalance.ratio's own limit
MERGE = 2_000_000  # rows that are held before those that are not kept are dropped


class SureForm:
    """What is kept of an answer about an unlabelled image: its class, how sure it is, and its energy."""

    bytes = ANSWER.itemsize

    def encode(self, logits: Tensor) -> Tensor:
        """Logits float [B, C] -> uint8 [B, 12], on the same device."""
        values = logits.float()
        energy = values.logsumexp(dim=1)
        best, label = values.max(dim=1)
        parts = [label.int(), best - energy, energy]
        return torch.stack([part.view(torch.int32) for part in parts], dim=1).view(torch.uint8)

    def apart(self, stored: Tensor, again: Tensor) -> Tensor:
        """How far answers are from others about the same pictures: nats, float32 [B]."""
        old, new = (answers(part.numpy()) for part in (stored, again))
        parts = [np.abs(old[name] - new[name]) for name in ("log", "energy")]
        return torch.from_numpy(np.maximum(*parts))

    def key(self) -> list[object]:
        """What decides the bytes, for keys of caches."""
        return ["sure", VERSION]


def answers(stored: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    """Stored uint8 [n, 12] -> records [n] of ``ANSWER``."""
    return np.ascontiguousarray(stored).view(ANSWER)[:, 0]


@dataclass(frozen=True)
class _Candidates:
    """Rows int64 [n], the class that the teacher sees in each, int32, and its log-probability, float32."""

    rows: npt.NDArray[np.int64]
    label: npt.NDArray[np.int32]
    log: npt.NDArray[np.float32]

    @staticmethod
    def joined(parts: Sequence[_Candidates]) -> _Candidates:
        return _Candidates(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in ("rows", "label", "log"))
        )

    def surest(self, per_class: int | npt.NDArray[np.int64]) -> _Candidates:
        """The surest of each class, so many (of each, or int64 [C] by class); of equals the lower rows."""
        order = np.lexsort((self.rows, -self.log, self.label))
        classes, starts, counts = np.unique(self.label[order], return_index=True, return_counts=True)
        place = np.arange(len(order)) - np.repeat(starts, counts)
        most = np.broadcast_to(np.asarray(per_class), classes.max(initial=-1) + 1)[classes]
        order = order[place < np.repeat(most, counts)]
        return _Candidates(self.rows[order], self.label[order], self.log[order])


def choose(labels: SoftLabels, per_class: int) -> npt.NDArray[np.int64]:
    """The ``per_class`` rows that the teacher is surest of, for each class it sees in them; ascending.

    Of equally sure ones the lower rows. Read once, in memory of ``MERGE`` rows and of what is kept.
    """
    held = [_Candidates(np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.float32))]
    count = 0
    for rows, found in _chunks(labels):
        held.append(_Candidates(rows, found["label"], found["log"]))
        count += len(rows)
        if count >= max(MERGE, len(held[0].rows)):
            held, count = [_Candidates.joined(held).surest(per_class)], 0
    return np.sort(_Candidates.joined(held).surest(per_class).rows)


def _chunks(labels: SoftLabels) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.void]]]:
    """Rows and answers, chunk by chunk."""
    done = 0
    for chunk in labels.chunks:
        yield np.asarray(labels.rows[done : done + len(chunk)], np.int64), answers(chunk)
        done += len(chunk)

"""Which unlabelled images are learnt from: those that the teacher is surest of, of each class so many.

A teacher can be surer of rubbish than of images: one that knew ten signs of hands (84 % on validation) gave
photographs of anything else 1.00 at the median, noise 0.97 and the signs 0.71; their energies (Liu et al.,
2020) say the same. What it reads from them gives them away: no noise, no flat colour, no other photograph was
as near to training images as 95 % of the validation images are, and 6 % of the signs were lost (five nearest
neighbours; Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", 2022, sec. 4). What a
weak teacher reads tells less: of one that was right about 57 % of photographs of four classes, 83 % of smooth
noise and 65 % of photographs of other classes were as near, and 11 % of its own kind were lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from components.common.progress import counted
from components.training.soft_labels import SoftLabels

if TYPE_CHECKING:
    from components.training.teacher import Teacher

# class, logarithm of its probability, and how near the image is to training images: a cosine
ANSWER = np.dtype([("label", "<i4"), ("log", "<f4"), ("near", "<f4")])
VERSION = 2
NEIGHBOURS = 5
BANK = 2_048, 16_384  # training images that others are compared with: four a class, at least and at most
LOST = 0.05  # of the validation images are further from training images than what is let in
UNLIKE = 0.25  # of the unlabelled images: more than this share unlike the others is worth a look
BALANCE = 4.0  # times the smallest class that the largest may have: the limit of imbalance.ratio
MERGE = 2_000_000  # rows that are held before those that are not kept are dropped


@dataclass(frozen=True)
class FeatureForm:
    """What a teacher's classifier reads, float16 [D]."""

    width: int

    @property
    def bytes(self) -> int:
        """Of one image."""
        return 2 * self.width

    def ask(self, teacher: Teacher, pixels: Tensor) -> Tensor:
        """Uint8 [B, 3, S, S] -> uint8 [B, bytes]."""
        return teacher.features(pixels)[1].half().view(torch.uint8)

    def read(self, stored: npt.NDArray[np.uint8]) -> Tensor:
        """Uint8 [n, bytes] -> directions float32 [n, D]."""
        return functional.normalize(torch.from_numpy(stored).view(torch.float16).float())

    def apart(self, stored: Tensor, again: Tensor) -> Tensor:
        """How far directions are from others of the same pictures, float32 [B]."""
        return (self.read(stored.numpy()) - self.read(again.numpy())).norm(dim=1)

    def key(self) -> list[object]:
        """What decides the bytes, for keys of caches."""
        return ["features", VERSION, self.width]


@dataclass(frozen=True)
class SureForm:
    """What is kept of an answer about an unlabelled image: its class, how sure it is, how near the image is.

    Args:
        bank: what the teacher reads from training images, as directions, float32 [N, D], on its device.
        name: of the bank, in keys of caches.
    """

    bank: Tensor
    name: str

    bytes = ANSWER.itemsize

    def ask(self, teacher: Teacher, pixels: Tensor) -> Tensor:
        """Uint8 [B, 3, S, S] -> uint8 [B, 12]."""
        answer, read = teacher.features(pixels)
        cosines = functional.normalize(read.float()) @ self.bank.T
        near = cosines.topk(min(NEIGHBOURS, len(self.bank)), dim=1).values.mean(1)
        return self.encode(answer.logits, near)

    @staticmethod
    def encode(logits: Tensor, near: Tensor) -> Tensor:
        """Logits float [B, C] and cosines float32 [B] -> uint8 [B, 12]."""
        best, label = logits.float().log_softmax(dim=1).max(dim=1)
        parts = [label.int(), best, near]
        return torch.stack([part.view(torch.int32) for part in parts], dim=1).view(torch.uint8)

    def apart(self, stored: Tensor, again: Tensor) -> Tensor:
        """How far answers are from others about the same pictures: nats and cosines, float32 [B]."""
        old, new = (answers(part.numpy()) for part in (stored, again))
        return torch.from_numpy(np.maximum(*(np.abs(old[name] - new[name]) for name in ("log", "near"))))

    def key(self) -> list[object]:
        """What decides the bytes, for keys of caches."""
        return ["sure", VERSION, NEIGHBOURS, self.name]


def answers(stored: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    """Stored uint8 [n, 12] -> records [n] of ``ANSWER``."""
    return np.ascontiguousarray(stored).view(ANSWER)[:, 0]


def bank_rows(labelled: np.ndarray, class_num: int) -> npt.NDArray[np.int64]:
    """Training rows that others are compared with, int64, evenly over all of them."""
    count = min(len(labelled), max(BANK[0], min(BANK[1], 4 * class_num)))
    return np.asarray(labelled[np.arange(count) * len(labelled) // count], dtype=np.int64)


@dataclass(frozen=True)
class Limits:
    """What is let in.

    Attributes:
        near: least cosine.
        sure: the median of the teacher's probabilities for its class on validation images.
    """

    near: float = -np.inf
    sure: float = 1.0

    @staticmethod
    def of(validation: SoftLabels) -> Limits:
        """By validation images: all but ``LOST`` of them would be let in."""
        found = np.concatenate([answers(chunk) for chunk in validation.chunks])
        return Limits(
            float(np.quantile(found["near"], LOST, method="lower")), float(np.exp(np.median(found["log"])))
        )


@dataclass(frozen=True)
class Chosen:
    """The unlabelled images that are learnt from.

    Attributes:
        rows: int64, ascending.
        by_class: how many of each class, by what the teacher says; int64 [C].
        asked: images that there were.
        unlike: of them, unlike the validation images; ``surer``: that the teacher is surer of than it is of
            half of those.
        limited: classes that are held back, so that they do not outgrow the smallest.
    """

    rows: npt.NDArray[np.int64]
    by_class: npt.NDArray[np.int64]
    asked: int
    unlike: int = 0
    surer: int = 0
    limited: int = 0


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
        most = np.full(len(classes), per_class) if isinstance(per_class, int) else per_class[classes]
        order = order[place < np.repeat(most, counts)]
        return _Candidates(self.rows[order], self.label[order], self.log[order])


def choose(
    labels: SoftLabels, per_class: int, labelled: npt.NDArray[np.int64], limits: Limits | None = None
) -> Chosen:
    """The ``per_class`` rows that the teacher is surest of, for each class it sees in them.

    Of equally sure ones the lower rows. No class, with its labelled images, outgrows the smallest by more
    than ``BALANCE``, or than labelled ones do already. Read once, in memory of ``MERGE`` rows and of what is
    kept.

    Args:
        labelled: images with a label, by class, int64 [C].
        limits: what is let in; None: all.
    """
    limits = limits or Limits()
    held = [_Candidates(np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.float32))]
    count = unlike = surer = 0
    for rows, found in _chunks(labels):
        near = found["near"] >= limits.near
        unlike += int((~near).sum())
        surer += int((found["log"][~near] > np.log(limits.sure)).sum())
        held.append(_Candidates(rows[near], found["label"][near], found["log"][near]))
        count += len(held[-1].rows)
        if count >= max(MERGE, len(held[0].rows)):
            held, count = [_Candidates.joined(held).surest(per_class)], 0
    best = _Candidates.joined(held).surest(per_class)
    there = np.bincount(best.label, minlength=len(labelled))
    most = balanced(labelled, there)
    kept = best.surest(most)
    return Chosen(
        np.sort(kept.rows), np.bincount(kept.label, minlength=len(labelled)), len(labels.rows), unlike, surer,
        int((most < there).sum()),
    )  # fmt: skip


def balanced(labelled: npt.NDArray[np.int64], there: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many unlabelled images of each class may be taken, int64 [C].

    Args:
        labelled, there: images with a label, and without one, by class, int64 [C].
    """
    known = labelled > 0
    if not known.any():
        return there
    ratio = max(BALANCE, labelled.max() / labelled[known].min())
    most = int(ratio * (labelled + there)[known].min())
    return np.minimum(there, np.maximum(most - labelled, 0))


def by_class(labels: np.ndarray, rows: np.ndarray, class_num: int) -> npt.NDArray[np.int64]:
    """How many of some rows are of each class, int64 [C]; counted part by part.

    Args:
        labels: by row of the manifest.
    """
    counts = np.zeros(class_num, np.int64)
    for start in range(0, len(rows), MERGE):
        counts += np.bincount(labels[rows[start : start + MERGE]], minlength=class_num)
    return counts


def finding(chosen: Chosen, per_class: int) -> dict[str, Any]:
    """What is to be said of the choice, as ``distill.pool``: arguments of ``add_finding`` by name."""
    count, classes = len(chosen.rows), int((chosen.by_class > 0).sum())
    said = (
        f"of {counted(chosen.asked, 'unlabelled image')} {count:,} are learnt from, in "
        f"{counted(classes, 'class', 'classes')} (at most {per_class} of each)"
    )
    advice = ""
    if chosen.unlike:
        said += f"; {chosen.unlike:,} are unlike the validation images and left out"
        if chosen.surer:
            said += f", of {chosen.surer:,} of which the teacher is surer than of most validation images"
    if chosen.limited:
        said += (
            f"; {counted(chosen.limited, 'class', 'classes')} are held back, so that none outgrows the "
            f"smallest {BALANCE:g} times"
        )
    if not count:
        advice = "Look at the images that data.unlabeled names: they should show what the labelled ones show."
    elif classes == 1 and len(chosen.by_class) > 1:
        advice = (
            "All are of one class to the teacher: look at it, and at the images, or set "
            "distill.unlabeled_per_class: 0."
        )
    elif chosen.unlike > UNLIKE * chosen.asked:
        advice = "Look at the images that data.unlabeled names: many show something else."
    return {
        "rule": "distill.pool", "level": "warning" if advice else "info", "message": f"{said}.",
        "measured": count, "advice": advice,
    }  # fmt: skip


def _chunks(labels: SoftLabels) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.void]]]:
    """Rows and answers, chunk by chunk."""
    done = 0
    for chunk in labels.chunks:
        yield np.asarray(labels.rows[done : done + len(chunk)], np.int64), answers(chunk)
        done += len(chunk)

"""When training makes no sense any more: a loss that is no number, or one that stays flat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from components.training.context import Event

FLAT = 0.98  # a loss that keeps more than this share has not moved
CHANCE = 1.1  # times what guessing reaches: no more than that is guessing
JUDGED_STEPS = 50  # before so many steps a validation loss says little


# Initial rates as they are published, for how many images a step, and how they go with that number.
# SGD: Goyal et al., "Large Minibatch SGD", 2017, sec. 2.1. AdamW: Touvron et al., "DeiT", 2021, table 9.
# LAMB: Wightman et al., "ResNet strikes back", 2021, table 2. RMSprop: Tan & Le, "EfficientNet", 2019, 5.
# Those that divide by the gradient's size go with the square root (Malladi et al., "On the SDEs and Scaling
# Rules for Adaptive Gradient Algorithms", 2022).
USUAL_RATES = {
    "sgd": (0.1, 256, 1.0),
    "adamw": (1e-3, 1024, 0.5),
    "lamb": (5e-3, 2048, 0.5),
    "rmsproptf": (0.256, 4096, 1.0),
}


def usual_rate(optimizer: str, images: int) -> float:
    """The published initial rate of an optimizer for so many images a step."""
    rate, batch, power = USUAL_RATES[optimizer]
    return rate * (images / batch) ** power


class Stop(Exception):  # noqa: N818
    """Training makes no sense any more; ``rule`` is the finding that says why."""

    def __init__(self, rule: str, message: str, advice: str, measured: float, waivable: bool = True) -> None:
        super().__init__(message)
        self.told: Event = {
            "rule": rule,
            "message": message,
            "advice": advice,
            "measured": str(measured),
            "waivable": waivable,
        }


def looks_flat(first_loss: float, row: dict[str, Any], labels: np.ndarray) -> bool:
    """Whether nothing was learnt: the validation loss stays where it began, and guessing would do as well.

    Guessing reaches the share of the largest class in top-1, but of C classes only 1 / C in macro recall: a
    network that tells a class of 5 % apart is not flat, however close its top-1 is to 95 %.

    Args:
        first_loss: cross-entropy in nats after the phase's first epoch, on the same images: a training loss
            of few batches moves by chance alone.
        row: ``val_loss``, ``val_top1`` and ``val_macro_recall`` of an epoch.
        labels: of the validation split, int64 [n].
    """
    counts = np.bincount(labels)
    shares = counts[counts > 0] / len(labels)
    guessing = -float((shares * np.log(shares)).sum())  # the loss of always naming the classes' shares
    return bool(
        row["val_loss"] > FLAT * max(first_loss, guessing)
        and row["val_top1"] <= CHANCE * shares.max()
        and row["val_macro_recall"] <= CHANCE / len(shares)
    )


def learns_nothing(rows: Sequence[dict[str, Any]], epochs: int, steps: int, labels: np.ndarray) -> bool:
    """Whether a phase can be stopped after ``rows``, its epochs so far: at its end, or when it is past hope.

    Before the end one epoch that did better than guessing will do: a bad one after it is not a flat loss.

    Args:
        rows: as ``looks_flat`` takes one.
        epochs, steps: of the whole phase, and of each epoch.
        labels: of the validation split, int64 [n].
    """
    if len(rows) == epochs:
        judged = rows[-1:]
    elif len(rows) > 1 and len(rows) * steps >= JUDGED_STEPS:
        judged = rows
    else:
        return False
    return all(looks_flat(rows[0]["val_loss"], row, labels) for row in judged)


def flat(phase: str, rows: Sequence[dict[str, Any]], steps: int, kept: str) -> Stop:
    """The finding ``train.learns``."""
    taken, last = len(rows) * steps, rows[-1]
    return Stop(
        "train.learns",
        f"{phase}: validation loss stays flat or rises ({rows[0]['val_loss']:.3f} at first, "
        f"{last['val_loss']:.3f} in epoch {len(rows)}), top-1 is {last['val_top1']:.1%} and macro recall "
        f"{last['val_macro_recall']:.1%}, as by guessing; {kept}.",
        "Check labels and weights; change lr.initial."
        if taken >= JUDGED_STEPS
        else f"It took {taken} steps in all: give more epochs or a smaller batch_size.",
        last["val_loss"],
    )


def need_finite(value: float, phase: str, epoch: int, step: int, kept: str) -> None:
    """Raise the finding ``train.finite`` where a loss is no number.

    Args:
        epoch, step: counted from 1.
    """
    if math.isfinite(value):
        return
    raise Stop(
        "train.finite",
        f"{phase}: the loss became {value} in epoch {epoch}, step {step}; {kept}.",
        "Lower lr.initial, lengthen lr.warmup_epochs, or set optimizer.clip_norm (1.0 is usual).",
        value,
        waivable=False,  # no step can be taken from a loss that is no number
    )


def teacher_changed(what: str, phase: str, epoch: int, kept: str) -> Stop:
    """The finding ``distill.teacher_changed``: nothing that was learnt from it since can be trusted.

    Args:
        what: a part of it, and what happened to that.
        epoch: counted from 1.
    """
    return Stop(
        "distill.teacher_changed",
        f"{phase}: the teacher is no longer what it was when epoch {epoch} began: {what}; {kept}.",
        "A task or a callback trains it, or sets its mode: it must only answer (eval mode, no gradients).",
        1.0,
        waivable=False,
    )


def labels_drift(said: str, worst: float, limit: float) -> Stop:
    """The finding ``distill.labels_drift``: what is replayed is not what the teacher says.

    Args:
        said: which labels, and how far they are off, in a sentence without its full stop.
        worst, limit: in the unit that ``said`` names.
    """
    return Stop(
        "distill.labels_drift",
        f"{said} (limit {limit:g}).",
        "Remove the folder .retort/cache/soft_labels: they are made again; where that does not help, set "
        "distill.teacher_labels: online and report it.",
        worst,
        waivable=False,
    )


class Choice:
    """Which epoch of a phase is kept: the highest macro recall on validation, of equals the lowest loss.

    Args:
        patience: epochs without a better one after which the phase may end; None: it never ends early.
    """

    def __init__(self, patience: int | None) -> None:
        self._patience = patience

    @staticmethod
    def better(row: dict[str, Any], best: dict[str, Any] | None) -> bool:
        """Whether an epoch is to be kept in place of the best one so far."""
        if best is None:
            return True
        score = row["val_macro_recall"], -row["val_loss"]
        return score > (best["val_macro_recall"], -best["val_loss"])

    def ends(self, rows: Sequence[dict[str, Any]]) -> bool:
        """Whether the phase's epochs so far end it."""
        if self._patience is None:
            return False
        best: dict[str, Any] | None = None
        since = 0
        for row in rows:
            since = 0 if self.better(row, best) else since + 1
            best = row if since == 0 else best
        return since >= self._patience

"""When training makes no sense any more: a loss that is no number, or one that stays flat."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from components.training.context import Event

if TYPE_CHECKING:
    from components.training.losses import Loss
    from components.training.watch import Sums

FLAT = 0.98  # a loss that keeps more than this share has not moved
CHANCE = 1.1  # times what guessing reaches: no more than that is guessing
EXPLODED = 3.0  # times the loss at first, or of guessing: no network that learns gets there
WILD_RATE = 10.0  # times the usual rate: then less has to be seen
MOST_VALUES = 4_000_000  # logits by which the loss of guessing is worked out
CHUNK = 10  # steps that are looked at together: the loss of one says little
KEPT_CHUNKS = 40  # ... and how many of them are remembered
ASTRAY_STEPS = 60  # that are judged within an epoch ...
SETTLED_STEPS = 100  # ... from so many steps after the warm-up on
STUCK_STEPS = 40  # before so many steps the end of an epoch says little
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


@dataclass(frozen=True)
class Setting:
    """What a phase is trained with: from it follow the likely causes of what goes wrong.

    Attributes:
        who: the section of params.yaml that says so (teacher, student).
        rate, usual: at its highest, and what is published for this network, or usual for the optimizer.
        images: of a step, of all workers.
        loaded: whether it started from trained weights.
        half: whether it computes in bf16.
    """

    who: str
    optimizer: str
    rate: float
    usual: float
    images: int
    warmup: float
    clip: float | None
    loaded: bool
    half: bool
    augment: str

    @property
    def ratio(self) -> float:
        return self.rate / self.usual

    def causes(self, finite: bool) -> str:
        """Likely causes and what to do about each, the likeliest first, as a finding's advice.

        Args:
            finite: whether the loss is a number still.
        """
        who, usual = self.who, f"{self.usual:.2g}"
        beside = f"{self.optimizer} at {self.images} images a step takes about {usual}"
        found = []
        if self.ratio >= 3:
            found.append(f"the rate: {self.rate:g} is {self.ratio:.0f} times as high as usual ({beside}): ")
            found[-1] += f"set {who}.lr.initial: {usual}"
        elif finite and self.ratio <= 1 / 30:
            found.append(f"the rate: {self.rate:g} is very low ({beside}): set {who}.lr.initial: {usual}")
        if not self.warmup:
            found.append(f"no warm-up: set {who}.lr.warmup_epochs: 1")
        if not finite and self.clip is None:
            found.append(f"single large gradients: set {who}.optimizer.clip_norm: 1.0")
        if not finite and self.half:
            found.append(f"bf16: set {who}.train.precision: float32")
        if not self.loaded:
            found.append(f"no trained weights ({who}.weights: none)")
        else:
            found.append("weights that do not belong here (weights.coverage in the report of 'weights')")
        if self.images < 16:
            found.append(f"{self.images} images a step, few for batch norms: raise {who}.train.batch_size")
        if 1 / 30 < self.ratio < 3:
            found.append(f"the rate all the same: {self.rate:g} ({beside})")
        if finite:
            found.append("labels that do not belong to the images ('retort audit' lists suspects)")
        if finite and self.augment in ("strong", "deit"):
            found.append(f"augmentation too strong to begin with: set {who}.train.augment: flip")
        return "Likely causes, in order: " + "; ".join(f"({i}) {one}" for i, one in enumerate(found, 1)) + "."


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


def looks_flat(first_loss: float, row: dict[str, Any], labels: np.ndarray, deviations: float = 0.0) -> bool:
    """Whether nothing was learnt: the validation loss stays where it began, and guessing would do as well.

    Guessing reaches the share of the largest class in top-1, but of C classes only 1 / C in macro recall: a
    network that tells a class of 5 % apart is not flat, however close its top-1 is to 95 %.

    Args:
        first_loss: cross-entropy in nats after the phase's first epoch, on the same images: a training loss
            of few batches moves by chance alone.
        row: ``val_loss``, ``val_top1`` and ``val_macro_recall`` of an epoch.
        labels: of the validation split, int64 [n].
        deviations: standard deviations that guessing may be lucky by.
    """
    counts = np.bincount(labels)
    counts = counts[counts > 0]
    shares = counts / len(labels)
    guessing = -float((shares * np.log(shares)).sum())  # the loss of always naming the classes' shares
    most, equal = float(shares.max()), 1 / len(shares)
    lucky = deviations * math.sqrt(most * (1 - most) / len(labels))
    lucky_mean = deviations * math.sqrt(equal * (1 - equal) * float((1 / counts).sum())) / len(shares)
    return bool(
        row["val_loss"] > FLAT * max(first_loss, guessing)
        and row["val_top1"] <= max(CHANCE * most, most + lucky)
        and row["val_macro_recall"] <= max(CHANCE * equal, equal + lucky_mean)
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


@dataclass(frozen=True)
class Guessing:
    """What a network reaches that knows the classes' shares among the drawn images, and nothing of an image.

    Attributes:
        top1: share of the largest class.
        loss: in the task's own scale, nats; None: that is not known (the loss compares with a teacher).
    """

    top1: float
    loss: float | None

    def explains(self, right: float, told: float, deviations: float, times: float = 1.0) -> bool:
        """Whether guessing (``times`` as well) would recognise so many images, by chance, at times."""
        share = min(1.0, times * self.top1)
        spread = math.sqrt(share * (1 - share) / told) if told else 0.0
        return right <= told * (share + deviations * spread)


def guessing(criterion: Loss | None, shares: np.ndarray) -> Guessing:
    """What guessing reaches with a loss of labels; None: the loss is not one.

    Args:
        shares: of the classes among the drawn images, float64 [C], together 1.
    """
    top1 = float(shares.max())
    if criterion is None:
        return Guessing(top1, None)
    # as a batch would be: so many labels, spread as the shares say
    count = max(64, min(4096, MOST_VALUES // len(shares)))
    labels = np.searchsorted(np.cumsum(shares), (np.arange(count) + 0.5) / count).clip(max=len(shares) - 1)
    with torch.no_grad():
        logits = torch.from_numpy(np.log(np.maximum(shares, 1e-12))).float().expand(count, -1)
        device = next((buffer.device for buffer in criterion.buffers()), torch.device("cpu"))
        loss = criterion(logits.to(device), torch.from_numpy(labels).to(device))
    return Guessing(top1, float(loss))


@dataclass
class _Chunk:
    """Some steps in a row."""

    steps: int
    sums: Sums

    @property
    def loss(self) -> float:
        return self.sums.loss / max(1, self.sums.images)


class Pulse:
    """The steps of a phase, watched for a network that went astray: within an epoch, long before its end.

    A network that learns slowly is not one that went astray. Both are at chance: with 1,000 classes, or a
    network without trained weights, that lasts for hundreds of steps. But one that learns slowly has a loss
    of what guessing costs, or one that falls; one whose weights were thrown about has a loss above it that
    does not fall. What was found on real trainings, good ones and bad ones, stands in docs/training.md.

    Args:
        guessing: of the images as they are drawn.
        ratio: of the phase's rate to the usual one (``usual_rate``).
        warmup: steps at whose end the rate is at its highest.
    """

    def __init__(self, guessing: Guessing, ratio: float, warmup: float) -> None:
        self._guessing, self._wild, self._warmup = guessing, ratio >= WILD_RATE, warmup
        self._chunks: deque[_Chunk] = deque(maxlen=KEPT_CHUNKS)
        self._steps = 0
        self.first: float | None = None  # loss of the first steps

    def __call__(self, steps: int, sums: Sums) -> str | None:
        """What has been seen since the last look, over all workers; what is wrong, if something is."""
        self._steps += steps
        if self._chunks and self._chunks[-1].steps < CHUNK:
            last = self._chunks[-1]
            last.steps, last.sums = last.steps + steps, last.sums + sums
        else:
            self._chunks.append(_Chunk(steps, sums))
        if self._chunks[-1].steps < CHUNK:
            return None
        if self.first is None:
            self.first = self._chunks[-1].loss
        return self._exploded() or self._astray()

    def _lately(self, steps: int) -> list[_Chunk]:
        """The last chunks that hold so many steps; empty, where there are not so many."""
        taken: list[_Chunk] = []
        for chunk in reversed(self._chunks):
            taken.insert(0, chunk)
            if sum(one.steps for one in taken) >= steps:
                return taken
        return []

    def _exploded(self) -> str | None:
        """A loss that is many times what it was at first, and what guessing costs."""
        lately = self._lately(2 * CHUNK)
        assert self.first is not None
        if not lately:
            return None
        sums = _total(lately)
        loss = sums.loss / max(1, sums.images)
        limit = EXPLODED * max(self.first, self._guessing.loss or 0.0)
        if loss > limit and self._guessing.explains(sums.right, sums.told, 3, times=2):
            return self._told(loss, sums)
        return None

    def _astray(self) -> str | None:
        """At chance, with a loss above that of guessing, and no better than before."""
        lately = self._lately(ASTRAY_STEPS)
        if not lately or self._steps < self._warmup + SETTLED_STEPS:
            return None
        sums = _total(lately)
        if not sums.told or not self._guessing.explains(sums.right, sums.told, 2) or _falls(lately):
            return None
        assert self.first is not None
        cost = self._guessing.loss
        loss = sums.loss / max(1, sums.images)
        spread = float(np.std([chunk.loss for chunk in lately])) / math.sqrt(len(lately))
        if cost is None:
            astray = self._wild and loss > 0.98 * self.first
        elif self._wild:
            astray = loss > 0.998 * cost - 2 * spread
        else:  # a large class hides what is learnt of the others
            astray = loss > 1.05 * cost + 2 * spread and self._guessing.top1 < 0.5
        return self._told(loss, sums) if astray else None

    def stuck(self, row: dict[str, Any], labels: np.ndarray) -> str | None:
        """The same at an epoch's end, where validation is known too; what is wrong, if something is.

        Args:
            row: of the history.
            labels: of the validation split, int64 [n].
        """
        if self._steps < max(STUCK_STEPS, self._warmup):
            return None
        if not looks_flat(row["val_loss"], row, labels, 2.0 if self._wild else 0.0):
            return None
        chunks = list(self._chunks)
        late = _total(chunks[len(chunks) // 2 :])
        loss = late.loss / max(1, late.images)
        if not late.told or not self._guessing.explains(late.right, late.told, 2):
            return None
        cost = self._guessing.loss
        if self._wild:
            return None if cost is not None and loss < 0.995 * cost else self._told(loss, late)
        # a slow start, of many classes say, is as near to guessing as this
        if cost is None or loss < 1.05 * cost or _falls(chunks) or self._guessing.top1 >= 0.5:
            return None
        return self._told(loss, late)

    @property
    def learns(self) -> bool:
        """Whether it learns, however slowly: better than guessing lately, by loss or recognised images."""
        chunks = list(self._chunks)
        late = chunks[len(chunks) // 2 :]
        if len(late) < 2:
            return False
        sums, cost = _total(late), self._guessing.loss
        if sums.told and not self._guessing.explains(sums.right, sums.told, 3):
            return True
        spread = float(np.std([chunk.loss for chunk in late], ddof=1)) / math.sqrt(len(late))
        return cost is not None and sums.loss / max(1, sums.images) < 0.998 * cost - 3 * spread

    def _told(self, loss: float, sums: Sums) -> str:
        cost = self._guessing.loss
        guess = "" if cost is None else f"; guessing would cost {cost:.3g}"
        seen = f", {sums.right / sums.told:.1%} of the images are recognised" if sums.told else ""
        began = f"{self.first:.3g} at first{guess}"
        return f"after {self._steps} steps the training loss is {loss:.3g} ({began}){seen}"


def _total(chunks: Sequence[_Chunk]) -> Sums:
    total = chunks[0].sums
    for chunk in chunks[1:]:
        total = total + chunk.sums
    return total


def _falls(chunks: Sequence[_Chunk]) -> bool:
    """Whether the loss of the second half is below that of the first beyond what chunks vary by."""
    losses = np.array([chunk.loss for chunk in chunks])
    half = len(losses) // 2
    if half < 2:
        return False
    early, late = losses[:half], losses[half:]
    error = math.sqrt(float(early.var(ddof=1)) / len(early) + float(late.var(ddof=1)) / len(late))
    return float(early.mean() - late.mean()) > 1.5 * error


def flat(phase: str, rows: Sequence[dict[str, Any]], steps: int, setting: Setting, kept: str) -> Stop:
    """The finding ``train.learns``, at an epoch's end."""
    taken, last = len(rows) * steps, rows[-1]
    return Stop(
        "train.learns",
        f"{phase}: validation loss stays flat or rises ({rows[0]['val_loss']:.3f} at first, "
        f"{last['val_loss']:.3f} in epoch {len(rows)}), top-1 is {last['val_top1']:.1%} and macro recall "
        f"{last['val_macro_recall']:.1%}, as by guessing; {kept}.",
        setting.causes(finite=True)
        if taken >= JUDGED_STEPS
        else f"It took {taken} steps in all: give more epochs or a smaller batch_size.",
        last["val_loss"],
    )


def astray(phase: str, epoch: int, what: str, setting: Setting, kept: str) -> Stop:
    """The finding ``train.learns``, as ``Pulse`` saw it.

    Args:
        epoch: counted from 1.
    """
    said = f"{phase}: went astray in epoch {epoch}: {what}; {kept}."
    return Stop("train.learns", said, setting.causes(finite=True), setting.rate)


def need_finite(
    value: float, phase: str, epoch: int, step: int, kept: str, setting: Setting, where: str = ""
) -> None:
    """Raise the finding ``train.finite`` where a loss is no number.

    Args:
        epoch, step: counted from 1.
        where: what is no number already, in a sentence without its full stop; empty: that is not known.
    """
    if math.isfinite(value):
        return
    advice = setting.causes(finite=False)
    raise Stop(
        "train.finite",
        f"{phase}: the loss became {value} in epoch {epoch}, step {step}{where and ': '}{where}; {kept}.",
        advice if not where else f"That is the cause to look at first. {advice}",
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

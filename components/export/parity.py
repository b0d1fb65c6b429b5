"""Parity: the network and its exported files on the same images, class ids and scores compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from components.export.formats import Format
from components.export.precisions import PRECISIONS

BATCH = 64
SINGLES = 256  # images that are also run one by one
# max|a - b| / max|b| of logits that two correct float32 networks may differ by: they add in another order
ROUNDING = 1e-5
MARGIN = 4  # two float32 networks may err to either side, and more on an image that was not measured
MOST_ROUNDING = 1e-4  # beyond it, a network that float32 cannot compute would make anything its equal


@dataclass
class Comparison:
    """What one way of running an exported file gave, beside the network's own scores, in 0..1.

    A score moves by at most half as much as the logits do (the softmax's slope s (1 - s) is at most 1/4,
    and two logits may move apart), so rounding alone moves it by up to half of ``rounding`` times the
    largest logit. ``limit`` is that or ``tolerance``, whichever is larger. ``different_ids`` counts images
    whose class differs although the network prefers its own by more than the limit; a smaller lead is a
    tie, in which either class is right.
    """

    tolerance: float
    rounding: float = ROUNDING
    images: int = 0
    correct: int = 0
    max_logit: float = 0.0
    failure: str = ""
    differences: list[float] = field(default_factory=list)  # an image's largest, of its scores
    leads: list[float] = field(default_factory=list)  # the network's, of images that get another class

    def add(self, logits: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> None:
        """Take in N images: logits and the file's scores, float32 [N, classes], and labels int [N]."""
        if scores.shape != logits.shape:
            self.failure = f"scores have the shape {list(scores.shape)}, the network's {list(logits.shape)}"
            return
        for whose, numbers in (("scores", scores), ("logits of the network", logits)):
            if not np.isfinite(numbers).all():
                self.failure = f"{whose} that are not finite numbers"
                return
        reference = softmax(logits)
        own, other = reference.argmax(axis=1), scores.argmax(axis=1)
        every = np.arange(len(own))
        self.images += len(own)
        self.correct += int((other == labels).sum())
        self.max_logit = max(self.max_logit, float(np.abs(logits).max()))
        self.differences.extend(np.abs(reference - scores).max(axis=1).tolist())
        self.leads.extend((reference[every, own] - reference[every, other])[own != other].tolist())

    @property
    def limit(self) -> float:
        return max(self.tolerance, self.rounding / 2 * self.max_logit)

    @property
    def max_difference(self) -> float:
        return max(self.differences, default=0.0)

    @property
    def different_ids(self) -> int:
        return sum(lead > self.limit for lead in self.leads)

    @property
    def ties(self) -> int:
        return len(self.leads) - self.different_ids

    @property
    def holds(self) -> bool:
        """Whether class ids are equal and no score differs by more than the limit."""
        return not self.failure and not self.different_ids and self.max_difference <= self.limit

    @property
    def top1(self) -> float:
        return self.correct / self.images if self.images else 0.0

    def summary(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "different_ids": self.different_ids,
            "ties": self.ties,
            "max_difference": self.max_difference,
            "tolerance": self.tolerance,
            "rounding": self.rounding,
            "max_logit": self.max_logit,
            "limit": self.limit,
            "top1": self.top1,
            "holds": self.holds,
            "failure": self.failure,
        }


@dataclass(frozen=True)
class Written:
    """A file that export wrote: where it lies, what is in it, and how far its scores may move."""

    path: Path
    precision: str
    format: Format
    tolerance: float

    @property
    def equal(self) -> bool:
        """Whether it must answer as the network does; else it is judged by the top-1 that it costs."""
        return PRECISIONS[self.precision].tolerance is None

    @property
    def key(self) -> str:
        """What numbers about it are called: its precision, and its format where that is not ONNX."""
        return self.precision + ("" if self.format.suffix == ".onnx" else self.format.suffix)

    def open(self) -> Callable[[np.ndarray], np.ndarray]:
        """See ``Format.open``."""
        return self.format.open(self.path)


@dataclass
class Proof:
    """The network's own result, and a comparison for each file and way of running it."""

    images: int
    correct: int
    compared: dict[str, dict[str, Comparison]]

    @property
    def top1(self) -> float:
        return self.correct / self.images


def softmax(logits: np.ndarray) -> np.ndarray:
    """Scores float64 [N, classes] of logits [N, classes]."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def rounding(logits: np.ndarray, exact: np.ndarray) -> float:
    """What rounding to allow a network, as a share of its largest logit: ``ROUNDING``, or what it needs.

    A network that was hardly trained divides by norms close to zero, and float32 is further from the truth
    there than in another one: no exporter is at fault then.

    Args:
        logits: of some images, float32 [N, classes].
        exact: the same by the same network in float64.
    """
    largest = float(np.abs(exact).max())
    own = float(np.abs(logits - exact).max()) / largest if largest else 0.0
    # not finite: Comparison says so, with the network's name
    return min(max(ROUNDING, MARGIN * own), MOST_ROUNDING) if np.isfinite(own) else ROUNDING


def prove(
    network: Callable[[np.ndarray], np.ndarray],
    files: Mapping[str, Written],
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    allowed: float = ROUNDING,
) -> Proof:
    """Run the network and exported files on the same images; no more than one batch is held.

    Args:
        network: pixels uint8 [N, size, size, 3] -> logits float32 [N, classes]. It prepares the pixels by
            itself, as training did; a file prepares them as its own metadata says.
        files: by name.
        batches: pixels as above, and labels int [N].
        allowed: what ``rounding`` gave for this network.

    Every file runs in batches as they come and, for the first ``SINGLES`` images, one by one: a graph with
    its batch fixed at 1, or at the size it was traced with, gives itself away.
    """
    opened = {name: written.open() for name, written in files.items()}
    compared = {
        name: {way: Comparison(written.tolerance, allowed) for way in ("batches", "single images")}
        for name, written in files.items()
    }
    images = correct = 0
    for pixels, labels in batches:
        logits = network(pixels)
        alone = max(0, min(len(labels), SINGLES - images))
        for name, run in opened.items():
            run_into(compared[name]["batches"], run, pixels, logits, labels)
            for index in range(alone):
                one = slice(index, index + 1)
                run_into(compared[name]["single images"], run, pixels[one], logits[one], labels[one])
        images += len(labels)
        correct += int((logits.argmax(axis=1) == labels).sum())
    return Proof(images, correct, compared)


def run_into(
    comparison: Comparison,
    run: Callable[[np.ndarray], np.ndarray],
    pixels: np.ndarray,
    logits: np.ndarray,
    labels: np.ndarray,
) -> None:
    """Run one batch and add it; a runtime that refuses the batch is what the comparison says."""
    if comparison.failure:
        return
    try:
        scores = run(pixels)
    except Exception as error:  # noqa: BLE001 - runtimes' exceptions share no base class but Exception
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        comparison.failure = f"a batch of {len(pixels)} is refused: {reason.strip()}"
        return
    comparison.add(logits, scores, labels)

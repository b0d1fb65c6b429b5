"""What distillation will gain or lose, foretold from what teacher and student alone say of the images.

Four numbers decide, each a share of all images, and none of them needs a distillation:

- ``imitation``: how much better the teacher is than the student alone, by the square of the teacher's
  part of the loss: labels in it correct more than their share;
- ``mistaken``: the teacher's mistakes in what the student learns from, labelled images and chosen ones;
- ``more``: what those chosen images that the teacher knows would be worth to the student alone: errors fall
  with a power of their number (Hestness et al., "Deep Learning Scaling is Predictable, Empirically", 2017);
- ``together``: the errors of the student alone, by how much less the mean of teacher and committee scatters
  than one network does: M of M + 1 parts, where they err apart.

The forecast is their sum by the weights below, which were fitted to distillations of small networks on real
photographs; the last one to six with a committee of two (CIFAR-10 and photographs of clothing, 15 labels a
class, three seeds each: +6.8, +8.1, +7.0 and +9.8, +6.1, +5.3 points).
``tests/components/training/test_forecast.py`` asks it about others, on images of another kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np

from components.training.paired import Difference, Z, adjusted

POWER = 0.25  # of the learning curve
WEIGHTS = {"imitation": 0.42, "mistaken": -0.12, "more": 0.37, "together": 0.28}
SPREAD = 0.025  # standard deviation of distillations around their forecast
DOUBT = 0.4  # ... and of it, a share of the forecast: large losses come out larger still
SHORT = 0.15  # of the errors of a control that had almost no epochs: how far its end is from known


@dataclass(frozen=True)
class Said:
    """What both networks say of the same images, each int64 [n].

    Attributes:
        actual: the labels.
        teacher, alone: classes.
        sure: float32 [n], the teacher's probability of its own answer.
    """

    actual: np.ndarray
    teacher: np.ndarray
    alone: np.ndarray
    sure: np.ndarray

    def top1(self, name: str) -> float:
        """Of one of both."""
        return float((getattr(self, name) == self.actual).mean())


@dataclass(frozen=True)
class Setting:
    """How the student will be distilled.

    Attributes:
        classes: that there are.
        labelled: images with labels.
        unlabelled: in the pool.
        chosen: of them, that will be learnt from: those that the teacher is surest of.
        label_share: of the loss, on images with labels.
        learnt: share of the labelled images on which the teacher and the label agree.
        done: share of its epochs that the student alone has had, 0..1.
        members: networks of the committee beside the teacher.
    """

    classes: int
    labelled: int
    unlabelled: int
    chosen: int
    label_share: float
    learnt: float
    done: float = 1.0
    members: int = 0


def features(said: Said, setting: Setting) -> dict[str, float]:
    """The numbers that the forecast is a sum of."""
    teacher, alone = said.top1("teacher"), said.top1("alone")
    ratio = setting.chosen / max(1, setting.labelled)
    right = right_when_sure(said, setting.chosen / setting.unlabelled) if setting.chosen else 1.0
    word = 1 - setting.label_share / (1 + ratio)  # the teacher's part of the loss, over all images
    own = (1 - setting.label_share) * (1 - setting.learnt)
    return {
        "imitation": word**2 * (teacher - alone),
        "mistaken": (own + ratio * (1 - right)) / (1 + ratio),
        "more": (1 - alone) * (1 - (1 + ratio) ** -POWER) * right,
        "together": (1 - alone) * setting.members / (setting.members + 1),
    }


def right_when_sure(said: Said, share: float) -> float:
    """How often the teacher is right where it is surest: by class that it sees, the first ``share`` of it.

    As unlabelled images are chosen. Of other data than these it may be worse.
    """
    _, place, images = np.unique(said.teacher, return_inverse=True, return_counts=True)
    order = np.lexsort((-said.sure, place))  # class by class, the surest first
    rank = np.arange(len(order)) - np.repeat(np.cumsum(images) - images, images)
    wanted = np.maximum(1, np.rint(min(1.0, share) * images))
    chosen = order[rank < np.repeat(wanted, images)]
    return float((said.teacher == said.actual)[chosen].mean())


def forecast(said: Said, setting: Setting) -> Difference:
    """Distilled student minus student alone, in top-1 on images like these, with its 95 % interval.

    The interval holds what distillations differed by from their forecast, the noise of these images, and how
    little a control says that had only a part of its epochs.
    """
    found = features(said, setting)
    value = sum(WEIGHTS[name] * found[name] for name in WEIGHTS)
    apart = (said.teacher == said.actual).astype(float) - (said.alone == said.actual).astype(float)
    _, error = adjusted(apart)
    unfinished = SHORT * (1 - setting.done) * (1 - said.top1("alone"))
    half = Z * sqrt(SPREAD**2 + (DOUBT * value) ** 2 + (WEIGHTS["imitation"] * error) ** 2 + unfinished**2)
    return Difference(value, max(-1.0, value - half), min(1.0, value + half))

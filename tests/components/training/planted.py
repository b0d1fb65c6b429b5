"""Distillations whose cause of success or failure is planted: small networks on small images, in seconds.

The student is a perceptron of one hidden layer, the teacher a wider one. Pixels are the inputs, shaken by
noise in place of augmentation. What comes out is what the forecast is told, and what distillation gained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from components.training.forecast import Said, Setting

BATCH = 64
NOISE = 0.3  # of standardised pixels
RATE = 3e-3
STEPS = 60, 600  # at least, at most
VAL, TEST = 300, 600  # images


@dataclass(frozen=True)
class Images:
    """Pixels float32 [n, d], labels int64 [n]."""

    pixels: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Plant:
    """A set-up.

    Attributes:
        per_class: labelled images.
        pool: unlabelled images.
        teacher, student: hidden units.
        teacher_steps: of its training.
        teacher_noise: share of the teacher's labels that are random.
        teacher_part: of the labelled images that the teacher has learnt from.
        teacher_more: labelled images that the teacher alone had.
        noise: share of everyone's labels that are random.
        share: of the labels in the loss.
        epochs: of distillation, over labelled and chosen images.
        most: unlabelled images for each class.
    """

    name: str
    per_class: int = 30
    pool: int = 0
    teacher: int = 256
    student: int = 24
    teacher_steps: int = 400
    teacher_noise: float = 0.0
    teacher_part: float = 1.0
    teacher_more: int = 0
    noise: float = 0.0
    share: float = 0.0
    epochs: int = 60
    most: int = 100


@dataclass(frozen=True)
class Harvest:
    """``gain``: in top-1 on test images, mean of seeds; ``spread``: its deviation by seed."""

    said: Said
    setting: Setting
    gain: float
    spread: float


def digits() -> Images:
    """scikit-learn's handwritten digits, 8 x 8 pixels."""
    found = load_digits()
    return Images(found.data.astype(np.float32), found.target.astype(np.int64))


def grow(images: Images, plant: Plant, seed: int = 0, seeds: int = 3) -> Harvest:
    """Train teacher, student alone and distilled student, the latter two with ``seeds`` seeds."""
    rng = np.random.default_rng(seed)
    labels, classes = images.labels, int(images.labels.max()) + 1
    order = rng.permutation(len(labels))
    test, val, rest = np.split(order, [TEST, TEST + VAL])
    own = np.concatenate([rest[labels[rest] == label][: plant.per_class] for label in range(classes)])
    others = rng.permutation(np.setdiff1d(rest, own))
    pool, more = others[: plant.pool], others[plant.pool :][: plant.teacher_more]
    mean, deviation = images.pixels[own].mean(0), images.pixels[own].std(0) + 1.0

    def inputs(rows: np.ndarray) -> Tensor:
        return torch.from_numpy((images.pixels[rows] - mean) / deviation)

    given = _shuffled(labels[own], plant.noise, classes, rng)
    taught = _shuffled(given, plant.teacher_noise, classes, rng)
    some = torch.from_numpy(rng.permutation(len(own))[: max(classes, int(plant.teacher_part * len(own)))])
    its = torch.cat([torch.from_numpy(taught)[some], torch.from_numpy(labels[more])])
    teacher = _trained(
        torch.cat([inputs(own)[some], inputs(more)]), plant.teacher, classes, plant.teacher_steps, 100 + seed,
        lambda logits, rows, seen: functional.cross_entropy(logits, its[rows]),
    )  # fmt: skip
    chosen = _surest(_probabilities(teacher, inputs(pool)), plant.most) if len(pool) else np.empty(0, int)
    learnt = torch.cat([inputs(own), inputs(pool[chosen])])
    steps = int(np.clip(plant.epochs * len(learnt) // BATCH, *STEPS))
    hard = torch.from_numpy(np.concatenate([given, np.zeros(len(chosen), np.int64)]))
    labelled = (torch.arange(len(learnt)) < len(own)).float()

    def distilling(logits: Tensor, rows: Tensor, seen: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(seen).softmax(1)  # of the view that the student sees
        ours = logits.log_softmax(1)
        theirs = target.clamp_min(1e-7).log()
        apart = ((target - ours.exp()) * (theirs - ours)).sum(1) / 2  # symmetric KL / 2
        own_share = plant.share * labelled[rows]
        of_labels = functional.cross_entropy(logits, hard[rows], reduction="none")
        return ((1 - own_share) * apart + own_share * of_labels).mean()

    def alone(logits: Tensor, rows: Tensor, seen: Tensor) -> Tensor:
        return functional.cross_entropy(logits, hard[rows])

    gains, first = [], None
    for one in range(seeds):
        control = _trained(inputs(own), plant.student, classes, steps, one, alone)
        student = _trained(learnt, plant.student, classes, steps, one, distilling)
        first = first or control
        right = [
            (_probabilities(network, inputs(test)).argmax(1) == labels[test]).mean()
            for network in (student, control)
        ]
        gains.append(float(right[0] - right[1]))
    assert first is not None
    ours, other = _probabilities(teacher, inputs(val)), _probabilities(first, inputs(val))
    learnt_right = _probabilities(teacher, inputs(own)).argmax(1) == given
    said = Said(labels[val], ours.argmax(1), other.argmax(1), ours.max(1))
    setting = Setting(classes, len(own), len(pool), len(chosen), plant.share, float(learnt_right.mean()))
    return Harvest(said, setting, float(np.mean(gains)), float(np.std(gains, ddof=1)) if seeds > 1 else 0.0)


def _shuffled(labels: np.ndarray, share: float, classes: int, rng: np.random.Generator) -> np.ndarray:
    hit = rng.random(len(labels)) < share
    return np.where(hit, rng.integers(0, classes, len(labels)), labels)


def _trained(
    inputs: Tensor,
    hidden: int,
    classes: int,
    steps: int,
    seed: int,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> nn.Module:
    """A perceptron after so many steps of AdamW; ``loss`` gets logits, rows and what was seen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(inputs.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, classes))
        optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        batch = min(BATCH, len(inputs))
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(order) < batch:
                order = torch.randperm(len(inputs))
            rows, order = order[:batch], order[batch:]
            seen = inputs[rows] + NOISE * torch.randn(batch, inputs.shape[1])
            optimizer.zero_grad()
            loss(network(seen), rows, seen).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.no_grad()
def _probabilities(network: nn.Module, inputs: Tensor) -> np.ndarray:
    return network(inputs).softmax(1).numpy()


def _surest(probabilities: np.ndarray, most: int) -> np.ndarray:
    """Of each class that is seen, the ``most`` surest rows; sorted."""
    seen, sure = probabilities.argmax(1), probabilities.max(1)
    rows = [
        np.flatnonzero(seen == label)[np.argsort(-sure[seen == label], kind="stable")[:most]]
        for label in np.unique(seen)
    ]
    return np.sort(np.concatenate(rows))

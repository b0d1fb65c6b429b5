"""Whether a student learns 1,000 classes from a teacher: three real digits in a row are one image.

Each loss takes the same steps at the same rate as cross-entropy with the teacher's answers does, SGD's fitted
to the loss as training fits it; what is compared is how often student and teacher agree on images of digits
that neither has seen.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from statistics import mean
from typing import Any, cast

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional

from components.models.params import LearningRate, Optimizer
from components.training import losses, optim
from components.training.inputs.feed import Batch
from components.training.params import Distill
from components.training.sampling import Draw
from components.training.soft_labels import Answers
from components.training.tasks import task_of
from components.training.tasks.base import Setup
from tests.benchmarks.measure import Row, at_least

DIGITS, IN_A_ROW = 10, 3
HELD = 3  # of so many digits, one is kept for judging
IMAGES, JUDGED = 8_000, 2_000
EPOCHS, BATCH = 5, 64
SOFT = "soft cross-entropy"
LEARNT: dict[str, dict[str, Any]] = {
    SOFT: {},
    "ssld": {"method": "ssld", "temperature": 1.0},
    "kd, T = 2": {"method": "kd", "temperature": 2.0},
    "js": {"method": "js", "temperature": 1.0},
}
RATES = {"sgd": 0.05, "adamw": 0.002}  # good ones for soft cross-entropy, on seed 1
HELD_TO = ("ssld", "kd, T = 2")  # what distill.method: auto chooses from for such a student
SHARE = 0.8  # of what soft cross-entropy reaches
FIRST_SEED = 11


@dataclass(frozen=True)
class Lesson:
    """Images of digits in a row: pixels float32 [n, 1, 8, 8 k] in 0..1, the teacher's answers [n, 10^k]."""

    pixels: Tensor
    answers: Tensor

    @property
    def classes(self) -> int:
        return self.answers.shape[1]


class Known:
    """Answers that lie in memory, by row, as a task asks for them."""

    crops = (0,)

    def __init__(self, answers: Tensor) -> None:
        self._answers = answers.numpy()

    def take(self, rows: np.ndarray, views: np.ndarray) -> dict[str, np.ndarray]:
        return {"prob": self._answers[rows]}

    def dense(self, taken: dict[str, Tensor]) -> Tensor:
        return taken["prob"]


def measure(seeds: int) -> list[Row]:
    agreed: dict[tuple[str, str], list[float]] = {}
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        lesson, exam = lessons(seed, IN_A_ROW, IMAGES, JUDGED)
        for optimizer, rate in RATES.items():
            for name in LEARNT:
                found = agreement(name, optimizer, rate, lesson, exam, seed)
                agreed.setdefault((optimizer, name), []).append(found)
                print(f"    seed {seed}, {optimizer}, {name}: {found:.4f}", file=sys.stderr, flush=True)
    rows = []
    for (optimizer, name), values in agreed.items():
        said = f"{optimizer}, {name}: agreement with the teacher"
        spread = f"mean; {min(values):.4f} to {max(values):.4f}, {seeds} seeds"
        rows.append(Row(said, mean(values), "", note=spread))
        if name in HELD_TO:
            share = min(a / b for a, b in zip(values, agreed[optimizer, SOFT], strict=True))
            rows.append(
                at_least(f"{optimizer}, {name}: beside soft cross-entropy", share, SHARE, "x", "worst")
            )
    return rows


def lessons(seed: int, in_a_row: int, images: int, judged: int) -> tuple[Lesson, Lesson]:
    """What is learnt from, and what is judged on; of different digits.

    The teacher reads each digit alone (logistic regression on those that are learnt from), and says the
    products.
    """
    digits = load_digits()
    rng = np.random.default_rng(seed)
    pixels = torch.from_numpy(digits.images / 16).float()
    order = rng.permutation(len(pixels))
    held, learnt = order[: len(order) // HELD], order[len(order) // HELD :]
    reader = LogisticRegression(max_iter=300).fit(digits.data[learnt] / 16, digits.target[learnt])
    said = torch.from_numpy(reader.predict_proba(digits.data / 16)).float()

    def lesson(of: np.ndarray, count: int) -> Lesson:
        chosen = torch.from_numpy(rng.choice(of, (count, in_a_row)))
        row = torch.cat([pixels[chosen[:, place]] for place in range(in_a_row)], dim=2)
        answers = said[chosen[:, 0]]
        for place in range(1, in_a_row):
            answers = (answers[:, :, None] * said[chosen[:, place]][:, None, :]).flatten(1)
        return Lesson(row[:, None], answers)

    return lesson(learnt, images), lesson(held, judged)


def student(classes: int, width: int) -> nn.Module:
    """Two convolutions and two layers on top; knows where in the image it looks."""
    flat = 32 * 4 * (width // 2)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(flat, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, classes),
    )  # fmt: skip


def agreement(
    name: str, optimizer: str, rate: float, lesson: Lesson, exam: Lesson, seed: int, epochs: int = EPOCHS
) -> float:
    """Share of the exam's images on which the student says what the teacher says, after all steps."""
    torch.manual_seed(seed)
    settings = Distill.model_validate({"label_share": 0.0, **LEARNT[name]})
    module = student(lesson.classes, lesson.pixels.shape[3])
    known = cast(Answers, Known(lesson.answers))
    rows = len(lesson.pixels)
    labels = np.full(rows, -1, np.int32)
    cpu = torch.device("cpu")
    setup = Setup(labels, losses.CrossEntropy(), known, cpu, settings)
    lr, chosen = LearningRate(initial=rate), Optimizer(name=optimizer)  # type: ignore[arg-type]
    task = None
    if name != SOFT:
        lr, chosen = optim.fitted(lr, chosen, settings.method, lesson.classes, settings)
        task = task_of(settings.method)(setup, module)
    made = optim.make_optimizer(module, chosen)
    steps = -(-rows // BATCH)
    schedule = optim.Schedule(made, lr, steps * epochs, steps / 2)
    module.train()
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(rows)
        for step in range(steps):
            schedule.set(epoch * steps + step)
            here = order[step * BATCH : (step + 1) * BATCH]
            pixels = lesson.pixels[here]
            if task is None:
                loss = functional.cross_entropy(module(pixels), lesson.answers[here])
            else:
                draw = Draw(here, np.zeros(len(here), np.int64), len(here))
                extra = {key: torch.from_numpy(part) for key, part in task.extra(draw).items()}
                loss = task(pixels, Batch(draw, pixels, extra, 0.0), None).loss
            made.zero_grad()
            loss.backward()
            made.step()
    module.eval()
    with torch.no_grad():
        said = module(exam.pixels).argmax(1)
    return float((said == exam.answers.argmax(1)).float().mean())

"""How long training takes: measured on this machine with the real network, before it starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn

from components.models import build
from components.models.params import Arch, Optimizer, Train
from components.training import optim
from components.training.augmentation import Augment, Recipe, canvas_size
from components.training.normalise import Normalise
from components.training.precision import Precision

START_SECONDS = 20.0  # of each step that trains: Ray, its workers, and their imports
GPU_START_SECONDS = 50.0  # the same where CUDA starts, and its first step: 47 to 57 s on an H100
MOST_STEPS = 6  # timed: with more, the median is no better than a machine's own noise
FETCH_SECONDS = 0.002  # of a loader process, for an image beside its view: to take it out, to hand it over
CLASSES = 10  # of the network that is measured: its classifier is not what takes long


@dataclass(frozen=True)
class Speed:
    """Images a second of one network: training (view, forward, backward, update), and inference."""

    training: float
    inference: float

    def __mul__(self, factor: float) -> Speed:
        return Speed(self.training * factor, self.inference * factor)


def measure(
    arch: Arch | str,
    image_size: int,
    batch: int,
    threads: int,
    *,
    augment: str | Recipe = "light",
    optimizer: Optimizer | None = None,
    train: Train | None = None,
    learn_size: int | None = None,
    budget: float = 10.0,
    device: str = "cpu",
    loaders: int = 0,
) -> Speed:
    """Time a few steps of the real network on random pixels, taken as training takes them.

    Args:
        batch: images a step.
        threads: all cores that training may use: Ray workers times the cores of each.
        train: its number formats; None: those that suit the device.
        learn_size: pixels a side while training; None: ``image_size``.
        device, loaders: where the network computes, and the processes that make its views meanwhile; 0, and
            on a GPU: they are made in the step itself.
        budget: seconds for what is timed; a step to warm up comes before, and one is always timed.

    Raises:
        RetortError: there is no such architecture.
    """
    arch = Arch(name=arch) if isinstance(arch, str) else arch
    place = torch.device(device)
    precision = Precision.of(train or Train(), place)
    if place.type == "cuda":
        precision.prepare(threads)
    with torch.random.fork_rng(devices=[]):
        module = build.create(arch, CLASSES).to(place).to(memory_format=torch.channels_last)
    update = optim.make_optimizer(module, optimizer or Optimizer())
    made = Augment(augment, 0, learn_size or image_size)
    side = image_size if made.recipe.source == "square" else canvas_size(image_size)
    shape = (batch, 3, side, side)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).to(place)
    plain = pixels[:, :, :image_size, :image_size].contiguous()
    aspects = None if made.recipe.source == "square" else np.ones(batch, np.float32)
    rows, labels = np.arange(batch), torch.arange(batch, device=place) % CLASSES
    normalise = Normalise(*build.preprocessing(arch), place)
    apart = loaders and place.type == "cpu"  # processes make the views meanwhile; on a GPU they are its own

    def view() -> Tensor:
        return made(pixels, rows, np.zeros(batch, dtype=np.int64), aspects)

    def learn() -> None:
        update.zero_grad(set_to_none=True)
        inputs = normalise(plain[:, :, : made.size, : made.size] if apart else view())
        with precision.autocast():
            loss = nn.functional.cross_entropy(module(inputs), labels)
        loss.backward()
        update.step()
        loss.item()  # a GPU is done then

    @torch.no_grad()
    def infer() -> None:
        with precision.autocast():
            module(normalise(plain)).argmax(1).cpu()

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, threads))
    try:
        module.train()
        training = batch / _step_seconds(learn, 0.7 * budget)
        module.eval()
        inference = batch / _step_seconds(infer, 0.3 * budget)
        if apart:
            torch.set_num_threads(1)
            views = loaders * batch / (_step_seconds(view, 0.3 * budget) + batch * FETCH_SECONDS)
            training, inference = min(training, views), min(inference, loaders / FETCH_SECONDS)
        return Speed(training, inference)
    finally:
        torch.set_num_threads(before)


def _step_seconds(step: Callable[[], object], budget: float) -> float:
    """Median seconds of a step; the first one warms up, and is neither timed nor counted in the budget."""
    step()
    started = last = perf_counter()
    taken: list[float] = []
    while len(taken) < MOST_STEPS and (not taken or last - started + taken[-1] <= budget):
        step()
        now = perf_counter()
        taken.append(now - last)
        last = now
    return max(median(taken), 1e-6)


def seconds(
    *,
    training: int,
    validation: int,
    teacher: Speed,
    student: Speed,
    teacher_epochs: int,
    student_epochs: int,
    test: int = 0,
    unlabelled: int = 0,
    chosen: int = 0,
    crops: int = 1,
    finetune_epochs: int = 1,
    control: bool = True,
    gpu: bool = False,
) -> dict[str, float]:
    """Seconds of each step that trains: ``finetune``, ``check`` and ``distill``. Decoding is not in them.

    The student alone is trained by ``check``, which asks the teacher about the unlabelled images.

    Args:
        training, validation, test, unlabelled: images of each split.
        chosen: unlabelled images that distillation takes of them.
        student_epochs, crops, finetune_epochs, control: as in ``student.train`` and ``distill``, with the
            soft labels cached.
        gpu: whether a worker has one.
    """

    def epochs(speed: Speed, count: int, images: int) -> float:
        each = images / speed.training + validation / speed.inference
        return count * each

    start = GPU_START_SECONDS if gpu else START_SECONDS

    at_the_end = (validation + test) / student.inference
    labels = crops * (training + chosen) / teacher.inference
    pool = (unlabelled if chosen else 0) / teacher.inference
    # the control takes as many steps as the student, and both are finetuned on the labelled images
    once = epochs(student, student_epochs, training + chosen) + epochs(student, finetune_epochs, training)
    return {
        "finetune": start
        + epochs(teacher, teacher_epochs, training)
        + (validation + test) / teacher.inference,
        "check": validation / teacher.inference + control * (start + pool + once + at_the_end),
        "distill": start + labels + (not control) * pool + once + at_the_end,
    }

"""Train from labels and from cached soft labels in turns; prints images/s of each round, by way, as JSON.

``bench_training`` runs it, a program of its own:
    python cached_labels.py MANIFEST ROOT ROUNDS
Steps are the trainer's own: feed, augmentation, lookup of labels, loss, update.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from components.audit.plan_schema import Plan
from components.common.storage import state_dir
from components.models import build, checkpoint
from components.models.card import ModelCard
from components.models.params import Arch, LearningRate, Optimizer, Train, Valid
from components.training import sampling
from components.training.inputs import pictures
from components.training.inputs.index import known_fingerprint
from components.training.labeller import ask_teacher
from components.training.learner import Learner, Tools
from components.training.params import Distill
from components.training.spec import Phase, TrainSpec
from components.training.tasks.base import Setup
from components.training.trainer import Trainer
from components.training.watch import StepWatch, Sums
from tests.components.training.local import LocalContext

SIZE, BATCH, THREADS = 128, 32, 2
CLASSES = tuple(f"class {label}" for label in range(10))
PHASES = {task: Phase(task, task, 100, LearningRate(initial=1e-4), task=task) for task in ("labels", "ssld")}
WAYS = {  # task, from image files, views of an image in a batch, mixed
    "plain, decoded": ("labels", False, 1, False),
    "cached, decoded": ("ssld", False, 1, False),
    "plain, decoded, mixed": ("labels", False, 1, True),
    "cached, decoded, mixed": ("ssld", False, 1, True),
    "plain, JPEG": ("labels", True, 1, False),
    "cached, JPEG": ("ssld", True, 1, False),
    "cached, JPEG, 4 views": ("ssld", True, 4, False),
}


def write_teacher(folder: Path, manifest: Path) -> Path:
    """A network that has learnt nothing: what it says costs as much."""
    arch = Arch(name="test_efficientnet")
    mean, std = build.preprocessing(arch)
    card = ModelCard(
        arch=arch, class_names=list(CLASSES), input_size=[3, SIZE, SIZE], mean=list(mean), std=list(std),
        data_fingerprint=known_fingerprint(manifest), lineage=[], sha256="",
    )  # fmt: skip
    folder.mkdir()
    module = build.create(arch, len(CLASSES)).eval()
    checkpoint.save(folder / "model.safetensors", folder / "model.json", module, card)
    return folder


def epochs_of(spec: TrainSpec, task: str, files: bool) -> Callable[[int], float]:
    """Trains one epoch of a number, and returns its images/s."""
    share, pictures.DISK_SHARE = pictures.DISK_SHARE, 0.0 if files else pictures.DISK_SHARE
    if files:  # none is kept decoded
        os.environ["RETORT_STATE"] = str(state_dir("files").resolve())
    made = Trainer(LocalContext(), spec)
    pictures.DISK_SHARE = share
    phase = PHASES[task]
    feed, augment = made.supply.learn(phase), made.supply.augment(phase)
    answers, unlabelled = ask_teacher(
        spec, made.index, made.labelled, augment, feed, made.precision, made.group, None, made.reporter
    )
    weights = sampling.Weights(made.index, made.labelled, spec.plan)
    epochs = sampling.Epochs(
        made.index, made.labelled, weights, unlabelled, spec.seed, spec.recipe(phase).repeats
    )
    tools = Tools(spec, made.group, made.precision, augment, made.normalise)
    setup = Setup(made.index.labels, made._criterion(phase), answers, made.precision.device, spec.distill)
    steps = sampling.steps_per_epoch(len(made.labelled), BATCH, 1)
    learner = Learner(tools, phase, 0, made._network(phase.net), setup, steps * phase.epochs, steps)

    def epoch(number: int) -> float:
        learner.begin_epoch()
        watch = StepWatch(
            made.precision.device, made.group, steps, 0, Sums(), lambda loss, step: None,
            lambda: (False, False), None,
        )  # fmt: skip
        draws = epochs.draws(number, BATCH, 1, 0, learner.task.view)
        started = time.perf_counter()
        for step, batch in enumerate(feed(learner.task.shown(draws), learner.extra)):
            learner.step(batch, number, step, steps * number + step, watch)
        return len(made.labelled) / (time.perf_counter() - started)

    return epoch


def main() -> None:
    manifest, root, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    state = os.environ["RETORT_STATE"]
    base = TrainSpec(
        manifest=manifest, root=root, size=SIZE, seed=7, class_names=CLASSES, plan=Plan(),
        arch=Arch(name="mobilenetv3_small_100"), start=None, optimizer=Optimizer(name="sgd"),
        train=Train(batch_size=BATCH, augment="standard"), valid=Valid(batch_size=64), phases=(),
        threads=THREADS, workers=1, allow_flat_loss=True, teacher=write_teacher(Path("teacher"), manifest),
        distill=Distill(crops=4), soft_labels=Path("labels").resolve(),
    )  # fmt: skip
    ways: dict[str, Callable[[int], float]] = {}
    for name, (task, files, views, mixed) in WAYS.items():
        changes = {"repeats": views, "mixup": 0.8 if mixed else 0.0, "cutmix": 1.0 if mixed else 0.0}
        spec = replace(base, train=base.train.model_copy(update=changes), phases=(PHASES[task],))
        ways[name] = epochs_of(spec, task, files)
        os.environ["RETORT_STATE"] = state
    torch.set_num_threads(THREADS)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, epoch in ways.items():
            rates[name].append(epoch(number))
    print(json.dumps({name: found[1:] for name, found in rates.items()}), flush=True)


if __name__ == "__main__":
    main()

"""What the workers are to do with a network: plain data that travels to every one of them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from components.audit.plan import Plan
from components.common.storage import sha256_file, sha256_json
from components.dataset import images
from components.models import checkpoint
from components.models.params import Arch, LearningRate, Optimizer, Train, Valid
from components.training import augmentation
from components.training.inputs.index import known_fingerprint
from components.training.params import Distill
from components.training.remote import Storage

# they decide no byte of the weights
OTHERWISE = {"num_workers", "time_budget_minutes", "checkpoint_minutes"}
VERSION = 3  # of what the trainer computes: checkpoints of another number are not gone on with


@dataclass(frozen=True)
class Phase:
    """Some epochs of one network.

    ``task``: a name in ``tasks.TASKS``. ``matched``: it takes as many steps as a phase that learns from the
    unlabelled images too. ``new_rows``: only the classifier's rows from this one on learn; everything else
    stays as it is, batch norms' statistics included.
    """

    name: str
    net: str
    epochs: int
    lr: LearningRate
    task: str = "labels"
    matched: bool = False
    new_rows: int | None = None


@dataclass(frozen=True)
class TrainSpec:
    """All that the workers need to know. Paths are absolute, and of the node where it is read."""

    manifest: Path
    root: str
    size: int
    seed: int
    class_names: tuple[str, ...]
    plan: Plan
    arch: Arch
    start: Path | None  # backbone weights; None: random
    optimizer: Optimizer
    train: Train
    valid: Valid
    phases: tuple[Phase, ...]
    threads: int
    workers: int
    whole: bool = False  # ``start`` holds every tensor of the network, its head and blocks too
    patient: bool = False  # a loss that stays flat is a result, not a reason to stop
    waived: bool = False  # ... is said, and training goes on
    teacher: Path | None = None
    distill: Distill | None = None
    soft_labels: Path | None = None  # the folder of their cache
    shards: Storage | None = None  # where shards of the images are; None: the image files themselves

    def recipe(self) -> augmentation.Recipe:
        """How images are augmented and mixed."""
        train = self.train
        return augmentation.recipe_of(
            train.augment,
            mixup=train.mixup,
            cutmix=train.cutmix,
            label_smoothing=train.label_smoothing,
            repeats=train.repeats,
        )

    def key(self) -> str:
        """Hash of all inputs and parameters that decide the weights: names the checkpoints' folder."""
        teacher = None if self.teacher is None else sha256_file(self.teacher / checkpoint.FILE)
        card = None if self.teacher is None else sha256_file(self.teacher / checkpoint.CARD)
        return sha256_json(
            {
                "data": known_fingerprint(self.manifest),
                "start": None if self.start is None else sha256_file(self.start),
                "teacher": [teacher, card],
                "plan": self.plan.model_dump(mode="json"),
                "sections": [
                    None if part is None else part.model_dump(mode="json", exclude=OTHERWISE)
                    for part in (self.arch, self.optimizer, self.train, self.valid, self.distill)
                ],
                "phases": [
                    (p.name, p.net, p.epochs, p.lr.model_dump(), p.task, p.matched, p.new_rows)
                    for p in self.phases
                ],
                "rest": [self.size, self.seed, self.class_names, self.threads, self.workers],
                "whole": self.whole,
                "code": [torch.__version__, version("timm"), images.decoder(), augmentation.VERSION, VERSION],
            }
        )

"""What the workers are to do with a network: plain data that travels to every one of them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from components.audit.plan_schema import Plan
from components.common.object_store import Storage
from components.common.storage import sha256_file, sha256_json
from components.dataset import images
from components.models import checkpoint
from components.models.params import Arch, LearningRate, Optimizer, Train, Valid
from components.training import augmentation
from components.training.inputs.index import known_fingerprint
from components.training.params import Distill

# they decide no byte of the weights
OTHERWISE = {"num_workers", "time_budget_minutes", "checkpoint_minutes"}
# of distillation: what is kept and judged, and what the phases and teachers say already
OUTSIDE = {
    "keep", "seeds", "control", "control_epochs", "committee", "teachers", "epochs", "finetune_epochs",
    "finetune_lr", "finetune_size", "min_teacher_accuracy", "reference_lr", "reference_batch",
    "reference_optimizer",
}  # fmt: skip
VERSION = 3  # of what the trainer computes: checkpoints of another number are not gone on with


@dataclass(frozen=True)
class Phase:
    """Some epochs of one network.

    ``task``: a name in ``tasks.TASKS``. ``match_budget``: it takes as many steps as a phase that learns from
    the unlabelled images too. ``new_rows``: only the classifier's rows from this one on learn; everything
    else stays as it is, batch norms' statistics included.

    ``size``: pixels a side, while it learns and where it is judged; ``optimizer``; ``augment``: a recipe as
    it is published, without the mixing and smoothing that ``train`` may ask for. None: as the job has them.

    ``stream``: networks of other streams begin with another head, and see other draws and views.
    """

    name: str
    net: str
    epochs: int
    lr: LearningRate
    task: str = "labels"
    match_budget: bool = False
    new_rows: int | None = None
    size: int | None = None
    optimizer: Optimizer | None = None
    augment: str | None = None
    stream: int = 0


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
    full_checkpoint: bool = False  # ``start`` holds every tensor of the network, its head and blocks too
    allow_flat_loss: bool = False  # a loss that stays flat is a result, not a reason to stop
    waived: bool = False  # ... is said, and training goes on
    who: str = "teacher"  # section of params.yaml that says all this: teacher, student; it decides no byte
    teacher: Path | None = None
    teachers: tuple[Path, ...] = ()  # more of them, averaged with it
    distill: Distill | None = None
    soft_labels: Path | None = None  # the folder of their cache
    shards: Storage | None = None  # where shards of the images are; None: the image files themselves

    def recipe(self, phase: Phase | None = None) -> augmentation.Recipe:
        """How images are augmented and mixed; in a phase, if one is given."""
        train = self.train
        if phase is not None and phase.augment is not None:
            return augmentation.recipe_of(phase.augment)
        return augmentation.recipe_of(
            train.augment,
            mixup=train.mixup,
            cutmix=train.cutmix,
            label_smoothing=train.label_smoothing,
            repeats=train.repeats,
        )

    def size_of(self, phase: Phase) -> int:
        """Pixels a side of the images that a phase judges its network on, which is made for them then."""
        return phase.size or self.size

    def learn_size(self, phase: Phase) -> int:
        """Pixels a side of the views that a phase learns from.

        A size of its own is that of both: "Fixing the train-test resolution discrepancy" (Touvron et al.,
        2019) finetunes at the size at which the network is used.
        """
        return phase.size or self.train.image_size or self.size

    def optimizer_of(self, phase: Phase) -> Optimizer:
        """What a phase's network is trained with."""
        return phase.optimizer or self.optimizer

    def costs(self, phase: Phase) -> tuple[float, float]:
        """What an image costs a phase, to learn from and to judge, beside one of a phase without a size."""
        usual = self.train.image_size or self.size
        return (self.learn_size(phase) / usual) ** 2, (self.size_of(phase) / self.size) ** 2

    def judging_costs(self) -> dict[str, float]:
        """What an image costs each network when all is done: that of its last phase."""
        return {phase.net: self.costs(phase)[1] for phase in self.phases}

    def largest(self) -> int:
        """Pixels a side of the largest images of all phases."""
        return max((self.size_of(phase) for phase in self.phases), default=self.size)

    def key(self) -> str:
        """Hash of all inputs and parameters that decide the weights: names the checkpoints' folder."""
        teachers = [
            sha256_file(folder / name)
            for folder in (self.teacher, *self.teachers)
            if folder is not None
            for name in (checkpoint.FILE, checkpoint.CARD)
        ]
        return sha256_json(
            {
                "data": known_fingerprint(self.manifest),
                "start": None if self.start is None else sha256_file(self.start),
                "teachers": teachers,
                "plan": self.plan.model_dump(mode="json"),
                "sections": [
                    None
                    if part is None
                    else part.model_dump(mode="json", exclude=OUTSIDE if part is self.distill else OTHERWISE)
                    for part in (self.arch, self.optimizer, self.train, self.valid, self.distill)
                ],
                "phases": [
                    [
                        p.name,
                        p.net,
                        p.epochs,
                        p.lr.model_dump(),
                        p.task,
                        p.match_budget,
                        p.new_rows,
                        p.size,
                        p.augment,
                        p.stream,
                        None if p.optimizer is None else p.optimizer.model_dump(),
                    ]
                    for p in self.phases
                ],
                "rest": [self.size, self.seed, self.class_names, self.threads, self.workers],
                "full_checkpoint": self.full_checkpoint,
                "code": [torch.__version__, version("timm"), images.decoder(), augmentation.VERSION, VERSION],
            }
        )

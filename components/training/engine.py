"""The training loop: one loop over phases and epochs, run by every Ray worker. It decides nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from components.audit.plan import Plan
from components.common.progress import counted
from components.common.storage import sha256_file, sha256_json
from components.dataset import images, manifest
from components.models import build, checkpoint
from components.models.params import Arch, LearningRate, Optimizer, Train, Valid
from components.training import losses, sampling, soft_labels
from components.training.context import Context
from components.training.loader import (
    AUGMENTATION,
    PLAIN,
    Normalise,
    Samples,
    Views,
    load,
    open_samples,
    pairs,
)
from components.training.pace import TIMED_SECONDS, Pace, Part, Promise
from components.training.params import Distill
from components.training.rows import NewRows

TELL_SECONDS = 0.4  # between two signs of progress
FLAT = 0.98  # a loss that keeps more than this share has not moved
BUCKET_MB = 8  # gradients summed at once: in one bucket, a small network's would wait for its whole backward
STALE = 1e-3  # share of the statistics that a network began with, left when its training ends
JUDGED_STEPS = 50  # before so many steps a validation loss says little

# what a random stream is for: part of its key, so that no two uses share their numbers
DRAW, ORDER, NOISE, INITIAL = range(4)


@dataclass(frozen=True)
class Phase:
    """Some epochs of one network.

    ``soft``: it learns what the teacher says, on unlabelled images too. ``matched``: it learns from labels,
    but takes as many steps as a soft phase does. ``new_rows``: only the classifier's rows from this one on
    learn; everything else stays as it is, batch norms' statistics included.
    """

    name: str
    net: str
    epochs: int
    lr: LearningRate
    soft: bool = False
    matched: bool = False
    new_rows: int | None = None


@dataclass(frozen=True)
class Job:
    """All that the workers need to know. Paths are absolute and seen by every node."""

    manifest: Path
    decoded: Path | None
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

    def key(self) -> str:
        """Hash of all inputs and parameters that decide the weights: names the checkpoints' folder."""
        teacher = None if self.teacher is None else sha256_file(self.teacher / checkpoint.FILE)
        card = None if self.teacher is None else sha256_file(self.teacher / checkpoint.CARD)
        return sha256_json(
            {
                "data": manifest.fingerprint(self.manifest),
                "start": None if self.start is None else sha256_file(self.start),
                "teacher": [teacher, card],
                "plan": self.plan.model_dump(mode="json"),
                "sections": [
                    None if part is None else part.model_dump(mode="json")
                    for part in (self.arch, self.optimizer, self.train, self.valid, self.distill)
                ],
                "phases": [
                    (p.name, p.net, p.epochs, p.lr.model_dump(), p.soft, p.matched, p.new_rows)
                    for p in self.phases
                ],
                "rest": [self.size, self.seed, self.class_names, self.threads, self.workers],
                "whole": self.whole,
                "code": [torch.__version__, images.decoder(), AUGMENTATION],
            }
        )


def work(context: Context, job: Job) -> None:
    """What each worker runs."""
    Worker(job, context).run()


def rate(lr: LearningRate, step: int, steps: int, warmup_steps: float) -> float:
    """Learning rate of one step: a linear rise, then cosine to zero, constant, or tenths at each third."""
    if step < warmup_steps:
        return lr.initial * (step + 1) / (warmup_steps + 1)
    done = (step - warmup_steps) / max(1.0, steps - warmup_steps)
    if lr.schedule == "cosine":
        return lr.initial * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if lr.schedule == "step":
        return lr.initial * 0.1 ** min(2, int(3 * done))
    return lr.initial


def make_optimizer(module: nn.Module, params: Optimizer) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW; weight decay on matrices and kernels only."""
    kernels = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": kernels, "weight_decay": params.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if params.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=(params.momentum, 0.999), fused=True)
    nesterov = params.momentum > 0
    return torch.optim.SGD(groups, lr=0.0, momentum=params.momentum, nesterov=nesterov, fused=True)


def forget_within(module: nn.Module, steps: int) -> None:
    """Let batch norms' running statistics keep no more than ``STALE`` of their first values after ``steps``.

    At the usual momentum of 0.1 that takes 66 steps; a small data set has fewer, and would be judged by
    statistics of other images.
    """
    momentum = 1 - STALE ** (1 / steps)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.momentum is not None:
            part.momentum = max(part.momentum, momentum)


def create_network(
    arch: Arch, class_num: int, start: Path | None, seed: int, whole: bool = False
) -> nn.Module:
    """The network before training: backbone (``whole``: everything) from ``start``, the rest random."""
    from components.weights.load import load_backbone

    if whole:
        assert start is not None
        module = build.create(arch, class_num)
        module.load_state_dict(checkpoint.read_tensors(start))
        return module
    torch.manual_seed(int(sampling.generator(seed, INITIAL).integers(2**62)))
    module = build.plain(arch, class_num)
    if start is not None:
        load_backbone(module, start)
    return build.with_blocks(module, arch)


def occurrence(rows: np.ndarray) -> np.ndarray:
    """For each entry, int64, how often the same row came before it: 0, then 1, ..."""
    order = np.argsort(rows, kind="stable")
    _, starts, counts = np.unique(rows[order], return_index=True, return_counts=True)
    result = np.empty(len(rows), dtype=np.int64)
    result[order] = np.arange(len(rows)) - np.repeat(starts, counts)
    return result


def macro_recall(actual: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over the classes that occur of the share of their images that were recognised."""
    return float(np.mean([(predicted[actual == label] == label).mean() for label in np.unique(actual)]))


def looks_flat(first_loss: float, loss: float, top1: float, labels: np.ndarray) -> bool:
    """Whether nothing was learnt: the validation loss stays where it began, and guessing would do as well.

    Args:
        first_loss, loss: cross-entropy in nats after the phase's first epoch, and now. Always the same
            images: a training loss of few batches moves by chance alone.
        labels: of the validation split, int64 [n].
    """
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    guessing = -float((shares * np.log(shares)).sum())  # the loss of always naming the classes' shares
    return bool(loss > FLAT * max(first_loss, guessing) and top1 <= 1.1 * shares.max())


def learns_nothing(rows: Sequence[dict[str, Any]], epochs: int, steps: int, labels: np.ndarray) -> bool:
    """Whether a phase can be stopped after ``rows``, its epochs so far: at its end, or when it is past hope.

    Before the end one epoch that did better than guessing will do: a bad one after it is not a flat loss.

    Args:
        epochs, steps: of the whole phase, and of each epoch.
        labels: of the validation split, int64 [n].
    """
    if len(rows) == epochs:
        judged = rows[-1:]
    elif len(rows) > 1 and len(rows) * steps >= JUDGED_STEPS:
        judged = rows
    else:
        return False
    first = rows[0]["val_loss"]
    return all(looks_flat(first, row["val_loss"], row["val_top1"], labels) for row in judged)


class Stop(Exception):  # noqa: N818
    """Training makes no sense any more; ``rule`` is the finding that says why."""

    def __init__(self, rule: str, message: str, advice: str, measured: float, waivable: bool = True) -> None:
        super().__init__(message)
        self.told: dict[str, Any] = {
            "rule": rule,
            "message": message,
            "advice": advice,
            "measured": str(measured),
            "waivable": waivable,
        }


class Worker:
    """One of the workers: it holds its copy of the network and takes its share of every batch."""

    def __init__(self, job: Job, context: Context) -> None:
        self.job, self._context = job, context
        self.rank, self.world, self.device = context.rank, context.world, context.device
        torch.set_num_threads(job.threads)
        torch.use_deterministic_algorithms(True)
        # that would also overwrite every tensor before its first use, to show reads of what was never written
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
        self.samples: Samples = open_samples(job.manifest, job.root, job.size, job.decoded)
        self.labels = self.samples.labels
        self.views = Views(self.samples, job.train.augment, job.seed)
        self.labelled = sampling.training_rows(self.samples.table, job.plan)
        self.weights = sampling.weights(self.samples.table, self.labelled, job.plan)
        self.unlabelled = np.empty(0, dtype=np.int64)  # those chosen
        self.criterion = losses.from_plan(job.plan, len(job.class_names)).to(self.device)
        self.divergence = losses.JSDivergence()
        mean, std = build.preprocessing(job.arch)
        self.normalise = Normalise(mean, std, self.device)
        self.teacher: soft_labels.Teacher | None = None
        self.crops: list[soft_labels.SoftLabels] = []
        self._told = 0.0
        self._trained = 0.0  # when the last epoch's steps were done
        self._promise = Promise()
        self.state: dict[str, Any] = {
            "phase": 0,
            "epoch": 0,
            "nets": {},
            "optimizer": None,
            "history": [],
            "predictions": {},
            "chosen": 0,
        }

    def tell(self, kind: str, **values: Any) -> None:
        if self.rank == 0:
            self._context.send(kind, **values)

    def run(self) -> None:
        self._restore()
        job, state = self.job, self.state
        try:
            if job.teacher is not None and not state["predictions"]:
                self._ask_teacher(job.teacher)
            self._promise, pace = Promise(), self._pace()
            while state["phase"] < len(job.phases):
                self._run_phase(job.phases[state["phase"]], pace)
        except Stop as stop:
            self.tell("stopped", **stop.told)
            return
        if not state["predictions"]:
            for net in state["nets"]:
                module = self._network(net)
                state["predictions"][net] = {
                    split: torch.from_numpy(self._predict(module, split)[0]) for split in ("val", "test")
                }
        self._save()

    def _network(self, net: str) -> nn.Module:
        """The network as it stands: all of a job start alike."""
        job = self.job
        module = create_network(job.arch, len(job.class_names), job.start, job.seed, job.whole)
        if net in self.state["nets"]:
            module.load_state_dict(self.state["nets"][net])
        return module.to(self.device).to(memory_format=torch.channels_last)

    def _restore(self) -> None:
        state = self._context.load_checkpoint()
        if state is None:
            self.tell("started")
            return
        self.state = state
        self.tell("resumed", phase=self.state["phase"], epoch=self.state["epoch"])
        for row in self.state["history"]:
            self.tell("epoch", row=row)

    def _save(self) -> None:
        """Every worker calls it; rank 0's state is everyone's. Returns when the checkpoint is safe."""
        self._context.save_checkpoint(self.state if self.rank == 0 else None)

    # --- the teacher ------------------------------------------------------------------------------------

    def _ask_teacher(self, folder: Path) -> None:
        """Load the teacher; choose unlabelled images; compute the soft labels of every crop."""
        job, distill = self.job, self.job.distill
        assert distill is not None
        assert job.soft_labels is not None
        self.teacher = soft_labels.Teacher(folder, self.device)
        soft_labels.need_same_classes(self.teacher.card, list(job.class_names), job.size)
        kept = soft_labels.kept_classes(len(job.class_names), distill.top_k_labels)
        pool = self.samples.rows("unlabeled")
        cached = distill.teacher_labels == "cached"
        wanted = len(pool) + (distill.crops * len(self.labelled) if cached else 0)
        self.tell("phase", name="soft labels", total=wanted, unit="images")
        done, started, first = 0, monotonic(), 0

        def advance(count: int) -> None:
            nonlocal done, started, first
            done += count * self.world
            self._progress(done)
            now = monotonic()
            if not first:  # it warms up
                started, first = now, done
            elif self.rank == 0 and now - started >= TIMED_SECONDS:
                left = (now - started) / (done - first) * (wanted - done)
                self._promised(left, f"soft labels of {wanted:,} images")

        def note(said: str) -> None:
            self.tell("note", said=said)

        def ask(rows: np.ndarray, view: int) -> soft_labels.SoftLabels:
            assert self.teacher is not None
            assert job.soft_labels is not None
            key = soft_labels.key(
                self.teacher.card,
                manifest.fingerprint(job.manifest),
                rows,
                [job.size, view, "none" if view == PLAIN else job.train.augment, job.seed],
                kept,
            )
            return soft_labels.make(
                job.soft_labels / key, self.teacher, self.views, rows, view, kept,
                job.valid.batch_size, job.valid.num_workers, advance, note,
            )  # fmt: skip

        self._told = 0.0
        if len(pool) and distill.unlabeled_per_class:
            self.unlabelled = soft_labels.choose(ask(pool, PLAIN), distill.unlabeled_per_class)
        self.state["chosen"] = len(self.unlabelled)
        if cached:
            everything = np.concatenate([self.labelled, self.unlabelled])
            self.crops = [ask(everything, crop) for crop in range(distill.crops)]

    # --- phases and epochs ------------------------------------------------------------------------------

    def _pace(self) -> Pace:
        """What this worker has before it."""
        parts = []
        for phase in self.job.phases:
            count = len(self.labelled) + self.state["chosen"] * (phase.soft or phase.matched)
            steps = sampling.steps_per_epoch(count, self.job.train.batch_size, self.world)
            parts.append(Part(phase.epochs, steps, count / steps / self.world))
        val, test = (len(self.samples.rows(split)) / self.world for split in ("val", "test"))
        return Pace(parts, val, len({phase.net for phase in self.job.phases}) * (val + test))

    def _estimate(self, pace: Pace) -> None:
        """Tell how long all of it will take, at first and whenever that was wrong."""
        if self.rank == 0 and pace.known:
            to_come = self.job.phases[self.state["phase"] :]
            epochs = sum(phase.epochs for phase in to_come) - self.state["epoch"]
            names = ", ".join(phase.name for phase in to_come)
            self._promised(pace.left(), f"{names}: {counted(epochs, 'epoch')} and their validation")

    def _promised(self, left: float, name: str) -> None:
        again = self._promise.told
        if self._promise.renew(monotonic(), left):
            self.tell("estimate", name=name, seconds=left, again=again)

    def _run_phase(self, phase: Phase, pace: Pace) -> None:
        state = self.state
        module = self._network(phase.net)
        frozen = None if phase.new_rows is None else NewRows(module, phase.new_rows)
        optimizer = make_optimizer(module, self.job.optimizer)
        if state["optimizer"] is not None:
            optimizer.load_state_dict(state["optimizer"])
        count = len(self._drawn(phase, 0))
        steps = sampling.steps_per_epoch(count, self.job.train.batch_size, self.world)
        forget_within(module, steps * sum(p.epochs for p in self.job.phases if p.net == phase.net))
        self.tell(
            "phase", name=phase.name, total=steps * phase.epochs, unit="steps",
            epochs=phase.epochs, done=steps * state["epoch"],
        )  # fmt: skip
        pace.phase(state["phase"], state["epoch"])
        while state["epoch"] < phase.epochs:
            row = self._epoch(phase, module, optimizer, steps, frozen, pace)
            state["epoch"] += 1
            state["history"].append(row)
            state["nets"][phase.net] = module.state_dict()
            state["optimizer"] = optimizer.state_dict()
            self.tell("epoch", row=row)
            last = state["epoch"] == phase.epochs
            if last:
                state.update(phase=state["phase"] + 1, epoch=0, optimizer=None)
            self._save()
            pace.epoch(monotonic() - self._trained)
            if last:
                return
            self._estimate(pace)

    def _drawn(self, phase: Phase, number: int) -> np.ndarray:
        """The rows of an epoch in order, int64: labelled as the plan weighs them, and the unlabelled once.

        A matched phase draws more labelled rows in their place, so that the budget is the same.
        """
        extra = self.state["chosen"] if phase.matched else 0
        key = self.job.seed, DRAW, number
        rows = self.labelled[sampling.draw(self.weights, len(self.labelled) + extra, *key)]
        if phase.soft:
            rows = np.concatenate([rows, self.unlabelled])
        return rows[sampling.spread(self.labels[rows], self.job.seed, ORDER, number)]

    def _number(self, phase: Phase) -> int:
        """How many epochs this network has seen: what seeds its draws and views."""
        before = self.job.phases[: self.state["phase"]]
        return self.state["epoch"] + sum(p.epochs for p in before if p.net == phase.net)

    def _epoch(
        self,
        phase: Phase,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int,
        frozen: NewRows | None,
        pace: Pace,
    ) -> dict[str, Any]:
        job, number = self.job, self._number(phase)
        noise = sampling.generator(job.seed, NOISE, self.state["phase"], number, self.rank)
        torch.manual_seed(int(noise.integers(2**62)))  # dropout; the same after a restart
        rows = self._drawn(phase, number)
        views = self._views(phase, rows, number)
        batches = sampling.batches(np.arange(len(rows)), job.train.batch_size, self.world, self.rank)
        items = [list(zip(rows[at].tolist(), views[at].tolist(), strict=True)) for at, _ in batches]
        # wrapped anew each epoch: gradients are then bucketed the same way in a run that was resumed
        parallel: nn.Module = module
        if self.world > 1:
            parallel = DistributedDataParallel(
                module, forward_sync_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=BUCKET_MB
            )
        module.train(frozen is None)
        if self.teacher is not None:
            self.teacher.assert_frozen()
        total_loss = lr = 0.0
        self._trained = monotonic()
        self._told = 0.0
        for step, pixels in enumerate(load(self.views, items, job.train.num_workers)):
            at, everyone = batches[step]
            done = self.state["epoch"] * steps + step
            lr = rate(phase.lr, done, phase.epochs * steps, phase.lr.warmup_epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            logits = parallel(self.normalise(pixels))
            loss = self._loss(phase, logits, pixels, rows[at], views[at])
            summed = torch.tensor(loss.item() * len(at), dtype=torch.float64, device=self.device)
            # summed while gradients are computed: workers wait for one another once a step, not twice
            told = dist.all_reduce(summed, async_op=True) if self.world > 1 else None
            optimizer.zero_grad(set_to_none=True)
            # DDP averages over workers: weighed by their rows, so that it is the mean over the batch
            (loss * (len(at) * self.world / everyone)).backward()
            if told is not None:
                told.wait()
            mean = float(summed) / everyone
            self._need_finite(mean, phase, step)
            optimizer.step()
            if frozen is not None:
                frozen.keep()
            total_loss += float(summed)
            now = monotonic()
            pace.step(now - self._trained)
            self._trained = now
            self._estimate(pace)
            self._progress(done + 1, f"epoch {self.state['epoch'] + 1}/{phase.epochs}, loss {mean:.3f}")
        if frozen is None:
            self._average_buffers(module)
        predicted, val_loss = self._predict(module, "val")
        actual = self.labels[self.samples.rows("val")]
        row = {
            "epoch": number + 1,
            "phase": phase.name,
            "lr": lr,
            "train_loss": total_loss / len(rows),
            "val_loss": val_loss,
            "val_top1": float((predicted == actual).mean()),
            "val_macro_recall": macro_recall(actual, predicted),
        }
        self._need_finite(val_loss, phase, steps)
        if not all(torch.isfinite(p).all() for p in module.parameters()):
            self._need_finite(math.nan, phase, steps)
        self._need_progress(phase, row, steps, actual)
        return row

    def _views(self, phase: Phase, rows: np.ndarray, number: int) -> np.ndarray:
        """The view of each entry: a fresh one, or one of the crops that the teacher has labelled."""
        repeats = occurrence(rows)  # a row drawn twice in an epoch is seen in two views
        if phase.soft and self.crops:
            return (number + repeats) % len(self.crops)
        return number + repeats * 1_000_000

    def _loss(
        self, phase: Phase, logits: Tensor, pixels: Tensor, rows: np.ndarray, views: np.ndarray
    ) -> Tensor:
        if not phase.soft:
            return self.criterion(logits, torch.from_numpy(self.labels[rows]).to(self.device))
        if not self.crops:
            assert self.teacher is not None
            return self.divergence(logits, self.teacher(pixels).clone())
        prob = torch.empty_like(logits)
        for crop in np.unique(views):
            at = np.flatnonzero(views == crop)
            prob[torch.from_numpy(at)] = self.crops[crop](rows[at]).to(self.device)
        return self.divergence(logits, prob)

    def _predict(self, module: nn.Module, split: str) -> tuple[np.ndarray, float]:
        """Predicted classes int64 and mean cross-entropy over a whole split: every row once, on all ranks."""
        rows = self.samples.rows(split)
        mine = rows[self.rank :: self.world]
        size = self.job.valid.batch_size
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        module.eval()
        classes: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
        loss = 0.0
        loader = load(self.views, [pairs(part, PLAIN) for part in parts], self.job.valid.num_workers)
        with torch.inference_mode():
            for part, pixels in zip(parts, loader, strict=True):
                logits = module(self.normalise(pixels)).float()
                labels = torch.from_numpy(self.labels[part]).to(self.device)
                loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
                classes.append(logits.argmax(1).cpu().numpy())
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, (np.concatenate(classes), loss))
        predicted = np.empty(len(rows), dtype=np.int64)
        for rank, (part, _) in enumerate(gathered):
            predicted[rank :: self.world] = part
        return predicted, sum(loss for _, loss in gathered) / max(1, len(rows))

    # --- what all workers agree on ----------------------------------------------------------------------

    def _average_buffers(self, module: nn.Module) -> None:
        """Running statistics: each worker saw its share of the images, the network gets their mean."""
        buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        if self.world == 1 or not buffers:
            return
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        dist.all_reduce(flat)
        flat /= self.world
        for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))

    def _need_finite(self, loss: float, phase: Phase, step: int) -> None:
        if math.isfinite(loss):
            return
        raise Stop(
            "train.finite",
            f"{phase.name}: the loss became {loss} in epoch {self.state['epoch'] + 1}, step {step + 1}; "
            f"{self._kept()}.",
            "Lower lr.initial, or lengthen lr.warmup_epochs.",
            loss,
            waivable=False,  # no step can be taken from a loss that is no number
        )

    def _need_progress(self, phase: Phase, row: dict[str, Any], steps: int, actual: np.ndarray) -> None:
        rows = [*(past for past in self.state["history"] if past["phase"] == phase.name), row]
        if self.job.patient or not learns_nothing(rows, phase.epochs, steps, actual):
            return
        taken = len(rows) * steps
        stop = Stop(
            "train.learns",
            f"{phase.name}: validation loss stays flat or rises ({rows[0]['val_loss']:.3f} at first, "
            f"{row['val_loss']:.3f} in epoch {len(rows)}) and top-1 is {row['val_top1']:.1%}, as by "
            f"guessing; {self._kept()}.",
            "Check labels and weights; change lr.initial."
            if taken >= JUDGED_STEPS
            else f"It took {taken} steps in all: give more epochs or a smaller batch_size.",
            row["val_loss"],
        )
        if not self.job.waived:
            raise stop
        self.tell("stopped", **stop.told)  # a person wants it trained to its end all the same

    def _kept(self) -> str:
        finished = len(self.state["history"])
        return f"the checkpoint of epoch {finished} is kept" if finished else "no epoch was finished"

    def _progress(self, done: int, note: str = "") -> None:
        if self.rank == 0 and monotonic() - self._told > TELL_SECONDS:
            self._told = monotonic()
            self.tell("progress", done=done, note=note)

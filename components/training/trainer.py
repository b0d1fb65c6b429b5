"""The training loop: one loop over phases and epochs, run by every worker. It knows no Ray."""

from __future__ import annotations

import math
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from components.common.progress import counted
from components.models import build, checkpoint
from components.models.params import Arch
from components.training import augmentation, health, losses, metrics, optim, sampling, soft_labels
from components.training.augmentation import PLAIN, Augment
from components.training.context import Context
from components.training.group import Group
from components.training.inputs.feed import Batch, Feed, open_feed
from components.training.inputs.index import open_index
from components.training.inputs.pictures import open_store
from components.training.inputs.shards import Shards
from components.training.normalise import Normalise
from components.training.pace import TIMED_SECONDS, Pace, Part, Promise
from components.training.precision import Precision, compiled, fitting_parts
from components.training.rows import NewRows
from components.training.sampling import Draw
from components.training.spec import Phase, TrainSpec
from components.training.state import State, Tensors
from components.training.tasks import TASKS, Setup, Task
from components.training.watch import StepWatch

SEND_SECONDS = 0.4  # between two signs of progress
BUCKET_MB = 8  # gradients summed at once: in one bucket, a small network's would wait for its whole backward


def train(context: Context, spec: TrainSpec) -> None:
    """What each worker runs."""
    Trainer(context, spec).run()


def create_network(
    arch: Arch, class_num: int, start: Path | None, seed: int, whole: bool = False
) -> nn.Module:
    """The network before training: backbone (``whole``: everything) from a file, the rest random.

    Args:
        start: a safetensors file; None: all of it is random.
    """
    from components.weights.load import load_backbone

    if whole:
        assert start is not None
        module = build.create(arch, class_num)
        module.load_state_dict(checkpoint.read_tensors(start))
        return module
    torch.manual_seed(int(sampling.generator(seed, sampling.INITIAL).integers(2**62)))
    module = build.plain(arch, class_num)
    if start is not None:
        load_backbone(module, start)
    return build.with_blocks(module, arch)


class LeftOff(Exception):  # noqa: N818
    """The job was asked to end; what it has is saved."""


@dataclass
class _Run:
    """One phase as it runs: the network and all that changes with it."""

    phase: Phase
    task: Task
    module: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: optim.Schedule
    steps: int  # of an epoch
    count: int  # rows of an epoch
    parts: int  # in which a batch is computed
    frozen: NewRows | None
    ema: Any  # timm's ModelEmaV3, or None
    compiled: bool = False
    network: nn.Module | None = None  # compiled: it stays, else it would be compiled in each epoch

    @property
    def judged(self) -> nn.Module:
        """The network that is validated and kept."""
        return self.module if self.ema is None else self.ema.module


class Trainer:
    """One of the workers: it holds its copy of the network and takes its share of every batch."""

    def __init__(self, context: Context, spec: TrainSpec) -> None:
        self.context, self.spec = context, spec
        self.device = context.device
        self.group = Group(context.rank, context.world, context.local_rank)
        self.precision = Precision.of(spec.train, self.device)
        self.precision.prepare(spec.threads)
        self.even = self.precision.compile is not False  # it may be compiled, for one size of batch
        self.index = open_index(spec.manifest)
        self.labelled = sampling.training_rows(self.index, spec.plan)
        sampling.need_rows(len(self.labelled), context.world)
        self.recipe = spec.recipe()
        self.augment = Augment(self.recipe, spec.seed, spec.train.image_size or spec.size)
        self.plain = Augment("none", spec.seed, spec.size)
        contents = None if spec.shards is None else Shards(spec.shards, self.index)
        self.store = open_store(self.index, spec.root, spec.size, self.recipe.source, contents=contents)
        self.epochs = self._draw_from(np.empty(0, dtype=np.int64))
        smoothing = self.recipe.label_smoothing
        criterion = losses.from_plan(spec.plan, len(spec.class_names), smoothing).to(self.device)
        self.setup = Setup(self.index.labels, criterion, None, self.device)
        self.normalise = Normalise(*build.preprocessing(spec.arch), self.device)
        self.state = State()
        self._sent = 0.0
        self._promise = Promise()
        self._resources = ExitStack()  # feeds: their processes end with the job
        self._feeds: dict[bool, Feed] = {}

    def send(self, kind: str, **values: Any) -> None:
        if self.context.rank == 0:
            self.context.send(kind, **values)

    def run(self) -> None:
        """All phases from where the job stands, then the networks' answers on validation and test."""
        spec, state = self.spec, self.state
        self._restore()
        with self._resources:
            try:
                if spec.teacher is not None and not self.state.predictions:
                    self._ask_teacher()
                self._promise, pace = Promise(), self._pace()
                while self.state.phase < len(spec.phases):
                    self._run_phase(spec.phases[self.state.phase], pace)
            except health.Stop as stop:
                self.send("stopped", **stop.told)
                return
            except LeftOff:
                return
            state = self.state
            if not state.predictions:
                for net in state.nets:
                    module = self._network(net)
                    state.predictions[net] = {
                        split: torch.from_numpy(self._predict(module, split)[0]) for split in ("val", "test")
                    }
            self._save()

    # --- what the job works with --------------------------------------------------------------------------

    def _draw_from(self, unlabelled: np.ndarray) -> sampling.Epochs:
        weights = sampling.Weights(self.index, self.labelled, self.spec.plan)
        repeats = self.recipe.repeats
        return sampling.Epochs(self.index, self.labelled, weights, unlabelled, self.spec.seed, repeats)

    def _feed(self, training: bool) -> Feed:
        """Where batches come from: one for training, one for what is judged, each made once."""
        if training not in self._feeds:
            spec = self.spec
            name, settings = ("train", spec.train) if training else ("valid", spec.valid)
            feed = open_feed(
                self.store.learn if training else self.store.judge,
                self.augment if training else self.plain, self.device, settings.num_workers,
                threads=spec.threads, name=f"{name}.num_workers",
                say=lambda said: self.send("note", said=f"{name}: {said}"),
            )  # fmt: skip
            self._feeds[training] = self._resources.enter_context(feed)
        return self._feeds[training]

    def _network(self, net: str) -> nn.Module:
        """The network as it stands: all of a job start alike."""
        spec = self.spec
        module = create_network(spec.arch, len(spec.class_names), spec.start, spec.seed, spec.whole)
        if net in self.state.nets:
            module.load_state_dict(self.state.nets[net])
        return module.to(self.device).to(memory_format=torch.channels_last)

    def _restore(self) -> None:
        saved = self.context.load_checkpoint()
        if saved is None:
            self.send("started")
            return
        self.state = State(**saved)
        self.send("resumed", phase=self.state.phase, epoch=self.state.epoch)
        for row in self.state.history:
            self.send("epoch", row=row)

    def _save(self) -> None:
        """Every worker calls it; rank 0's state is everyone's. Returns when the checkpoint is safe."""
        self.context.save_checkpoint(self.state.to_dict() if self.context.rank == 0 else None)

    # --- the teacher --------------------------------------------------------------------------------------

    def _ask_teacher(self) -> None:
        """Load the teacher; choose unlabelled images; compute the soft labels of every view."""
        spec, distill = self.spec, self.spec.distill
        assert distill is not None
        assert spec.teacher is not None
        teacher = soft_labels.Teacher(spec.teacher, self.precision)
        soft_labels.need_same_classes(teacher.card, list(spec.class_names), spec.size)
        pool = self.index.rows("unlabeled")
        cached = distill.teacher_labels == "cached"
        wanted = len(pool) * bool(distill.unlabeled_per_class)
        wanted += distill.crops * len(self.labelled) if cached else 0
        self.send("phase", name="soft labels", total=wanted, unit="images")
        done, started, first = 0, monotonic(), 0

        def advance(count: int) -> None:
            nonlocal done, started, first
            done += count * self.group.world
            self._progress(done)
            now = monotonic()
            if not first:  # it warms up
                started, first = now, done
            elif self.context.rank == 0 and now - started >= TIMED_SECONDS:
                left = (now - started) / (done - first) * (wanted - done)
                self._promised(left, f"soft labels of {wanted:,} images")

        def ask(rows: np.ndarray, view: int) -> soft_labels.SoftLabels:
            assert spec.soft_labels is not None
            assert distill is not None
            kept = soft_labels.kept_classes(len(spec.class_names), distill.top_k_labels)
            seen = [spec.size, view, self.recipe.source if view == PLAIN else self.augment.key(self.device)]
            name = soft_labels.key(teacher.card, self.index.fingerprint, rows, seen, kept, self.precision)
            return soft_labels.make(
                spec.soft_labels / name, teacher, self._feed(training=True), rows, view, kept,
                spec.valid.batch_size, self.group, advance, lambda said: self.send("note", said=said),
                self.context.exchange,
            )  # fmt: skip

        self._sent = 0.0
        unlabelled = np.empty(0, dtype=np.int64)
        if len(pool) and distill.unlabeled_per_class:
            unlabelled = soft_labels.choose(ask(pool, PLAIN), distill.unlabeled_per_class)
        self.state.chosen = len(unlabelled)
        crops = []
        if cached:
            everything = np.sort(np.concatenate([self.labelled, unlabelled]))
            crops = [ask(everything, crop) for crop in range(distill.crops)]
        self.setup = Setup(
            self.setup.labels, self.setup.criterion, soft_labels.Answers(teacher, crops), self.device
        )
        self.epochs = self._draw_from(unlabelled)

    # --- phases and epochs --------------------------------------------------------------------------------

    def _count(self, phase: Phase) -> int:
        return self.epochs.count(TASKS[phase.task].unlabelled, phase.matched)

    def _pace(self) -> Pace:
        """What this worker has before it."""
        parts = []
        for phase in self.spec.phases:
            count = self._count(phase)
            steps = sampling.steps_per_epoch(count, self.spec.train.batch_size, self.group.world)
            parts.append(Part(phase.epochs, steps, count / steps / self.group.world))
        val, test = (len(self.index.rows(split)) / self.group.world for split in ("val", "test"))
        return Pace(parts, val, len({phase.net for phase in self.spec.phases}) * (val + test))

    def _estimate(self, pace: Pace) -> None:
        """Tell how long all of it will take, at first and whenever that was wrong."""
        if self.context.rank == 0 and pace.known:
            to_come = self.spec.phases[self.state.phase :]
            epochs = sum(phase.epochs for phase in to_come) - self.state.epoch
            names = ", ".join(phase.name for phase in to_come)
            self._promised(pace.left(), f"{names}: {counted(epochs, 'epoch')} and their validation")

    def _promised(self, left: float, name: str) -> None:
        again = self._promise.told
        if self._promise.renew(monotonic(), left):
            self.send("estimate", name=name, seconds=left, again=again)

    def _begin(self, phase: Phase) -> _Run:
        spec, state = self.spec, self.state
        module = self._network(phase.net)
        if state.running is not None:
            module.load_state_dict(state.running)
        frozen = None if phase.new_rows is None else NewRows(module, phase.new_rows)
        optimizer = optim.make_optimizer(module, spec.optimizer)
        if state.optimizer is not None:
            optimizer.load_state_dict(state.optimizer)
        count, batch = self._count(phase), spec.train.batch_size
        steps = sampling.steps_per_epoch(count, batch, self.group.world)
        if self.even:
            count = sampling.even_count(count, batch, self.group.world)
        schedule = optim.Schedule(optimizer, phase.lr, phase.epochs * steps, phase.lr.warmup_epochs * steps)
        optim.forget_within(module, steps * sum(p.epochs for p in spec.phases if p.net == phase.net))
        ema = None
        if spec.train.ema is not None:
            ema = optim.make_ema(module, spec.train.ema)
            if state.ema is not None:
                ema.module.load_state_dict(state.ema)
        task = TASKS[phase.task](self.setup)
        parts = self._parts(module, task, min(batch, count))
        run = _Run(phase, task, module, optimizer, schedule, steps, count, parts, frozen, ema)
        if self.precision.compile:
            run.compiled = True
            self._say_compiling(run)
        return run

    def _parts(self, module: nn.Module, task: Task, batch: int) -> int:
        """In how many parts the GPU's memory holds a batch; the same on all workers."""
        if self.device.type != "cuda":
            return 1

        def attempt(count: int) -> None:
            shape = (count, 3, self.augment.size, self.augment.size)
            pixels = torch.zeros(shape, dtype=torch.uint8, device=self.device)
            with self.precision.autocast():
                loss = module.train()(self.normalise(pixels)).float().square().mean()
            loss.backward()
            module.zero_grad(set_to_none=True)

        kept = {name: tensor.clone() for name, tensor in module.named_buffers()}
        parts = max(self.group.gather(fitting_parts(attempt, batch)))
        for name, tensor in module.named_buffers():
            tensor.copy_(kept[name])
        if parts > 1:
            self.send(
                "note",
                said=f"the GPU's memory does not hold a step of {batch} images: it is taken in {parts} parts "
                f"of {-(-batch // parts)}, whose gradients are added (batch norms see the parts)",
            )
        return parts

    def _run_phase(self, phase: Phase, pace: Pace) -> None:
        state = self.state
        run = self._begin(phase)
        self.send(
            "phase", name=phase.name, total=run.steps * phase.epochs, unit="steps",
            epochs=phase.epochs, done=run.steps * state.epoch + state.step,
        )  # fmt: skip
        pace.phase(state.phase, state.epoch)
        choice = health.Choice(self.spec.train.patience)
        while state.epoch < phase.epochs:
            row, judged_from = self._epoch(run, pace)
            state.epoch, state.step, state.partial = state.epoch + 1, 0, None
            state.history.append(row)
            if self.spec.train.keep == "last" or choice.better(row, state.best):
                state.best = row
                state.best_tensors = _copied(run.judged)
            self.send("epoch", row=row)
            rows = [past for past in state.history if past["phase"] == phase.name]
            early = choice.ends(rows) and state.epoch < phase.epochs
            if early or state.epoch == phase.epochs:
                self._finish(run, early)
            else:
                self._keep_running(run)
            self._save()
            pace.epoch(monotonic() - judged_from)
            if state.running is None:
                return
            self._estimate(pace)

    def _keep_running(self, run: _Run) -> None:
        state = self.state
        state.running, state.optimizer = run.module.state_dict(), run.optimizer.state_dict()
        state.ema = None if run.ema is None else run.ema.module.state_dict()

    def _finish(self, run: _Run, early: bool) -> None:
        """The phase is over: its network is that of the best epoch."""
        state = self.state
        assert state.best is not None
        assert state.best_tensors is not None
        kept, last = state.best["epoch"], state.history[-1]["epoch"]
        if early:
            self.send("note", said=f"{run.phase.name}: ends: no better epoch in {self.spec.train.patience}")
        if kept != last:
            self.send(
                "note",
                said=f"{run.phase.name}: epoch {kept} is kept (macro recall "
                f"{state.best['val_macro_recall']:.2%} on validation; the last one had "
                f"{state.history[-1]['val_macro_recall']:.2%})",
            )
        state.nets[run.phase.net] = state.best_tensors
        state.best = state.best_tensors = state.running = state.ema = state.optimizer = None
        state.phase, state.epoch = state.phase + 1, 0

    def _number(self, phase: Phase) -> int:
        """How many epochs this network has seen: what seeds its draws and views."""
        before = self.spec.phases[: self.state.phase]
        return self.state.epoch + sum(p.epochs for p in before if p.net == phase.net)

    def _epoch(self, run: _Run, pace: Pace) -> tuple[dict[str, Any], float]:
        """One epoch; returns its row of the history, and when its steps were done."""
        spec, state, phase, number = self.spec, self.state, run.phase, self._number(run.phase)
        task = run.task
        network = self._wrapped(run)
        run.module.train(run.frozen is None)
        if self.setup.answers is not None:
            self.setup.answers.teacher.assert_frozen()
        self._restore_buffers(run.module)
        draws = self.epochs.draws(
            number, spec.train.batch_size, self.group.world, self.group.rank, task.view,
            with_unlabelled=task.unlabelled, matched=phase.matched, even=self.even, skip=state.step,
        )  # fmt: skip
        before = 0.0 if state.partial is None else state.partial["loss"]
        watch = StepWatch(self.device, self.group, run.steps, state.step, before, self._need_finite)
        rate = 0.0
        self._sent = 0.0
        begun = monotonic()
        for batch in self._feed(training=True)(draws, task.extra):
            done = state.epoch * run.steps + state.step
            rate = run.schedule.set(done)
            self._step(run, network, batch, number, watch)
            state.step += 1
            if watch.due():
                mean = watch.look(pace)
                self._estimate(pace)
                self._progress(done + 1, f"epoch {state.epoch + 1}/{phase.epochs}, loss {mean:.3f}")
                if watch.stop:
                    self._leave_off(run, watch)
                if not run.compiled and self._compile_now(pace):
                    run.compiled = True
                    self._say_compiling(run)
                    network = self._wrapped(run)
        trained = monotonic()
        self._tell_speed(watch, trained - begun)
        if run.frozen is None:
            self.group.average([b for b in run.module.buffers() if b.is_floating_point()])
            if run.ema is not None:
                self.group.average([b for b in run.ema.module.buffers() if b.is_floating_point()])
        predicted, val_loss = self._predict(run.judged, "val")
        actual = np.asarray(self.index.labels[self.index.rows("val")], dtype=np.int64)
        row = {
            "epoch": number + 1,
            "phase": phase.name,
            "lr": rate,
            "train_loss": watch.total / run.count,
            "val_loss": val_loss,
            "val_top1": float((predicted == actual).mean()),
            "val_macro_recall": metrics.macro_recall(actual, predicted),
        }
        finite = all(bool(torch.isfinite(p).all()) for p in run.module.parameters())
        self._need_finite(val_loss if finite else math.nan, run.steps)
        self._need_progress(run, row, actual)
        return row, trained

    def _wrapped(self, run: _Run) -> nn.Module:
        """The network as it is called; a compiled one stays as it is.

        Others are wrapped anew in each epoch: gradients are then bucketed as in a run that was resumed.
        """
        if run.network is not None:
            return run.network
        network = run.module
        if self.group.world > 1:
            network = DistributedDataParallel(
                network, forward_sync_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=BUCKET_MB
            )
        if run.compiled:
            network = run.network = compiled(network)
        return network

    def _compile_now(self, pace: Pace) -> bool:
        """Whether compilation would pay by now; asked at every look, of all workers."""
        if self.precision.compile is not None:
            return False
        return self.group.agree(pace.known and self.precision.pays(pace.left()))

    def _say_compiling(self, run: _Run) -> None:
        self.send("note", said=f"{run.phase.name}: compiling the network: a minute or two")

    def _step(self, run: _Run, network: nn.Module, batch: Batch, number: int, watch: StepWatch) -> None:
        """Forward, backward, update. On a GPU nothing here waits for it."""
        spec, group, state = self.spec, self.group, self.state
        count, everyone = len(batch.draw.rows), batch.draw.total
        key = spec.seed, state.phase, number, state.step, group.rank
        torch.manual_seed(_mixed(*key))  # dropout: the same after a restart
        run.optimizer.zero_grad(set_to_none=True)
        parts: list[Tensor] = []
        cuts = [count * part // run.parts for part in range(run.parts + 1)]
        for part, (first, last) in enumerate(pairwise(cuts)):
            final = part == run.parts - 1
            waits = nullcontext() if final or group.world == 1 else network.no_sync()  # type: ignore[operator]
            piece = batch if run.parts == 1 else _cut(batch, first, last)
            mix = augmentation.mix(
                self.recipe, spec.seed, number, state.step * run.parts + part, group.rank,
                last - first, self.augment.size,
            )  # fmt: skip
            if mix is not None:
                piece = replace(piece, pixels=mix.pixels(piece.pixels))
            with waits:
                with self.precision.autocast():
                    learnt = run.task(network, self.normalise(piece.pixels), piece, mix)
                loss = learnt.loss.float() * (last - first)
                parts.append(loss.detach())
                if final:  # summed while gradients are computed: workers wait for one another once a step
                    watch.begin(parts, everyone, self.context.stop_requested())
                # DDP averages over workers: weighed by their rows, so that it is the mean over the batch
                (loss * (group.world / everyone)).backward()
        watch.end()
        if spec.optimizer.clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(run.module.parameters(), spec.optimizer.clip_norm)
            watch.guard(norm)
        watch.update(run.optimizer)
        if run.frozen is not None:
            run.frozen.keep()
        if run.ema is not None:
            run.ema.update(run.module, step=state.epoch * run.steps + state.step + 1)
        watch.waited += batch.waited
        watch.images += count

    def _tell_speed(self, watch: StepWatch, seconds: float) -> None:
        waited, images = watch.waited, watch.images * self.group.world
        self.send(
            "speed", images_per_second=images / max(seconds, 1e-9), waiting=waited / max(seconds, 1e-9),
            seconds=seconds, remedy=self._feed(training=True).remedy,
        )  # fmt: skip

    def _leave_off(self, run: _Run, watch: StepWatch) -> None:
        """Save what is there in mid-epoch, and end."""
        buffers = [buffer.detach().cpu() for buffer in run.module.buffers()]
        self.state.partial = {"loss": watch.total, "buffers": self.group.gather(buffers)}
        self._keep_running(run)
        self._save()
        self.send("left_off", phase=run.phase.name, epoch=self.state.epoch + 1, step=self.state.step)
        raise LeftOff

    def _restore_buffers(self, module: nn.Module) -> None:
        """Running statistics of an epoch that was left off are each worker's own."""
        partial = self.state.partial
        if partial is None or len(partial["buffers"]) != self.group.world:
            return
        for buffer, saved in zip(module.buffers(), partial["buffers"][self.group.rank], strict=True):
            buffer.copy_(saved)

    def _predict(self, module: nn.Module, split: str) -> tuple[np.ndarray, float]:
        """Predicted classes int64 and mean cross-entropy over a whole split: every row once, on all ranks."""
        rows = np.asarray(self.index.rows(split), dtype=np.int64)
        mine = rows[self.group.rank :: self.group.world]
        size = self.spec.valid.batch_size
        module.eval()
        classes: list[Tensor] = []
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in self._feed(training=False)(sampling.in_order(mine, size, PLAIN), self._labels):
            with torch.no_grad(), self.precision.autocast():
                logits = module(self.normalise(batch.pixels)).float()
            labels = batch.extra["labels"]
            loss += nn.functional.cross_entropy(logits, labels, reduction="sum")
            classes.append(logits.argmax(1))
        own = torch.cat(classes).cpu().numpy() if classes else np.empty(0, dtype=np.int64)
        gathered = self.group.gather((own, float(loss)))
        predicted = np.empty(len(rows), dtype=np.int64)
        for rank, (part, _) in enumerate(gathered):
            predicted[rank :: self.group.world] = part
        return predicted, sum(loss for _, loss in gathered) / max(1, len(rows))

    def _labels(self, draw: Draw) -> dict[str, np.ndarray]:
        return {"labels": self.index.labels[draw.rows].astype(np.int64)}

    # --- what is said -------------------------------------------------------------------------------------

    def _need_progress(self, run: _Run, row: dict[str, Any], actual: np.ndarray) -> None:
        rows = [*(past for past in self.state.history if past["phase"] == run.phase.name), row]
        if self.spec.patient or not health.learns_nothing(rows, run.phase.epochs, run.steps, actual):
            return
        stop = health.flat(run.phase.name, rows, run.steps, self._kept())
        if not self.spec.waived:
            raise stop
        self.send("stopped", **stop.told)  # a person wants it trained to its end all the same

    def _need_finite(self, loss: float, step: int) -> None:
        phase = self.spec.phases[self.state.phase]
        health.need_finite(loss, phase.name, self.state.epoch + 1, step, self._kept())

    def _kept(self) -> str:
        finished = len(self.state.history)
        return f"the checkpoint of epoch {finished} is kept" if finished else "no epoch was finished"

    def _progress(self, done: int, note: str = "") -> None:
        if self.context.rank == 0 and monotonic() - self._sent > SEND_SECONDS:
            self._sent = monotonic()
            self.context.send("progress", done=done, note=note)


def _copied(module: nn.Module) -> Tensors:
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


def _cut(batch: Batch, first: int, last: int) -> Batch:
    """Some of a batch's images."""
    draw = Draw(batch.draw.rows[first:last], batch.draw.views[first:last], batch.draw.total)
    extra = {name: tensor[first:last] for name, tensor in batch.extra.items()}
    return Batch(draw, batch.pixels[first:last], extra, batch.waited)


def _mixed(*key: int) -> int:
    """One number of several, for torch's generator."""
    return int(sampling.generator(sampling.NOISE, *key).integers(2**62))

"""The training loop: one loop over phases and epochs, run by every worker. It knows no Ray."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

from components.common.progress import counted
from components.models import build, checkpoint
from components.models.params import Arch
from components.training import health, losses, metrics, sampling
from components.training.context import Context
from components.training.group import Group
from components.training.inputs.feed import Batch, Feed
from components.training.inputs.index import open_index
from components.training.judge import Answers, Interrupted, predict
from components.training.labeller import ask_teacher
from components.training.learner import Learner, Tools
from components.training.normalise import Normalise
from components.training.pace import Pace, Part
from components.training.precision import Precision
from components.training.reporter import Reporter
from components.training.sampling import Draw
from components.training.spec import Phase, TrainSpec
from components.training.state import State, Tensors
from components.training.supply import Supply
from components.training.tasks import task_of
from components.training.tasks.base import Setup, Task
from components.training.watch import StepWatch, Sums

JUDGED_ROWS = 2000  # of the training images, as they are: what a network makes of what it has learnt from

FEW_BAD = 0.25  # of a batch: more images without a number have the network in common


def train(context: Context, spec: TrainSpec) -> None:
    """What each worker runs: images are indexed and decoded first, each node at its own pace."""
    trainer = Trainer(context, spec)
    with context.group():
        trainer.run()


def create_network(
    arch: Arch, class_num: int, start: Path | None, seed: int, full_checkpoint: bool = False
) -> nn.Module:
    """The network before training: backbone (``full_checkpoint``: everything) from a file, the rest random.

    Args:
        start: a safetensors file; None: all of it is random.
    """
    from components.weights.load import load_backbone

    if full_checkpoint:
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


class Trainer:
    """One of the workers: it holds its copy of the network and takes its share of every batch."""

    def __init__(self, context: Context, spec: TrainSpec) -> None:
        self.context, self.spec = context, spec
        # without a shared disk each node has a state folder of its own, and one worker that looks after it
        context.at("reading the data; decoding images, or waiting for a worker that does")
        leads = (context.rank if context.exchange is None else context.local_rank) == 0
        self.group = Group(context.rank, context.world, leads)
        self.precision = Precision.of(spec.train, context.device)
        self.precision.prepare(spec.threads)
        self.index = open_index(spec.manifest)
        self.labelled = sampling.training_rows(self.index, spec.plan)
        sampling.need_rows(len(self.labelled), context.world)
        self.reporter = Reporter(context)
        self.supply = Supply(spec, self.index, context.device, self.reporter.note, self._decoded)
        self.normalise = Normalise(*build.preprocessing(spec.arch), context.device)
        self.state = State()
        self._saved = monotonic()  # when the last checkpoint was
        self._every: int | None = None  # steps between two looks at a GPU
        self._learner: Learner | None = None  # of the phase
        self._batch: Batch | None = None  # of the step
        self._pulse: health.Pulse | None = None  # of the phase
        self._shares = np.ones(1)  # of the classes, among what is drawn

    def run(self) -> None:
        """All phases from where the job stands, then the networks' answers on validation and test."""
        self._restore()
        state = self.state
        with self.supply:
            try:
                if not state.predictions:
                    self._run_phases()
                    for net in state.nets:
                        self._ask(net)
            except health.Stop as stop:
                self.reporter.send("stopped", **stop.told)
                return
            except (LeftOff, Interrupted):
                return
            self._save()

    def _ask(self, net: str) -> None:
        """What a network that is done says of validation and test, and of some of what it has learnt from."""
        state, module = self.state, self._network(net)
        rows = sampling.some(self.labelled, JUDGED_ROWS, self.spec.seed)
        feed = self.supply.judge(state.sizes[net])
        val, test = (self._answers(module, self.index.rows(split), feed) for split in ("val", "test"))
        learnt = self._answers(module, rows, self.supply.learnt(state.sizes[net]))
        classes = {"val": val.classes, "test": test.classes}
        state.predictions[net] = {split: torch.from_numpy(said) for split, said in classes.items()}
        asked = {"val_sure": val.sure, "rows": rows, "classes": learnt.classes, "sure": learnt.sure}
        state.asked[net] = {name: torch.from_numpy(values) for name, values in asked.items()}

    # --- what the job works with --------------------------------------------------------------------------

    def _decoded(self, done: int, of: int) -> None:
        self.context.at(f"decoding images, {done:,} of {of:,}")

    def _network(self, net: str) -> nn.Module:
        """The network as it stands: all of a job start alike, but for those of other streams."""
        spec = self.spec
        stream = next(phase.stream for phase in spec.phases if phase.net == net)
        module = create_network(
            spec.arch, len(spec.class_names), spec.start, spec.seed + stream, spec.full_checkpoint
        )
        if net in self.state.nets:
            module.load_state_dict(self.state.nets[net])
        return module.to(self.precision.device).to(memory_format=torch.channels_last)

    def _predict(self, module: nn.Module, split: str, size: int) -> tuple[np.ndarray, float]:
        """Predicted classes int64 [n] of a split, and mean cross-entropy in nats."""
        said = self._answers(module, self.index.rows(split), self.supply.judge(size))
        return said.classes, said.loss

    def _answers(self, module: nn.Module, rows: np.ndarray, feed: Feed) -> Answers:
        rows, batch = np.asarray(rows, dtype=np.int64), self.spec.valid.batch_size
        self._judged = 0

        def wish() -> bool:
            self._judged += 1
            self.context.at(f"judging {len(rows):,} images, part {self._judged}")
            return self.context.stop_requested()

        return predict(
            module, self.index, rows, feed, batch, self.normalise, self.precision, self.group, wish
        )

    # --- checkpoints --------------------------------------------------------------------------------------

    def _restore(self) -> None:
        saved = self.context.load_checkpoint()
        if saved is None:
            self.reporter.send("started")
            return
        self.state = state = State(**saved)
        if state.partial is not None:  # steps of another number of workers hold other numbers of rows
            state.step = state.step * len(state.partial["buffers"]) // self.group.world
        self.reporter.send("resumed", phase=state.phase, epoch=state.epoch)
        for row in state.history:
            self.reporter.send("epoch", row=row)

    def _save(self) -> None:
        """Every worker calls it; rank 0's state is everyone's. Returns when the checkpoint is safe."""
        self.context.at("keeping a checkpoint")
        self.context.save_checkpoint(self.state.to_dict() if self.context.rank == 0 else None)
        self._saved = monotonic()

    def _save_partly(self, learner: Learner, watch: StepWatch) -> None:
        """Save in mid-epoch."""
        buffers = [buffer.detach().cpu() for buffer in learner.buffers]
        self.state.partial = {"sums": asdict(watch.total), "buffers": self.group.gather(buffers)}
        self.state.learner = learner.state_dict()
        self._save()

    def _wishes(self) -> tuple[bool, bool]:
        """Whether this worker was asked to stop, and whether it wants a checkpoint in mid-epoch."""
        due = monotonic() - self._saved > 60 * self.spec.train.checkpoint_minutes
        return self.context.stop_requested(), due and self.context.rank == 0

    # --- phases and epochs --------------------------------------------------------------------------------

    def _run_phases(self) -> None:
        spec, state = self.spec, self.state
        answers, unlabelled = None, np.empty(0, dtype=np.int64)
        if spec.teacher is not None:
            asks = next((phase for phase in spec.phases if task_of(phase.task).unlabelled), spec.phases[0])
            self.context.at("the teacher's soft labels")
            answers, unlabelled = ask_teacher(
                spec, self.index, self.labelled, self.supply.augment(asks), self.supply.learn(asks),
                self.precision, self.group, self.context.exchange, self.reporter,
                self.supply.judge(spec.size_of(asks))
                if spec.learn_size(asks) == spec.size_of(asks)
                else None,
            )  # fmt: skip
            state.chosen = len(unlabelled)
        weights = sampling.Weights(self.index, self.labelled, spec.plan)
        self.reporter.forget_promise()
        every = [
            sampling.Epochs(
                self.index, self.labelled, weights, unlabelled, spec.seed, spec.recipe(phase).repeats
            )
            for phase in spec.phases
        ]
        pace = self._pace(every[0])
        while state.phase < len(spec.phases):
            phase = spec.phases[state.phase]
            criterion = self._criterion(phase)
            setup = Setup(self.index.labels, criterion, answers, self.precision.device, spec.distill)
            self._shares = weights.shares(self.labelled)
            self._run_phase(phase, setup, every[state.phase], pace)

    def _criterion(self, phase: Phase) -> losses.Loss:
        """The labels' loss, as the plan and the phase's recipe have it."""
        spec = self.spec
        smoothing = spec.recipe(phase).label_smoothing
        found = losses.from_plan(spec.plan, len(spec.class_names), smoothing)
        return found.to(self.precision.device)

    def _pace(self, epochs: sampling.Epochs) -> Pace:
        """What this worker has before it."""
        parts = []
        for phase in self.spec.phases:
            count = epochs.count(task_of(phase.task).unlabelled, phase.match_budget)
            steps = sampling.steps_per_epoch(count, self.spec.train.batch_size, self.group.world)
            learnt, judged = self.spec.costs(phase)
            parts.append(Part(phase.epochs, steps, learnt * count / steps / self.group.world, judged))
        val, test = (len(self.index.rows(split)) / self.group.world for split in ("val", "test"))
        return Pace(parts, val, sum(self.spec.judging_costs().values()) * (val + test))

    def _estimate(self, pace: Pace) -> None:
        """Tell how long all of it will take, at first and whenever that was wrong."""
        if pace.known:
            to_come = self.spec.phases[self.state.phase :]
            epochs = sum(phase.epochs for phase in to_come) - self.state.epoch
            names = ", ".join(phase.name for phase in to_come)
            self.reporter.promise(pace.left(), f"{names}: {counted(epochs, 'epoch')} and their validation")

    def _run_phase(self, phase: Phase, setup: Setup, epochs: sampling.Epochs, pace: Pace) -> None:
        spec, state = self.spec, self.state
        count = epochs.count(task_of(phase.task).unlabelled, phase.match_budget)
        steps = sampling.steps_per_epoch(count, spec.train.batch_size, self.group.world)
        of_net = steps * sum(other.epochs for other in spec.phases if other.net == phase.net)
        tools = Tools(spec, self.group, self.precision, self.supply.augment(phase), self.normalise)
        learner = Learner(
            tools, phase, state.phase, self._network(phase.net), setup, steps * phase.epochs, of_net
        )
        if learner.initial != phase.lr.initial:
            self.reporter.note(
                f"{phase.name}: the learning rate {phase.lr.initial:g} becomes {learner.initial:.3g}: the "
                f"gradient of {phase.task} is {phase.lr.initial / learner.initial:.2g} of cross-entropy's, "
                "which rates are for, and sgd's steps follow it"
            )
        self._fit_memory(learner, min(spec.train.batch_size, count))
        if state.learner is not None:
            learner.load_state_dict(state.learner)
        if self.precision.compile:
            self._compile(learner)
        state.step = min(state.step, steps)
        self.reporter.begin(
            phase.name, steps * phase.epochs, "steps",
            epochs=phase.epochs, done=steps * state.epoch + state.step,
        )  # fmt: skip
        pace.phase(state.phase, state.epoch)
        self._learner, self._pulse = learner, self._watched(phase, learner, steps)
        choice = health.Choice(spec.train.patience)
        while state.epoch < phase.epochs:
            row, judged_from = self._epoch(learner, epochs, steps, pace)
            state.epoch, state.step, state.partial = state.epoch + 1, 0, None
            state.history.append(row)
            if spec.train.keep == "last" or choice.better(row, state.best):
                state.best = row
                state.best_tensors = _copied(learner.judged)
            self.reporter.send("epoch", row=row)
            rows = [past for past in state.history if past["phase"] == phase.name]
            early = choice.ends(rows) and state.epoch < phase.epochs
            if early or state.astray or state.epoch == phase.epochs:
                self._finish(phase, early)
            else:
                state.learner = learner.state_dict()
            self._save()
            pace.epoch(monotonic() - judged_from)
            if state.learner is None:
                return
            self._estimate(pace)

    def _fit_memory(self, learner: Learner, batch: int) -> None:
        """Take batches in parts, if a GPU's memory does not hold them."""
        if self.precision.device.type == "cpu":
            return
        self.supply.learn(learner.phase)  # images that lie on the card have taken their place by then
        rows = np.resize(self.labelled, batch).astype(np.int64)
        view = learner.task.view(0, np.zeros(batch, dtype=np.int64))
        parts = learner.fit_memory(Draw(rows, view, batch))
        if parts > 1:
            self.reporter.note(
                f"the GPU's memory does not hold a step of {batch} images: it is taken in {parts} parts of "
                f"{-(-batch // parts)}, whose gradients are added (batch norms see the parts)"
            )

    def _finish(self, phase: Phase, early: bool) -> None:
        """The phase is over: its network is that of the best epoch, which may be one of an earlier phase."""
        state = self.state
        assert state.best is not None
        assert state.best_tensors is not None
        kept, last = state.best, state.history[-1]
        if early:
            self.reporter.note(f"{phase.name}: ends: no better epoch in {self.spec.train.patience}")
        if kept["epoch"] != last["epoch"]:
            self.reporter.note(
                f"{phase.name}: epoch {kept['epoch']} is kept (macro recall on validation "
                f"{kept['val_macro_recall']:.2%}; the last one had {last['val_macro_recall']:.2%})"
            )
        earlier = state.scores.get(phase.net)
        last_one = self.spec.train.keep == "last" and not state.astray
        if last_one or health.Choice.better(kept, earlier):
            state.nets[phase.net], state.scores[phase.net] = state.best_tensors, kept
            state.sizes[phase.net] = self.spec.size_of(phase)
        else:
            assert earlier is not None
            self.reporter.note(
                f"{phase.name}: no epoch is better than the network was before (macro recall on validation "
                f"{earlier['val_macro_recall']:.2%}): it stays as it was"
            )
        state.best = state.best_tensors = state.learner = None
        state.astray = False
        state.phase, state.epoch = state.phase + 1, 0

    def _number(self, phase: Phase) -> int:
        """How many epochs this network has seen: what seeds its draws and views."""
        before = self.spec.phases[: self.state.phase]
        return self.state.epoch + sum(p.epochs for p in before if p.net == phase.net)

    def _epoch(
        self, learner: Learner, epochs: sampling.Epochs, steps: int, pace: Pace
    ) -> tuple[dict[str, Any], float]:
        """One epoch; returns its row of the history, and when its steps were done."""
        spec, state, phase, task = self.spec, self.state, learner.phase, learner.task
        number, feed, batch_size = self._number(phase), self.supply.learn(phase), spec.train.batch_size
        drawn = number + phase.stream * sampling.STREAM
        self._need_teacher(task, phase)
        if task.setup.answers is not None and task.unlabelled:
            task.setup.answers.recheck(feed, number)
        learner.begin_epoch()
        self._restore_buffers(learner)
        # a network that may be compiled sees one size of batch
        even = 0 if self.precision.compile is False else learner.parts
        draws = epochs.draws(
            drawn, batch_size, self.group.world, self.group.rank, task.view,
            with_unlabelled=task.unlabelled, match_budget=phase.match_budget, even=even, skip=state.step,
        )  # fmt: skip
        before = Sums() if state.partial is None else Sums(**state.partial["sums"])
        watch = StepWatch(
            self.precision.device, self.group, steps, state.step, before, self._need_finite, self._wishes,
            self._every,
        )  # fmt: skip
        rate = learner.rate(state.epoch * steps + state.step - 1)
        begun = monotonic()
        self._at_step(phase, steps, "images", pace)
        for batch in feed(task.shown(draws), learner.extra):
            done = state.epoch * steps + state.step
            rate = learner.rate(done)
            self._batch = batch
            self._at_step(phase, steps, "results", pace)
            learner.step(batch, drawn, state.step, done, watch)
            state.step += 1
            if watch.due():
                self._look(learner, watch, pace, done + 1)
            self._at_step(phase, steps, "images", pace)
        self._every = watch.every
        trained = monotonic()
        self._tell_speed(feed, watch, trained - begun)
        own = [buffer.detach().clone() for buffer in learner.buffers]
        if learner.frozen is None:
            self.group.average([buffer for buffer in learner.buffers if buffer.is_floating_point()])
        try:
            predicted, val_loss = self._predict(learner.judged, "val", spec.size_of(phase))
        except Interrupted:  # its steps are done, and it is judged when the run goes on
            self._leave_off(learner, watch, own)
        actual = np.asarray(self.index.labels[self.index.rows("val")], dtype=np.int64)
        count = epochs.count(task.unlabelled, phase.match_budget)
        if even:
            count = sampling.even_count(count, batch_size, self.group.world, even)
        row = {
            "epoch": number + 1,
            "phase": phase.name,
            "lr": rate,
            "train_loss": watch.total.loss / count,
            "train_top1": watch.total.right / max(1.0, watch.total.told),
            "val_loss": val_loss,
            "val_top1": float((predicted == actual).mean()),
            "val_macro_recall": metrics.macro_recall(actual, predicted),
        }
        finite = all(bool(torch.isfinite(p).all()) for p in learner.module.parameters())
        self._need_finite(val_loss if finite else math.nan, steps)
        self._need_teacher(task, phase)
        self._need_progress(phase, row, steps, actual)
        return row, trained

    def _look(self, learner: Learner, watch: StepWatch, pace: Pace, done: int) -> None:
        """What has come of the steps so far; what is to be done about it, on all workers alike."""
        state, phase = self.state, learner.phase
        mean = watch.look(pace)
        self._estimate(pace)
        self.reporter.progress(done, f"epoch {state.epoch + 1}/{phase.epochs}, loss {mean:.3f}")
        if self._pulse is not None and (what := self._pulse(watch.looked, watch.lately)) is not None:
            self._stop(
                health.astray(phase.name, state.epoch + 1, what, self._setting(phase), self._kept()), phase
            )
        if watch.stop:
            self._leave_off(learner, watch)
        if watch.save:
            self._save_partly(learner, watch)
        undecided = self.precision.compile is None and not learner.compiled
        if undecided and self.group.agree(pace.known and self.precision.pays(pace.left())):
            self._compile(learner)

    def _leave_off(
        self, learner: Learner, watch: StepWatch, buffers: list[torch.Tensor] | None = None
    ) -> NoReturn:
        """Save in mid-epoch, and end; ``buffers``: as they were, where they have been averaged since."""
        state = self.state
        for buffer, value in zip(learner.buffers, buffers or [], strict=buffers is not None):
            buffer.copy_(value)
        self._save_partly(learner, watch)
        self.reporter.send("left_off", phase=learner.phase.name, epoch=state.epoch + 1, step=state.step)
        raise LeftOff

    def _compile(self, learner: Learner) -> None:
        self.reporter.note(f"{learner.phase.name}: compiling the network: a minute or two")
        learner.compile()

    def _at_step(self, phase: Phase, steps: int, awaited: str, pace: Pace) -> None:
        """Where this worker is, for those that look for one that stalls."""
        state, usual = self.state, pace.step_seconds
        told = f"{phase.name}, epoch {state.epoch + 1}, step {min(state.step + 1, steps)}: {awaited}"
        self.context.at(told, usual if state.step > 1 else None)  # an epoch's first ones wait for the loader

    def _restore_buffers(self, learner: Learner) -> None:
        """Running statistics of an epoch that was left off are each worker's own."""
        partial = self.state.partial
        if partial is None or len(partial["buffers"]) != self.group.world:
            return
        for buffer, saved in zip(learner.buffers, partial["buffers"][self.group.rank], strict=True):
            buffer.copy_(saved)

    # --- what is said -------------------------------------------------------------------------------------

    def _tell_speed(self, feed: Feed, watch: StepWatch, seconds: float) -> None:
        waited, images = watch.waited, watch.images * self.group.world
        self.reporter.send(
            "speed", images_per_second=images / max(seconds, 1e-9), waiting=waited / max(seconds, 1e-9),
            seconds=seconds, remedy=feed.remedy,
        )  # fmt: skip

    def _need_progress(self, phase: Phase, row: dict[str, Any], steps: int, actual: np.ndarray) -> None:
        rows = [*(past for past in self.state.history if past["phase"] == phase.name), row]
        if self.spec.allow_flat_loss or self.state.astray:
            return
        setting, kept = self._setting(phase), self._kept()
        slowly = self._pulse is not None and self._pulse.learns
        if not slowly and health.learns_nothing(rows, phase.epochs, steps, actual):
            self._stop(health.flat(phase.name, rows, steps, setting, kept), phase)
        elif (
            self._pulse is not None
            and len(rows) == 1
            and (what := self._pulse.stuck(row, actual)) is not None
        ):
            self._stop(health.astray(phase.name, self.state.epoch + 1, what, setting, kept), phase)

    def _stop(self, stop: health.Stop, phase: Phase) -> None:
        """End the job, unless a person wants it trained to its end all the same.

        A network that was good before this phase stays as it was then: the phase alone ends, with its epoch.
        """
        earlier = self.state.scores.get(phase.net)
        labels = np.asarray(self.index.labels[self.index.rows("val")], dtype=np.int64)
        good = earlier is not None and not health.looks_flat(earlier["val_loss"], earlier, labels)
        if not self.spec.waived and not good:
            raise stop
        self._pulse = None  # it was said
        if self.spec.waived:
            self.reporter.send("stopped", **stop.told)
            return
        self.state.astray = True
        self.reporter.note(f"{stop} The phase ends with this epoch. {stop.told['advice']}")

    def _need_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            phase = self.spec.phases[self.state.phase]
            health.need_finite(
                loss,
                phase.name,
                self.state.epoch + 1,
                step,
                self._kept(),
                self._setting(phase),
                self._where(),
            )

    def _where(self) -> str:
        """What was no number before any step was taken, or what few images of a batch make so; or nothing."""
        learner, batch, state = self._learner, self._batch, self.state
        if learner is None or batch is None:
            return ""
        if state.epoch == state.step == 0:
            for name, tensor in learner.module.named_parameters():
                if not torch.isfinite(tensor).all():
                    return f"{name} holds values that are no numbers, from before the first step on"
        if self.precision.device.type != "cpu":
            return ""  # other batches have followed by now
        bad = self.group.gather(learner.not_finite(batch))
        named = [self.index.path(row) for rows in bad for row in rows]
        few = 0 < len(named) <= FEW_BAD * batch.draw.total
        return f"what is said of {named[0]}, alone, is no number" if few else ""

    def _need_teacher(self, task: Task, phase: Phase) -> None:
        """Raise where the teacher is not what it was when it was opened."""
        if task.setup.answers is not None and (what := task.setup.answers.teacher.changed()):
            raise health.teacher_changed(what, phase.name, self.state.epoch + 1, self._kept())

    def _setting(self, phase: Phase) -> health.Setting:
        spec, distill = self.spec, self.spec.distill
        optimizer, images = spec.optimizer_of(phase), spec.train.batch_size * self.group.world
        usual = health.usual_rate(optimizer.name, images)
        if distill is not None and distill.reference_lr and distill.reference_batch:
            used = distill.reference_optimizer or spec.optimizer.name
            if used == optimizer.name:  # the rate of another says nothing of this one's
                usual = distill.reference_lr * images / distill.reference_batch
        return health.Setting(
            who=spec.who,
            optimizer=optimizer.name,
            rate=phase.lr.initial,
            usual=usual,
            images=images,
            warmup=phase.lr.warmup_epochs,
            clip=optimizer.clip_norm,
            loaded=spec.start is not None,
            half=self.precision.bf16,
            augment=phase.augment or spec.train.augment,
        )

    def _watched(self, phase: Phase, learner: Learner, steps: int) -> health.Pulse | None:
        """What looks for a network that goes astray; None: a loss that stays flat is a result."""
        if self.spec.allow_flat_loss or self.state.astray:
            return None
        criterion = learner.task.setup.criterion if phase.task == "labels" else None
        before = self.state.epoch * steps + self.state.step
        warmup = max(0.0, phase.lr.warmup_epochs * steps - before)
        return health.Pulse(health.guessing(criterion, self._shares), self._setting(phase).ratio, warmup)

    def _kept(self) -> str:
        finished = len(self.state.history)
        return f"the checkpoint of epoch {finished} is kept" if finished else "no epoch was finished"


def _copied(module: nn.Module) -> Tensors:
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}

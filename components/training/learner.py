"""A network in one phase of its training: task, optimizer, schedule, average; a step, and its state."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from components.common.errors import RetortError
from components.training import augmentation, optim, sampling
from components.training.augmentation import Augment
from components.training.class_expansion import NewRows
from components.training.group import Group
from components.training.inputs.feed import Batch
from components.training.mixing import Brought
from components.training.normalise import Normalise
from components.training.precision import Precision, fitting_parts
from components.training.sampling import Draw
from components.training.spec import Phase, TrainSpec
from components.training.tasks import task_of
from components.training.tasks.base import Setup
from components.training.watch import StepWatch

if TYPE_CHECKING:
    from components.training.augmentation import Mix

# gradients summed at once: in one bucket, a small network's would wait for its whole backward; cards are
# joined by faster wires, which larger buckets use better
BUCKET_MB = {"cpu": 8, "cuda": 25}
SPARE = 0.05  # of a GPU's memory, left when it is tried whether a batch fits


@dataclass(frozen=True)
class Tools:
    """What a phase finds on one worker."""

    spec: TrainSpec
    group: Group
    precision: Precision
    augment: Augment
    normalise: Normalise


class Learner:
    """One phase's network and all that changes with it.

    Args:
        place: of the phase among the job's.
        module: the network as the phase finds it, on its device.
        phase_steps: of the whole phase.
        net_steps: of all phases of this network.
    """

    def __init__(
        self,
        tools: Tools,
        phase: Phase,
        place: int,
        module: nn.Module,
        setup: Setup,
        phase_steps: int,
        net_steps: int,
    ) -> None:
        spec = tools.spec
        self._tools, self.phase, self._place, self.module = tools, phase, place, module
        self.task = task_of(phase.task)(setup, module)
        self.task.to(tools.precision.device)
        self.frozen = None if phase.new_rows is None else NewRows(module, phase.new_rows)
        lr, settings = optim.fitted(
            phase.lr, spec.optimizer_of(phase), phase.task, len(spec.class_names), spec.distill
        )
        self.initial, self._settings = lr.initial, settings
        self._optimizer = optim.make_optimizer(module, settings)
        own = [p for name, p in self.task.named_parameters() if not name.startswith("network.")]
        if own:
            self._optimizer.add_param_group({"params": own, "weight_decay": settings.weight_decay})
        steps = phase_steps / phase.epochs
        self._schedule = optim.Schedule(self._optimizer, lr, phase_steps, lr.warmup_epochs * steps)
        # what batch norms know of images of another size is of no use
        optim.limit_norm_memory(module, net_steps if phase.size is None else phase_steps)
        self._ema = None if spec.train.ema is None else optim.make_ema(module, spec.train.ema)
        self._called: nn.Module = self.task
        self.parts = 1  # in which a batch is computed
        self.compiled = False

    @property
    def judged(self) -> nn.Module:
        """The network that is validated and kept."""
        return self.module if self._ema is None else self._ema.module

    @property
    def buffers(self) -> list[Tensor]:
        """Running statistics, of the average too: each worker's own until the epoch's end."""
        modules = [self.module] if self._ema is None else [self.module, self._ema.module]
        return [buffer for module in modules for buffer in module.buffers()]

    def state_dict(self) -> dict[str, Any]:
        """All that another worker needs to go on from here."""
        ema = None if self._ema is None else self._ema.module.state_dict()
        return {"task": self.task.state_dict(), "ema": ema, "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.task.load_state_dict(state["task"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._ema is not None:
            self._ema.module.load_state_dict(state["ema"])

    def rate(self, step: int) -> float:
        """Set the learning rate of a step of the phase; returns it."""
        return self._schedule.set(max(0, step))

    def begin_epoch(self) -> None:
        """Gradients are bucketed anew in each epoch: then they are, as in a run that was resumed."""
        if self._tools.group.world > 1:
            self._called = DistributedDataParallel(
                self.task,
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
                bucket_cap_mb=BUCKET_MB[self._tools.precision.device.type],
                init_sync=False,  # all have the same values, and statistics of their own
            )
        self.task.train(self.frozen is None)

    def extra(self, draw: Draw) -> dict[str, np.ndarray]:
        """What travels with a step's pixels: what the task wants, and the labels by which it is watched."""
        labels = {"labels": self.task.setup.labels[draw.rows].astype(np.int64)}
        return labels | self.task.extra(draw)  # noqa: S610 - no Django

    def compile(self) -> None:
        """From the next step on; inside what sums gradients, so that the network stays one graph."""
        self.compiled = True
        self.module.compile()

    def step(self, batch: Batch, number: int, step: int, done: int, watch: StepWatch) -> None:
        """Forward, backward, update. On a GPU nothing here waits for it.

        Args:
            number: of the epoch, over all phases of the network.
            step, done: of the epoch, and of the phase; counted from 0.

        Raises:
            RetortError: a GPU's memory is too small.
        """
        try:
            self._step(batch, number, step, watch)
        except torch.OutOfMemoryError:
            raise RetortError(
                f"{self.phase.name}: the GPU's memory is too small for {len(batch.draw.rows)} images a step, "
                f"in {self.parts} parts, although it was enough when it was tried: something else may run on "
                "that GPU; else lower train.batch_size or global.image_size"
            ) from None
        if self._ema is not None:
            self._ema.update(self.module, step=done + 1)

    def _step(self, batch: Batch, number: int, step: int, watch: StepWatch) -> None:
        tools, group = self._tools, self._tools.group
        spec, count, everyone = tools.spec, len(batch.draw.rows), batch.draw.total
        torch.manual_seed(_mixed(spec.seed, self._place, number, step, group.rank))  # dropout
        self._optimizer.zero_grad(set_to_none=True)
        sums: list[tuple[Tensor, Tensor, Tensor]] = []
        cuts = [count * part // self.parts for part in range(self.parts + 1)]
        for part, (first, last) in enumerate(pairwise(cuts)):
            final = part == self.parts - 1
            waits = nullcontext() if final or group.world == 1 else self._called.no_sync()  # type: ignore[operator]
            piece = batch if self.parts == 1 else _cut(batch, first, last)
            mix: augmentation.Mix | None = None
            if batch.draw.mixture is not None:
                mix = Brought(piece.extra["share"], piece.extra["partners"])
            else:
                mix = augmentation.mix(
                    tools.augment.recipe, spec.seed, number, step * self.parts + part, group.rank,
                    last - first, tools.augment.size,
                )  # fmt: skip
                if mix is not None:
                    piece = replace(piece, pixels=mix.pixels(piece.pixels))
            with waits:
                with tools.precision.autocast():
                    learnt = self._called(tools.normalise(piece.pixels), piece, mix)
                loss = learnt.loss.float() * (last - first)
                sums.append((loss.detach(), *_recognised(learnt.logits, piece, mix)))
                if final:  # summed while gradients are computed: workers wait for one another once a step
                    watch.begin(sums, everyone)
                # DDP averages over workers: weighed by their rows, so that it is the mean over the batch
                (loss * (group.world / everyone)).backward()
        watch.end()
        if self._settings.clip_norm is not None:
            watch.guard(nn.utils.clip_grad_norm_(self.task.parameters(), self._settings.clip_norm))
        watch.update(self._optimizer)
        if self.frozen is not None:
            self.frozen.keep()
        watch.waited += batch.waited
        watch.images += count

    def not_finite(self, batch: Batch) -> list[int]:
        """Rows of the images of a batch whose own loss is no number, each asked about by itself.

        Twice in one batch, so that batch norms learn of it alone; their statistics may be spoiled already.
        """
        found = []
        self.task.train()
        with torch.no_grad():
            for place, row in enumerate(batch.draw.rows):
                twice = torch.tensor([place, place])
                draw = Draw(batch.draw.rows[[place] * 2], batch.draw.views[[place] * 2], 2)
                extra = {name: tensor[twice] for name, tensor in batch.extra.items()}
                alone = Batch(draw, batch.pixels[twice], extra, 0.0)
                if not torch.isfinite(self.task(self._tools.normalise(alone.pixels), alone, None).loss):
                    found.append(int(row))
        return found

    def fit_memory(self, draw: Draw) -> int:
        """Find out in how many parts the GPU's memory holds a batch, as the task takes it; 1 on a CPU.

        All workers must call it. What an optimizer will keep, and a share for what is not foreseen, is held
        meanwhile.
        """
        tools = self._tools
        device = tools.precision.device
        if device.type != "cuda":
            return 1
        values = sum(p.numel() for p in self.task.parameters() if p.requires_grad)
        moments = 1 if self._settings.name == "sgd" else 2
        spare = int(SPARE * torch.cuda.get_device_properties(device).total_memory)

        def attempt(count: int) -> None:
            held = torch.empty(4 * values * moments + spare, dtype=torch.uint8, device=device)
            tried = Draw(draw.rows[:count], draw.views[:count], count)
            pixels = torch.zeros((count, 3, *[tools.augment.size] * 2), dtype=torch.uint8, device=device)
            taken = self.extra(tried)  # noqa: S610 - no Django
            there = {name: torch.from_numpy(part).to(device) for name, part in taken.items()}
            with tools.precision.autocast():
                learnt = self.task(tools.normalise(pixels), Batch(tried, pixels, there, 0.0), None)
            learnt.loss.float().backward()
            self._optimizer.zero_grad(set_to_none=True)
            del held

        self.task.train(self.frozen is None)
        kept = [buffer.clone() for buffer in self.module.buffers()]
        self.parts = max(tools.group.gather(fitting_parts(attempt, len(draw.rows))))
        for buffer, value in zip(self.module.buffers(), kept, strict=True):
            buffer.copy_(value)
        return self.parts


def _cut(batch: Batch, first: int, last: int) -> Batch:
    """Some of a batch's images."""
    draw = batch.draw.part(first, last)
    extra = {name: tensor[first:last] for name, tensor in batch.extra.items()}
    return Batch(draw, batch.pixels[first:last], extra, batch.waited)


def _recognised(logits: Tensor, batch: Batch, mix: Mix | None) -> tuple[Tensor, Tensor]:
    """How many images were recognised, and how many have a label to tell by: scalars, float."""
    labels = batch.extra["labels"]
    if mix is not None and isinstance(mix.share, Tensor):
        labels = torch.where(mix.share < 0.5, mix.partners(labels), labels)
    elif mix is not None and mix.share < 0.5:
        labels = mix.partners(labels)
    return (logits.detach().argmax(1) == labels).sum().float(), (labels >= 0).sum().float()


def _mixed(*key: int) -> int:
    """One number of several, for torch's generator."""
    return int(sampling.generator(sampling.NOISE, *key).integers(2**62))

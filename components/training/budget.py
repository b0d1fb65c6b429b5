"""What a training will take, said before its first step: time, disk, cost; and epochs that fit into it."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch

from components.common import progress, shared
from components.common.environment import cores
from components.common.progress import counted
from components.common.storage import human_bytes, read_json, sha256_json, state_dir, write_json
from components.dataset import manifest as manifests
from components.models.card import read_card
from components.models.checkpoint import CARD
from components.models.params import Arch
from components.step import StepContext
from components.training import estimate
from components.training.estimate import GPU_START_SECONDS, START_SECONDS, Speed
from components.training.inputs.index import open_index
from components.training.inputs.pictures import Part, open_store
from components.training.listener import Listener, duration
from components.training.pace import FORWARD
from components.training.params import Ray
from components.training.spec import TrainSpec
from components.training.tasks import task_of

log = logging.getLogger(__name__)

VERSION = 2  # of how a speed is measured: those of another number are measured again
MEASURE_SECONDS = 2.0  # for what is timed of a network
MEASURED_PIXELS = 16 * 224 * 224  # of the images that a CPU is measured with at once: more take no other time
IDLE = 0.1  # of all cores: where as much is idle, nobody waits for one
SHARED = 0.9  # of the speed of a worker alone, that is left to it beside others
TRIED = 16  # images that are read to time reading
RAY_SECONDS = 8.0  # of the start: a cluster of this machine, to begin and to end
KEEP_SECONDS = 0.4  # of an epoch: its checkpoint, and what workers wait for one another
RULE = "preflight.estimate"

_while_busy: dict[Path, Speed] = {}  # of this process only


@dataclass(frozen=True)
class Forecast:
    """Seconds, part by part.

    Attributes:
        start: until the first step: Ray, its workers, their imports.
        labels: of the teacher, before the first epoch.
        phases: name, epochs and seconds of each of them.
        end: the networks' answers on validation and test.
    """

    start: float
    labels: float
    phases: tuple[tuple[str, int, float], ...]
    end: float

    @property
    def seconds(self) -> float:
        """In all."""
        return self.start + self.labels + self.end + sum(count * each for _, count, each in self.phases)


def forecast(
    spec: TrainSpec, counts: Mapping[str, int], own: Speed, teacher: Speed | None, start: float
) -> Forecast:
    """What a training takes, if each network keeps its speed. Labels that are there already count too.

    Args:
        counts: images by split; of ``train``, those that are drawn.
        own, teacher: speeds of the network that learns, and of the one that it learns from, by all workers
            together.
        start: seconds until the first step.
    """
    settings, chosen, labels, online = spec.distill, 0, 0.0, 0.0
    learns = any(task_of(phase.task).unlabelled for phase in spec.phases)
    if settings is not None and teacher is not None:
        if settings.unlabeled_per_class:
            chosen = min(counts["unlabeled"], settings.unlabeled_per_class * len(spec.class_names))
            labels = counts["unlabeled"] / teacher.inference
        if settings.teacher_labels == "cached":
            labels += learns * settings.crops * (counts["train"] + chosen) / teacher.inference
        else:
            online = 1 / teacher.inference
    judging = counts["val"] / own.inference
    phases = []
    for phase in spec.phases:
        soft = task_of(phase.task).unlabelled
        images = counts["train"] + chosen * (soft or phase.match_budget)
        learnt, judged = spec.costs(phase)
        each = learnt * images * (1 / own.training + online * soft) + judged * judging + KEEP_SECONDS
        phases.append((phase.name, phase.epochs, each))
    end = sum(spec.judging_costs().values()) * (counts["val"] + counts["test"]) / own.inference
    return Forecast(start, labels, tuple(phases), end)


def fit_epochs(budget: float, fixed: float, epoch: float, most: int) -> int:
    """How many epochs fit into a time: at least one, and never more than ``most``.

    Args:
        budget: seconds in all; ``fixed``: of what is done whatever their number; ``epoch``: of each.
    """
    return max(1, min(most, int((budget - fixed) / max(epoch, 1e-9))))


def within(
    run: StepContext, make: Callable[[int], TrainSpec], ray: Ray, where: str, most: int, minutes: float | None
) -> TrainSpec:
    """The specification with as many epochs as fit into ``train.time_budget_minutes``, if one is given.

    What was decided for a job is kept below ``.retort/budgets``: an interrupted run goes on with the same
    epochs, and so with the same schedule, however busy the machine is by then.

    Args:
        make: the specification with a number of epochs.
        where: the section of params.yaml that holds the budget, such as ``teacher``.
        most: ``train.epochs``, the upper bound.
        minutes: of all that the step trains, Ray's start included; None: no budget.
    """
    spec = make(most)
    if minutes is None:
        return spec
    key = f"{where}.train.time_budget_minutes"
    kept = state_dir("budgets") / f"{sha256_json([spec.key(), minutes])[:24]}.json"
    if shared.bring(kept):
        epochs, why = read_json(kept)["epochs"], "as was decided when this training first began"
    else:
        one, two = expected(make(1), ray), expected(make(2), ray)
        if one is None or two is None:
            message = (
                f"how fast {ray.address} trains is known after a first training there: the budget of "
                f"{minutes:g} min is not held, and {counted(most, 'epoch')} are taken"
            )
            run.add_finding(
                "preflight.budget", "warning", key, message, measured=most, limit=minutes, row="5.1",
                advice=f"Set {where}.train.epochs to what you can wait for; the next run knows the speed.",
            )  # fmt: skip
            return spec
        each = two.seconds - one.seconds
        rest = one.seconds - each
        epochs = fit_epochs(60 * minutes, rest, each, most)
        write_json(kept, {"epochs": epochs, "minutes": minutes, "epoch_seconds": each, "rest_seconds": rest})
        shared.keep(kept)
        why = f"about {duration(each)} for each, {duration(rest)} for the rest"
        if rest + epochs * each > 60 * minutes:
            why += ", which is more than the budget: there is at least one"
    message = f"{counted(epochs, 'epoch')} of at most {most} in {minutes:g} min: {why}"
    log.info(f"{run.name}: {message}")
    run.add_finding(
        "preflight.budget", "info", key, message, measured=epochs, limit=most, row="5.1",
        advice="A smaller network or global.image_size makes room for more." if epochs < most else "",
    )  # fmt: skip
    run.tracker.metrics({"epochs": epochs})
    return make(epochs)


def say_estimate(
    run: StepContext, spec: TrainSpec, ray: Ray, where: str, disk: int, trainings: int = 1
) -> None:
    """Say what a training will take, and find ``preflight.estimate``: its time is what is measured, seconds.

    Args:
        disk: bytes that checkpoints take.
        trainings: how many such trainings the step does.
    """
    found = expected(spec, ray)
    if found is None:
        parts = [f"how long it takes is known after a first training at {ray.address}"]
    else:
        longest = max((each for _, _, each in found.phases), default=0.0)
        inside = [f"{duration(longest)} an epoch", f"{duration(found.start)} to start"]
        if found.labels >= 1:
            inside.append(f"{duration(found.labels)} for the teacher's labels")
        each_of = f" for each of {trainings} trainings" if trainings > 1 else ""
        parts = [f"about {duration(found.seconds)}{each_of} ({', '.join(inside)})"]
        run.tracker.metrics({"estimated_seconds": found.seconds * trainings})
    parts.append(f"up to {human_bytes(disk)} of disk for checkpoints")
    if found is not None and ray.price_per_hour is not None:
        cost = found.seconds * trainings / 3600 * ray.price_per_hour
        parts.append(f"a cost of {cost:.2f} at {ray.price_per_hour:g} an hour for the whole cluster")
        run.tracker.metrics({"estimated_cost": cost})
    message = "training takes " + ", ".join(parts) if found is not None else ", ".join(parts)
    log.info(f"{run.name}: {message}")
    run.add_finding(
        RULE, "info", f"{where}.train", message, row="5.1",
        measured=None if found is None else round(found.seconds, 1),
    )  # fmt: skip


def learn(run: StepContext, spec: TrainSpec, ray: Ray, heard: Listener, seconds: float) -> None:
    """Say what a training took, beside what was said before, and keep its speed for the next estimate.

    Args:
        seconds: that it took, Ray's start included.
    """
    run.tracker.summary({"training_seconds": seconds})
    told = [found.measured for found in run.report.findings if found.rule == RULE and found.measured]
    if told and not heard.resumed:
        log.info(f"{run.name}: trained in {duration(seconds)}; {duration(told[-1])} were expected")
    online = spec.distill is not None and spec.distill.teacher_labels == "online"
    other = any(spec.costs(phase) != (1.0, 1.0) or phase.augment for phase in spec.phases)
    if online or other or not sum(heard.seconds):  # what the teacher, or larger images, took is in it
        return
    training = heard.images / sum(heard.seconds)
    kept = _kept(spec.arch, spec, ray)
    known = Speed(**read_json(kept)) if kept.exists() else Speed(training, training / FORWARD)
    write_json(kept, asdict(Speed(training, known.inference)))


# --- the speed of this machine -----------------------------------------------------------------------------


def expected(spec: TrainSpec, ray: Ray) -> Forecast | None:
    """What a training will take; None: it runs elsewhere, and never did before."""
    own = _speed(spec.arch, spec, ray)
    teacher = None
    if spec.teacher is not None:
        teacher = _speed(read_card(spec.teacher / CARD).arch, spec, ray)
    if own is None or (spec.teacher is not None and teacher is None):
        return None
    index = open_index(spec.manifest)
    counts = {split: index.count(split) for split in manifests.SPLITS}
    counts["train"] = max(1, counts["train"] - len(spec.plan.leave_out))
    start = GPU_START_SECONDS if ray.gpus_per_worker else START_SECONDS
    if ray.address:  # Ray itself runs already
        start -= RAY_SECONDS
    return forecast(spec, counts, own, teacher, start)


def _speed(arch: Arch, spec: TrainSpec, ray: Ray) -> Speed | None:
    """Of all workers together: as it was measured or learnt before, else measured now if they run here."""
    kept = _kept(arch, spec, ray)
    if kept.exists():
        return Speed(**read_json(kept))
    if ray.address:
        return None
    place = kept.resolve()
    if place not in _while_busy:
        progress.at(f"measuring {arch.name} on this machine")
        found, others = beside_others(lambda: _measured(arch, spec, ray))
        if not others:
            write_json(kept, asdict(found))
            return found
        log.warning(
            f"{arch.name} was measured while other work took about {others:.1f} cores of this machine: "
            "what is expected is as uncertain as that is"
        )
        _while_busy[place] = found  # and measured again by the next command
    return _while_busy[place]


def beside_others(work: Callable[[], Speed]) -> tuple[Speed, float]:
    """What ``work`` returns, and how many cores other processes took meanwhile; 0 where some were idle."""
    import psutil

    host = psutil.cpu_count() or 1
    psutil.cpu_percent()  # what it says next is the share since now
    started, ours = perf_counter(), process_time()
    found = work()
    ours = (process_time() - ours) / max(perf_counter() - started, 1e-9)
    busy = host * psutil.cpu_percent() / 100
    others = max(0.0, busy - ours)
    return found, others if busy > (1 - IDLE) * host and others > IDLE * host else 0.0


def _kept(arch: Arch, spec: TrainSpec, ray: Ray) -> Path:
    """Where a speed is kept: by the machine, or the cluster's address, and all that makes it another one."""
    place: Any = ray.address or [platform.node(), _processor(), cores()]
    size = spec.train.image_size or spec.size
    what = [
        VERSION, place, torch.__version__, arch.model_dump(), spec.size, size, spec.train.batch_size,
        spec.train.num_workers, asdict(spec.recipe()), spec.train.precision, spec.train.compile,
        spec.optimizer.name, spec.threads, spec.workers, ray.gpus_per_worker,
    ]  # fmt: skip
    return state_dir("cache", "speed") / f"{sha256_json(what)[:32]}.json"


def _measured(arch: Arch, spec: TrainSpec, ray: Ray) -> Speed:
    """One worker, measured as it is: with its own threads and batch, times those that find cores.

    One process with the threads of all would be no measure of them: where other work shares the cores, the
    threads of one process wait for the slowest at every operator, and it takes many times as long.
    """
    gpu, ours, workers = ray.gpus_per_worker > 0, cores(), spec.workers
    threads, loaders = min(ours, spec.threads), spec.train.num_workers
    settings: dict[str, Any] = {
        "augment": spec.recipe(), "optimizer": spec.optimizer, "train": spec.train,
        "learn_size": spec.train.image_size, "budget": MEASURE_SECONDS,
    }  # fmt: skip
    if gpu:  # in a process of its own, so that no memory of the card stays taken
        batch, beside = spec.train.batch_size, float(workers)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            one = pool.submit(
                estimate.measure, arch, spec.size, batch, threads, device="cuda", **settings
            ).result()
    else:
        batch = min(spec.train.batch_size, max(8, MEASURED_PIXELS // (spec.size * spec.size)))
        beside = min(workers, ours / threads)
        beside *= SHARED if beside > 1 else 1.0
        apart = loaders if ours >= workers * (threads + loaders) else 0  # else they take the step's cores
        one = estimate.measure(arch, spec.size, batch, threads, loaders=apart, **settings)
    speed = one * beside
    if spec.shards is not None or ray.storage:
        return speed
    store = open_store(open_index(spec.manifest), spec.root, spec.size, spec.recipe().source)
    makers = workers * (loaders or threads)
    busy = 0 if gpu else min(ours, workers * threads)
    return Speed(
        fed(speed.training, reading(store.learn), makers, busy, ours),
        fed(speed.inference, reading(store.judge), makers, busy, ours),
    )


def fed(rate: float, read: float, makers: int, busy: int, cores: int) -> float:
    """Images a second that are computed and read at one time.

    Args:
        rate: computed, images a second, on ``busy`` of the cores (0: on a GPU).
        read: seconds of one core to read and decode an image, by as many ``makers`` at a time.
    """
    if not read:
        return rate
    return min(rate, makers / read, cores / (busy / rate + read))


def reading(part: Part) -> float:
    """Seconds that an image takes to be read and decoded; 0: they are decoded already."""
    if part.decoded is not None or not len(part):
        return 0.0
    rows = part.rows[:: max(1, len(part) // TRIED)][:TRIED].astype("int64")
    started = perf_counter()
    part.take(rows)
    return (perf_counter() - started) / len(rows)


def _processor() -> str:
    """The model of this machine's processor and first GPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    return f"{model or platform.processor()} {card}".strip()

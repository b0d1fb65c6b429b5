"""The sweep: every configuration proved, warmed up, then measured in rounds side by side."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from components.benchmark.engines import ENGINES, Job, Run
from components.benchmark.timing import Timing
from components.common.errors import RetortError
from components.common.progress import task
from components.export.precisions import PRECISIONS

OPENING_SHARE = 0.5  # of the time budget: opening a model takes OpenVINO longer than many runs
ROUNDS = 15
MIN_ROUNDS = 3  # fewer say nothing about noise
MIN_CALLS = 2  # timed calls in a round


@dataclass(frozen=True, order=True)
class Config:
    """What is measured: a model in an engine, with a number of threads, a batch size and a precision."""

    batch: int
    threads: int
    model: str
    engine: str
    precision: str

    def __str__(self) -> str:
        images = "1 image" if self.batch == 1 else f"{self.batch} images"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.model}, {self.engine} {self.precision}, {threads}, {images}"


@dataclass
class Sweep:
    """What came of it: a timing for each configuration measured, a reason for each that was not."""

    timings: dict[Config, Timing] = field(default_factory=dict)
    refused: dict[Config, str] = field(default_factory=dict)  # does not run here, or gives other scores
    unmeasured: list[Config] = field(default_factory=list)  # no time or memory left
    seconds: float = 0.0


def sweep(
    configs: Sequence[Config],
    files: dict[tuple[str, str], Path],
    images: dict[str, np.ndarray],
    *,
    budget_s: float,
    seed: int,
) -> Sweep:
    """Measure ``configs``, the first ones first where time is short.

    Args:
        files: by model and precision; a precision without a file of its own is run from the float32 one.
        images: by model, a few validation images as its graph takes them.
        budget_s: for all of it, from opening the first model to the last round.

    Each configuration must give ONNX Runtime's scores before it is timed. The rounds interleave all
    configurations in a new order each time, so that a slow minute of the machine meets them all.
    """
    started = time.perf_counter()
    done = Sweep()
    runs: dict[Config, tuple[Callable[[], object], float]] = {}
    references: dict[Path, np.ndarray] = {}
    with task("benchmark", 100) as shown:

        def progress(note: str) -> None:
            shown.update(int(100 * (time.perf_counter() - started) / budget_s), note)

        for config in configs:
            if time.perf_counter() - started > OPENING_SHARE * budget_s or not _room_for(files, config):
                done.unmeasured.append(config)
                continue
            reason = ENGINES[config.engine].refusal(config.precision)
            if reason:
                done.refused[config] = reason
                continue
            progress(f"opening {config}")
            opened = _open(config, files, images[config.model], references)
            if isinstance(opened, str):
                done.refused[config] = opened
            else:
                runs[config] = opened
        # what a slow configuration took to open beyond its share is not taken from the others
        left = max(budget_s - (time.perf_counter() - started), (1 - OPENING_SHARE) * budget_s)
        _rounds(runs, done, left, seed, progress)
    done.seconds = time.perf_counter() - started
    return done


def _room_for(files: dict[tuple[str, str], Path], config: Config) -> bool:
    """Whether memory has room for one more copy: an open model takes up to some four times its file."""
    import psutil

    path = files.get((config.model, config.precision)) or files[config.model, "fp32"]
    return psutil.virtual_memory().available > 4 * path.stat().st_size + 2**28


def _open(
    config: Config,
    files: dict[tuple[str, str], Path],
    images: np.ndarray,
    references: dict[Path, np.ndarray],
) -> tuple[Callable[[], object], float] | str:
    """A function that runs one batch, and its seconds when warm; or why it is not measured."""
    path = files.get((config.model, config.precision))
    if path is None and PRECISIONS[config.precision].convert is None:
        path = files[config.model, "fp32"]
    if path is None:
        return (
            f"{config.model} was exported without {config.precision} "
            f"(export.precisions: [{config.precision}])"
        )
    if path not in references:
        run_one = ENGINES["onnxruntime"].open(Job(path, "fp32", config.threads, 1))
        references[path] = np.concatenate([run_one(images[i : i + 1]) for i in range(len(images))])
    try:
        run = ENGINES[config.engine].open(Job(path, config.precision, config.threads, config.batch))
        reason = _differs(run, images, references[path], config)
    except (RetortError, RuntimeError) as error:
        return " ".join(str(error).split())[:300]
    if reason:
        return reason
    batch = images[np.arange(config.batch) % len(images)]
    warm = []
    for _ in range(3):
        begun = time.perf_counter()
        run(batch)
        warm.append(time.perf_counter() - begun)
    return (lambda: run(batch)), min(warm)


def _differs(run: Run, images: np.ndarray, reference: np.ndarray, config: Config) -> str:
    """What is wrong with the scores, against ONNX Runtime's on the same file; empty when nothing is.

    A lead of less than the limit is a tie.
    """
    limit = PRECISIONS[config.precision].score_limit
    places = np.arange(-(-len(images) // config.batch) * config.batch) % len(images)
    scores = [
        np.array(run(images[places[i : i + config.batch]])) for i in range(0, len(places), config.batch)
    ]
    got = np.concatenate(scores)[: len(images)]
    if got.shape != reference.shape or not np.isfinite(got).all():
        return f"gives scores of shape {list(got.shape)} or that are no numbers"
    difference = float(np.abs(got - reference).max())
    every = np.arange(len(got))
    lead = reference[every, reference.argmax(axis=1)] - reference[every, got.argmax(axis=1)]
    others = int((lead > limit).sum())
    if others or difference > limit:
        return (
            f"gives other answers than ONNX Runtime: scores differ by up to {difference:.2g} "
            f"(limit {limit:g}), {others} of {len(got)} images get another class"
        )
    return ""


def _rounds(
    runs: dict[Config, tuple[Callable[[], object], float]],
    done: Sweep,
    seconds: float,
    seed: int,
    progress: Callable[[str], None],
) -> None:
    """Measure in interleaved rounds until ``seconds`` are over."""

    def cost(calls: int) -> float:
        return sum((calls + 1) * single for _, single in runs.values())

    # the last ones are given up until the least that tells anything fits
    while len(runs) > 1 and MIN_ROUNDS * cost(MIN_CALLS) > max(seconds, 0):
        given_up = max(runs)
        runs.pop(given_up)
        done.unmeasured.append(given_up)
    if not runs:
        return
    rounds = int(min(ROUNDS, max(MIN_ROUNDS, seconds // cost(MIN_CALLS))))
    slice_s = seconds / rounds / len(runs)
    started = time.perf_counter()
    shuffle = random.Random(seed)  # noqa: S311 - an order, no secret
    order = list(runs)
    timings = {config: Timing() for config in runs}
    for index in range(rounds):
        if index >= MIN_ROUNDS and time.perf_counter() - started > seconds:
            break
        shuffle.shuffle(order)
        for config in order:
            run, _ = runs[config]
            run()  # brings the model back into the caches, as in a service that is busy
            calls: list[float] = []
            until = time.perf_counter() + slice_s
            while len(calls) < MIN_CALLS or time.perf_counter() < until:
                begun = time.perf_counter()
                run()
                calls.append(time.perf_counter() - begun)
            timings[config].rounds.append(calls)
        progress(f"round {index + 1} of {rounds}")
    done.timings = {config: timings[config] for config in sorted(timings)}

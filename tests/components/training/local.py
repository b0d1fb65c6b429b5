"""The trainer without Ray: in this process, or in a few that form a gloo group."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from components.common.environment import environment
from components.training.context import Event, Exchange
from components.training.spec import TrainSpec
from components.training.state import TrainResult
from components.training.trainer import Trainer

REPO_ROOT = str(Path(__file__).resolve().parents[3])


@dataclass
class LocalContext:
    """A worker's place; checkpoints are kept in memory, as bytes of a file would be."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    exchange: Exchange | None = None
    checkpoint: bytes | None = None
    stop_when: Callable[[int], bool] = lambda steps: False
    stop_judging: Callable[[], bool] = lambda: False
    events: list[Event] = field(default_factory=list)
    saved: int = 0
    asked: int = 0
    doing: str = ""

    def group(self) -> AbstractContextManager[None]:
        return nullcontext()  # it is there already

    def load_checkpoint(self) -> dict[str, Any] | None:
        if self.checkpoint is None:
            return None
        with tempfile.TemporaryFile() as file:
            file.write(self.checkpoint)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)

    def save_checkpoint(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        with tempfile.TemporaryFile() as file:
            torch.save(state, file)
            file.seek(0)
            self.checkpoint = file.read()
        self.saved += 1

    def stop_requested(self) -> bool:
        if self.doing.startswith("judging"):  # counted apart from steps
            return self.stop_judging()
        self.asked += 1
        return self.stop_when(self.asked)

    def at(self, what: str, usual: float | None = None) -> None:
        self.doing = what

    def send(self, kind: str, **values: Any) -> None:
        self.events.append({"kind": kind, **values})


@dataclass
class Outcome:
    """What rank 0 had at the end."""

    context: LocalContext

    @property
    def state(self) -> dict[str, Any]:
        state = self.context.load_checkpoint()
        assert state is not None, "nothing was saved"
        return state

    @property
    def result(self) -> TrainResult:
        return TrainResult.of(self.state)

    def said(self, kind: str) -> list[Event]:
        return [event for event in self.context.events if event["kind"] == kind]


def run(
    spec: TrainSpec,
    checkpoint: bytes | None = None,
    stop_when: Callable[[int], bool] = lambda steps: False,
    device: torch.device | None = None,
) -> Outcome:
    """Train here, with one worker and without a process group; None: on the CPU."""
    context = LocalContext(checkpoint=checkpoint, stop_when=stop_when)
    context.device = device or context.device
    threads = torch.get_num_threads()
    try:
        Trainer(context, replace(spec, workers=1)).run()
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    return Outcome(context)


def run_group(
    spec: TrainSpec, workers: int, checkpoint: bytes | None = None, stop_at: int | None = None
) -> Outcome:
    """Train with several workers, each a process; they meet through a file.

    Args:
        stop_at: the step at which one of them, not the first, is asked to stop.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])  # what they import, once for all tests
    if (
        REPO_ROOT not in sys.path
    ):  # pytest finds the tests without it; their processes, and the server, do not
        sys.path.append(REPO_ROOT)
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            processes.Process(
                target=_work, args=(spec, rank, workers, Path(folder), checkpoint, stop_at, str(Path.cwd()))
            )
            for rank in range(workers)
        ]
        with environment({"PYTHONPATH": REPO_ROOT}):  # for the server, which the first of them starts
            for job in jobs:
                job.start()
        for job in jobs:
            job.join(300)
            job.kill()
        assert [job.exitcode for job in jobs] == [0] * workers
        return Outcome(torch.load(Path(folder) / "context", weights_only=False))


def _work(
    spec: TrainSpec,
    rank: int,
    world: int,
    folder: Path,
    checkpoint: bytes | None,
    stop_at: int | None,
    cwd: str,
) -> None:
    os.chdir(cwd)
    os.environ["RETORT_STATE"] = ".retort"
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    context = LocalContext(rank, world, rank, checkpoint=checkpoint)
    if stop_at is not None and rank == world - 1:
        context.stop_when = lambda steps: steps >= stop_at
    Trainer(context, replace(spec, workers=world)).run()
    context.stop_when = context.stop_judging = None  # type: ignore[assignment] - cannot be written
    if rank == 0:
        torch.save(context, folder / "context")
    dist.destroy_process_group()

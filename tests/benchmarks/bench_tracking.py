"""The tracker as a server: 200 runs at once against MLflow, PostgreSQL and an S3 store on this machine.

Each run is recorded as a step records itself, through the spool and within the time that a step has for a
server, in threads of some processes. What the server did not take in that time is sent by ``sync``, twice.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np

from components.common.params import Registry
from tests.benchmarks.measure import Row, at_most
from tests.components.conftest import free_port
from tests.infra.servers import Servers, running

RUNS, PROCESSES, EPOCHS = 200, 4, 10
NAME = "at once"


def measure(seeds: int) -> list[Row]:
    """``seeds`` changes nothing here: what is recorded is fixed."""
    with running("local", free_port) as servers:
        servers.set_up()
        return _measured(servers)


def _measured(servers: Servers) -> list[Row]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="retort-bench-") as folder:
        given = [
            (folder, servers.tracker, servers.login(), number, RUNS // PROCESSES)
            for number in range(PROCESSES)
        ]
        with context.Pool(PROCESSES, maxtasksperchild=1) as pool:
            found = pool.starmap(_record, given, chunksize=1)
            again = pool.starmap(_send, given, chunksize=1)
            (whole,) = pool.starmap(_count, [given[0]])
    waited = np.concatenate([one["steps"] for one in found])
    later = sum(one["sent"] for one in again)
    return [
        Row("runs at once", RUNS, "runs", note=f"{PROCESSES} processes, {EPOCHS} epochs each, a report"),
        at_most("runs lost", RUNS - whole["steps"], 0, "runs"),
        at_most("values lost or doubled", abs(RUNS * EPOCHS - whole["values"]), 0, "values"),
        at_most("parents too many", whole["parents"] - PROCESSES, 0, "runs"),
        Row("sent later, by sync", later, "runs", note="the step did not wait longer"),
        at_most("sent twice", sum(one["again"] for one in again), 0, "runs"),
        Row("a step's time for tracking, p95", float(np.quantile(waited, 0.95)), "s"),
        *_requests("while they run", found),
        *_requests("while sync sends", again),
    ]


def _requests(when: str, found: Sequence[dict[str, Any]]) -> list[Row]:
    """How many requests a second the server took, and how long each."""
    times = np.sort(np.concatenate([one["seconds"] for one in found]))
    wall = max(one["ended"] for one in found) - min(one["begun"] for one in found)
    answered = sum(one["answered"] for one in found)
    note = f"{len(times)} in {wall:.0f} s, {len(times) - answered} not answered"
    return [
        Row(f"requests a second, {when}", len(times) / wall, "1/s", note=note),
        Row(f"p50 of a request, {when}", float(np.quantile(times, 0.5)) * 1000, "ms"),
        Row(f"p95 of a request, {when}", float(np.quantile(times, 0.95)) * 1000, "ms"),
    ]


def _here(folder: str, login: dict[str, str], number: int) -> None:
    """Be a machine of its own, with the pipeline's login."""
    os.chdir(folder)
    os.environ.update(
        login, RETORT_STATE=os.fspath(Path(folder) / f"state-{number}"), RETORT_RUN=f"bench-{number}"
    )


def _record(folder: str, uri: str, login: dict[str, str], number: int, count: int) -> dict[str, Any]:
    """Record ``count`` runs at once."""
    _here(folder, login, number)
    from components.tracking.client import connect
    from components.tracking.tracker import Tracker

    connect(uri).search_experiments(max_results=1)  # what is imported is no server's time
    registry = Registry(tracking_uri=uri, name=NAME)
    together = Barrier(count)

    def run(index: int) -> float:
        out = Path(folder) / f"out-{number}-{index}"
        out.mkdir()
        (out / "report.html").write_bytes(os.urandom(100_000))
        together.wait()
        spent, tracker = 0.0, Tracker(f"step-{number}-{index}", registry)
        for work in (
            lambda: tracker.start({"seed": 7, "lr": {"initial": 0.1}}, {}),
            *(
                lambda epoch=epoch: tracker.metrics({"val_top1": epoch / EPOCHS, "loss": 1.0}, epoch)
                for epoch in range(EPOCHS)
            ),
            lambda: tracker.summary({"top1": 0.9}),
            lambda: tracker.finish("FINISHED", 1.0, out),
        ):
            started = time.perf_counter()
            work()
            spent += time.perf_counter() - started
        return spent

    with _timed() as found, ThreadPoolExecutor(count) as pool:
        found["steps"] = list(pool.map(run, range(count)))
    return found


def _send(folder: str, uri: str, login: dict[str, str], number: int, count: int) -> dict[str, Any]:
    """Send what is left, then once more; returns how many each time."""
    _here(folder, login, number)
    from components.tracking.client import connect
    from components.tracking.replay import sync

    connect(uri).search_experiments(max_results=1)
    registry = Registry(tracking_uri=uri, name=NAME)
    with _timed() as found:
        found["sent"] = sync(registry)["sent"]
    return {**found, "again": sync(registry)["sent"]}


@contextmanager
def _timed() -> Iterator[dict[str, Any]]:
    """The time of each request inside the block, and whether it was answered."""
    import requests

    seconds: list[float] = []
    answered: list[bool] = []
    send = requests.Session.send

    def timed(session: requests.Session, request: Any, **how: Any) -> Any:
        started = time.perf_counter()
        well = False
        try:
            answer = send(session, request, **how)
            well = answer.status_code < 500
            return answer
        finally:
            seconds.append(time.perf_counter() - started)
            answered.append(well)

    found: dict[str, Any] = {"begun": time.time()}
    requests.Session.send = timed  # type: ignore[method-assign]
    try:
        yield found
    finally:
        requests.Session.send = send  # type: ignore[method-assign]
    found |= {"ended": time.time(), "seconds": list(seconds), "answered": sum(answered)}


def _count(folder: str, uri: str, login: dict[str, str], number: int, count: int) -> dict[str, int]:
    """What the server has: finished steps, their epochs, their parents."""
    _here(folder, login, number)
    from components.tracking.client import connect

    client = connect(uri)
    own = client.get_experiment_by_name(NAME)
    found = client.search_runs([own.experiment_id], max_results=1000)
    steps = [run for run in found if "mlflow.parentRunId" in run.data.tags and run.info.status == "FINISHED"]
    values = sum(len(client.get_metric_history(run.info.run_id, "val_top1")) for run in steps)
    whole = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    return {"steps": len(steps), "values": values, "parents": len(whole)}

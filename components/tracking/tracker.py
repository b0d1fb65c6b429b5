"""What a step works with: it records parameters, numbers, tags, data sets and files of the step's run."""

from __future__ import annotations

import functools
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.common.params import Registry
from components.common.signals import stopped_by
from components.common.storage import human_bytes, state_dir
from components.tracking import shared_spool
from components.tracking.client import (
    bounded,
    client_settings,
    connect,
    first_line,
    public_uri,
    reach,
    tracking_uri,
)
from components.tracking.machine import MachineMonitor
from components.tracking.replay import Replay, send_leftovers
from components.tracking.run_identity import in_kubeflow, pipeline_run, reused_steps
from components.tracking.spool import Entry

log = logging.getLogger(__name__)

BUDGET_SECONDS = 10.0  # a step waits for a server no longer than this in all
REQUEST_SECONDS = 3  # ... and for one answer no longer than this
LAST_SECONDS, LAST_REQUEST_SECONDS = 60.0, 20  # at its end, where what is not sent then is lost with its pod
OTHERS = 10  # steps of pods that are gone, which one step sends
EVERY_SECONDS = 2.0  # between two replays while a step runs
MAX_ARTIFACT_BYTES = 10_000_000
ARTIFACTS = (".json", ".html", ".csv", ".png", ".svg")
NOT_ARTIFACTS = ("page.json", "run.json")  # the page's sections are in report.html; run.json comes later


@contextmanager
def ending(finish: Callable[[str], None]) -> Iterator[None]:
    """Tell ``finish`` how the block ended, as MLflow calls it: FINISHED, KILLED by a signal, else FAILED."""
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except BaseException as error:
        if stopped_by(error) is not None:
            status = "KILLED"
        raise
    finally:
        finish(status)


class Tracker:
    """Records what one step does as a child run of the pipeline's run."""

    def __init__(self, step: str, registry: Registry) -> None:
        self.step = step
        self.registry = registry
        self.id = uuid.uuid4().hex
        self._uri = tracking_uri(registry)
        self._parent: dict[str, Any] = {}
        self._inputs: Mapping[str, str] = {}
        self._entry: Entry | None = None
        self._replay: Replay | None = None
        self._left, self._request = BUDGET_SECONDS, REQUEST_SECONDS
        self._next = 0.0
        self._away = self._warned = self._sent = False
        self._sending = self._over = False  # a thread is at it, which a server may keep; the step has ended
        self._guard = threading.Lock()  # of these two
        self._machine: MachineMonitor | None = None
        self._copy: shared_spool.Copy | None = None

    def start(self, params: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
        """Open the run: ``params`` are the step's sections, ``inputs`` file names and their sha256."""
        self._inputs = dict(inputs)
        try:
            self._parent = pipeline_run(self.step, self._uri, self.registry.name)
            entry = Entry(state_dir("spool").absolute() / self.id)
            entry.make()
        except OSError as error:
            self._give_up(error)
            return
        self._entry = entry
        self._replay = Replay(entry, self._uri)
        self._append(
            "start",
            id=self.id,
            step=self.step,
            uri=self._uri,
            experiment=self.registry.name,
            parent=self._parent,
            params=dict(_flatten(params)),
            tags={f"input.{label}": digest for label, digest in inputs.items()},
        )
        self._copy = shared_spool.copying(entry)
        self._flush()
        self._machine = MachineMonitor(self._of_machine)
        self._machine.start()

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers; ``step`` is the epoch."""
        self._append("metrics", values=_numbers(values), epoch=step or 0)
        self._flush()

    def summary(self, values: Mapping[str, float]) -> None:
        """Record a step's headline numbers on the parent too, as ``<step>.<name>``, to compare runs by."""
        self._append("summary", values=_numbers(values))

    def tags(self, values: Mapping[str, str], above: bool = False) -> None:
        """Record facts that are not numbers; ``above``: on the parent too, to find and sort runs by."""
        self._append("tags", values={key: str(value) for key, value in values.items()}, above=above)

    def dataset(self, name: str, fingerprint: str, path: Path, counts: Mapping[str, int]) -> None:
        """Record the data set that the step read: its fingerprint as MLflow's digest, rows per split.

        MLflow cuts a digest at 36 characters; the whole fingerprint is the tag ``data.fingerprint``.
        """
        self._append("dataset", name=name, fingerprint=fingerprint, source=str(path), counts=dict(counts))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Record a file. Reports and plots in the step's folder are recorded by the step's frame."""
        if self._entry is None:
            return
        try:
            size = path.stat().st_size
            if size > MAX_ARTIFACT_BYTES:
                log.warning(f"tracking: {path} is {human_bytes(size)}: not copied into MLflow")
                return
            file = self._entry.copy(path)
        except OSError as error:
            self._give_up(error)
            return
        self._append("artifact", file=file, folder=folder)

    def find(self) -> None:
        """Learn MLflow's ids of this run, should the tracker have been away when it was opened."""
        if self._replay is not None and not self._replay.run_id:
            self._away = False
            self._next = 0.0
            self._flush()

    def finish(self, status: str, seconds: float, out: Path) -> None:
        """Close the run: FINISHED, FAILED or KILLED; the report files in ``out`` go along."""
        if self._machine is not None:
            self._machine.end()
        for path in sorted(out.iterdir()) if out.is_dir() else []:
            if path.is_file() and path.suffix in ARTIFACTS and path.name not in NOT_ARTIFACTS:
                self.artifact(path)
        self._append("metrics", values={"seconds": round(seconds, 3)}, epoch=0)
        self._append(
            "finish", status=status, reused=reused_steps(self._inputs, out, self._parent.get("id", ""))
        )
        if self._copy is None and in_kubeflow():
            self._take_time()
        self._flush(final=True)
        if self._copy is not None:
            self._copy.end()
            self._send_for_others()
        with self._guard:
            self._over = True
            if self._entry is not None and not self._sending:  # else the thread that works on it does
                self._entry.release()

    def _take_time(self) -> None:
        """Be patient with a busy server: the spool ends with this pod, and no other can send it."""
        self._left, self._request = LAST_SECONDS, LAST_REQUEST_SECONDS
        until = time.monotonic() + LAST_SECONDS
        while self._sending and time.monotonic() < until:  # a request of before has no answer yet
            time.sleep(0.1)

    def run_key(self) -> str:
        """What the pipeline's run is known by; empty when this step is not recorded."""
        return str(self._parent.get("key", ""))

    def page(self) -> str:
        """The address of the step's report in MLflow; empty: it is not there, or MLflow is a file."""
        if not self._sent or self._replay is None or not self._uri.startswith(("http://", "https://")):
            return ""
        run = f"experiments/{self._replay.experiment_id}/runs/{self._replay.run_id}"
        return f"{public_uri(self._uri).rstrip('/')}/#/{run}/artifacts/report.html"

    def identity(self) -> dict[str, str]:
        """What ``run.json`` says: ``id`` (ours, stable), ``run_id`` and ``parent_run_id`` (MLflow's).

        MLflow's are empty as long as the tracker did not answer; a run is found by its tag ``retort.id``.
        """
        return {
            "step": self.step,
            "id": self.id,
            "parent_id": self._parent.get("id", ""),
            "run_id": self._replay.run_id if self._replay else "",
            "parent_run_id": self._replay.parent_run_id if self._replay else "",
        }

    def _of_machine(self, values: Mapping[str, float], number: int) -> None:
        self._append("metrics", values=_numbers(values), epoch=number)

    def _append(self, kind: str, **values: Any) -> None:
        if self._entry is None:
            return
        try:
            self._entry.append(kind, **values)
        except OSError as error:  # a full disk: the work will say so, if it needs the disk too
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._entry = None
        self._warn(f"tracking: {error.strerror or error}; this step is not recorded")

    def _flush(self, final: bool = False) -> None:
        """Replay what is spooled. While the step runs: now and then, and not after the server failed."""
        if self._entry is None or self._replay is None or self._sending:
            return
        if not final and (self._away or time.monotonic() < self._next):
            return
        started = time.monotonic()
        try:
            reach(self._uri)
            imports = time.monotonic()
            with client_settings(self._request, retries=0):
                connect(self._uri)
                started += time.monotonic() - imports  # they are no server's fault
                left = max(self._left - (time.monotonic() - started), 1.0)
                self._sending = True
                bounded(self._uri, left, functools.partial(self._send, final))
        except Exception as error:  # noqa: BLE001 - whatever a tracker does, the run goes on
            self._away = True
            self._warn(
                f"tracking: {public_uri(self._uri)}: {first_line(error)}; the run goes on, "
                "'retort sync' sends later what was spooled"
            )
        self._left -= time.monotonic() - started
        self._next = time.monotonic() + EVERY_SECONDS

    def _send(self, final: bool) -> None:
        if self._entry is None or self._replay is None:
            return
        try:
            self._replay.advance()
            if final:
                self._sent = True
                self._entry.remove()
        finally:
            with self._guard:
                self._sending = False
                if self._over:  # the step did not wait: what is left is anybody's now
                    self._entry.release()
        if final:
            send_leftovers(self._uri)

    def _send_for_others(self) -> None:
        """Send what pods that are gone could not, if this one could."""
        if not self._sent or not shared_spool.adopt(self._uri, OTHERS):
            return
        try:
            with client_settings(REQUEST_SECONDS, retries=0):
                bounded(self._uri, BUDGET_SECONDS, functools.partial(send_leftovers, self._uri))
        except Exception as error:  # noqa: BLE001 - whatever a tracker does, the run goes on
            log.info(f"tracking: {public_uri(self._uri)}: {first_line(error)}; 'retort sync' sends the rest")

    def _warn(self, message: str) -> None:
        if not self._warned:
            log.warning(message)
        self._warned = True


def _numbers(values: Mapping[str, float]) -> dict[str, float]:
    return {key: float(value) for key, value in values.items()}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) and value else json.dumps(value)

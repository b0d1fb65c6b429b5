"""Tracking in MLflow: one parent run per pipeline run, one child per step. Tracking never decides.

Spool first: every event is a line of ``.retort/spool/<id>/events.jsonl`` before MLflow hears of it, and is
replayed from there, while the step runs and when it ends. What could not be sent stays, and ``retort sync``
(or the next step that gets through) sends it. A replay may be repeated: runs are found by their tag
``retort.id`` before they are made, values keep the time at which they were measured.
"""

from __future__ import annotations

import functools
import getpass
import json
import logging
import os
import posixpath
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from components.common.environment import environment
from components.common.errors import RetortError
from components.common.params import Registry
from components.common.progress import say
from components.common.storage import human_bytes, remove, sha256_json, state_dir, write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

BUDGET_SECONDS = 10.0  # a step waits for a server no longer than this in all
REQUEST_SECONDS = 3  # ... and for one answer no longer than this
PREFLIGHT_SECONDS = 2.0  # ... and for a connection no longer than this
EVERY_SECONDS = 2.0  # between two replays while a step runs
LEFTOVER_SECONDS = 2.0  # at a step's end, for what other steps left in the spool
MAX_ARTIFACT_BYTES = 10_000_000
ARTIFACTS = (".json", ".html", ".csv", ".png", ".svg")
NOT_ARTIFACTS = ("page.json", "run.json")  # the page's sections are in report.html; run.json comes later
THIS_PROCESS = uuid.uuid4().hex
REMEMBERED_RUNS = 50
NOT_THE_CAUSE = "(raised as a result of"  # how SQLAlchemy begins what a database says while it flushes
ENDED_BADLY = ("FAILED", "KILLED")


class Tracker:
    """Records what one step does as a child run of the pipeline's run."""

    def __init__(self, step: str, registry: Registry) -> None:
        self.step = step
        self.registry = registry
        self.id = uuid.uuid4().hex
        self._uri = tracking_uri(registry)
        self._parent: dict[str, Any] = {}
        self._inputs: Mapping[str, str] = {}
        self._entry: _Entry | None = None
        self._replay: _Replay | None = None
        self._left = BUDGET_SECONDS
        self._next = 0.0
        self._away = self._stuck = self._warned = False

    def start(self, params: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
        """Open the run: ``params`` are the step's sections, ``inputs`` file names and their sha256."""
        self._inputs = dict(inputs)
        try:
            self._parent = _pipeline_run(self.step, self._uri, self.registry.name)
            entry = _Entry(state_dir("spool").absolute() / self.id)
            entry.make()
        except OSError as error:
            self._give_up(error)
            return
        self._entry = entry
        self._replay = _Replay(entry, self._uri)
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
        self._flush()

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers; ``step`` is the epoch."""
        self._append("metrics", values=_numbers(values), epoch=step or 0)
        self._flush()

    def summary(self, values: Mapping[str, float]) -> None:
        """Record a step's headline numbers on the parent too, as ``<step>.<name>``, to compare runs by."""
        self._append("summary", values=_numbers(values))

    def tags(self, values: Mapping[str, str]) -> None:
        """Record facts that are not numbers."""
        self._append("tags", values={key: str(value) for key, value in values.items()})

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
                say(f"tracking: {path} is {human_bytes(size)}: not copied into MLflow")
                return
            file = self._entry.copy(path)
        except OSError as error:
            self._give_up(error)
            return
        self._append("artifact", file=file, folder=folder)

    def finish(self, status: str, seconds: float, out: Path) -> None:
        """Close the run: FINISHED, FAILED or KILLED; the report files in ``out`` go along."""
        for path in sorted(out.iterdir()) if out.is_dir() else []:
            if path.is_file() and path.suffix in ARTIFACTS and path.name not in NOT_ARTIFACTS:
                self.artifact(path)
        self._append("metrics", values={"seconds": round(seconds, 3)}, epoch=0)
        self._append("finish", status=status, reused=_reused(self._inputs, out, self._parent.get("id", "")))
        self._flush(final=True)
        if self._entry is not None and not self._stuck:  # a thread that is stuck still works on it
            self._entry.release()

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
        if self._entry is None or self._replay is None or self._stuck:
            return
        if not final and (self._away or time.monotonic() < self._next):
            return
        started = time.monotonic()
        try:
            reach(self._uri)
            imports = time.monotonic()
            with client_settings(REQUEST_SECONDS, retries=0):
                connect(self._uri)
                started += time.monotonic() - imports  # they are no server's fault
                left = max(self._left - (time.monotonic() - started), 1.0)
                _bounded(self._uri, left, functools.partial(self._send, final))
        except Exception as error:  # noqa: BLE001 - whatever a tracker does, the run goes on
            self._away = True
            self._stuck = isinstance(error, _StuckError)
            self._warn(
                f"tracking: {public_uri(self._uri)}: {first_line(error)}; the run goes on, "
                "'retort sync' sends later what was spooled"
            )
        self._left -= time.monotonic() - started
        self._next = time.monotonic() + EVERY_SECONDS

    def _send(self, final: bool) -> None:
        if self._entry is None or self._replay is None:
            return
        self._replay.advance()
        if final:
            self._entry.remove()
            _send_leftovers(self._uri)

    def _warn(self, message: str) -> None:
        if not self._warned:
            say(message)
        self._warned = True


def sync(registry: Registry) -> dict[str, int]:
    """Send everything in the spool: ``{"sent": steps, "running": steps left to their own process}``.

    Raises:
        RetortError: when the tracker does not answer, or does not take a step; what it did not take stays.
    """
    counts = {"sent": 0, "running": 0}
    uri = tracking_uri(registry)
    failed: list[str] = []
    for entry in _leftovers():
        with entry.held() as mine:
            if not mine:
                counts["running"] += 1
                continue
            try:
                reach(uri)
                with client_settings(30, retries=2):
                    _replay_whole(entry, uri)
                counts["sent"] += 1
            except Exception as error:  # noqa: BLE001 - told below, all at once
                failed.append(first_line(error))
    if failed:
        raise RetortError(
            f"registry.tracking_uri: {public_uri(uri)} did not take {len(failed)} steps ({failed[0]}); "
            f"{counts['sent']} were sent.\nStart it, or correct the address, and run 'retort sync' again: "
            f"what it did not take stays in {state_dir('spool')}"
        )
    return counts


def tracking_uri(registry: Registry) -> str:
    """MLflow's URI, a SQLite file's path made absolute.

    Where KFP itself opened an MLflow run (``MLFLOW_RUN_ID``), that run's server is the tracker.
    """
    uri = registry.tracking_uri
    if os.environ.get("MLFLOW_RUN_ID"):
        uri = os.environ.get("MLFLOW_TRACKING_URI") or uri
    prefix = "sqlite:///"
    return f"{prefix}{Path(uri.removeprefix(prefix)).absolute()}" if uri.startswith(prefix) else uri


def client_settings(request_seconds: int, retries: int) -> AbstractContextManager[None]:
    """How long MLflow's client waits for one answer, and how often it tries, inside the block."""
    return environment(
        {
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(request_seconds),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        }
    )


@functools.cache
def connect(uri: str) -> MlflowClient:
    """MLflow's client for ``uri``: no banners, no progress bars, no usage statistics sent to anybody.

    A SQLite file that is not there is made: one process at a time, since that runs MLflow's migrations.
    """
    for name, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_LOGGING_LEVEL", "WARNING"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
        ("GIT_PYTHON_REFRESH", "quiet"),
    ):
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # it logs the traceback of what it raises; whoever catches that says it in a line
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    if not uri.startswith("sqlite:///"):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    from filelock import FileLock

    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    making = database.with_name(f"{database.name}.making-{THIS_PROCESS}")
    with FileLock(database.with_name(f"{database.name}.lock")):
        for other in set(database.parent.glob(f"{database.name}.making-*")) - {making}:
            # its process ended, or its disk was full, in the midst of the migrations: they cannot be resumed
            remove(database)
            remove(other)
        if not database.exists():
            making.touch()
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)  # opens the file
        remove(making)
        return client


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """The experiment ``name``, made if missing; beside a SQLite file stands the folder of its artifacts."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        location = None
        if uri.startswith("sqlite:///"):
            location = Path(uri.removeprefix("sqlite:///")).with_name("artifacts").as_uri()
        try:
            # the kind opens MLflow's pages on runs and metrics, not on conversations and prompts
            return client.create_experiment(
                name, location, tags={"mlflow.experimentKind": "custom_model_development"}
            )
        except MlflowException:  # another process was quicker
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


# --- the spool ---------------------------------------------------------------------------------------


class _Entry:
    """One step in the spool: its events, copies of its artifacts, and how far they were replayed."""

    def __init__(self, folder: Path) -> None:
        from filelock import FileLock

        self.folder = folder
        self.file = folder / "events.jsonl"
        self._lock = FileLock(folder / "lock")

    def make(self) -> None:
        """Make the folder and hold it: what a living process holds, nobody else replays."""
        self.folder.mkdir(parents=True)
        self._lock.acquire(timeout=0)

    def release(self) -> None:
        self._lock.release()

    @contextmanager
    def held(self) -> Iterator[bool]:
        """True inside the block if the process that wrote this is gone, so that we may replay it."""
        from filelock import Timeout

        try:
            self._lock.acquire(timeout=0)
        except (Timeout, OSError):
            yield False
            return
        try:
            yield self.file.exists()
        finally:
            self._lock.release()

    def append(self, kind: str, **values: Any) -> None:
        event = {"kind": kind, "t": int(time.time() * 1000), **values}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def close(self) -> None:
        """End what was never ended, because its process was killed."""
        events = self.events()
        if not any(event["kind"] == "finish" for event in events):
            with self.file.open("a", encoding="utf-8") as file:
                file.write("\n")  # the last line may have been cut
            self.append("finish", t=max(event["t"] for event in events), status="KILLED", reused={})

    def copy(self, path: Path) -> str:
        """Copy an artifact into the spool; returns its place there."""
        folder = self.folder / "artifacts"
        folder.mkdir(exist_ok=True)
        place = folder / str(len(list(folder.iterdir())))
        place.mkdir()
        shutil.copyfile(path, place / path.name)
        return str((place / path.name).relative_to(self.folder))

    def events(self) -> list[dict[str, Any]]:
        """All events; a line that was cut short when its process was killed counts as nothing."""
        events = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                events.append({"kind": "cut", "t": 0})
        return events

    def remove(self) -> None:
        self._lock.release()
        remove(self.folder)


def _leftovers(uri: str | None = None) -> list[_Entry]:
    """Entries in the spool, oldest first; with ``uri`` only those that were meant for it."""
    found = []
    for folder in state_dir("spool").absolute().iterdir():
        entry = _Entry(folder)
        if not entry.file.exists():
            continue
        first = next(iter(entry.events()), {})
        if first.get("kind") == "start" and uri in (None, first["uri"]):
            found.append((first["t"], folder.name, entry))
    return [entry for _, _, entry in sorted(found, key=lambda item: item[:2])]


def _send_leftovers(uri: str) -> None:
    """Send what earlier steps could not, for a short while; where it fails, 'retort sync' says why."""
    until = time.monotonic() + LEFTOVER_SECONDS
    for entry in _leftovers(uri):
        with entry.held() as mine:
            if not mine or time.monotonic() > until:
                continue
            try:
                _replay_whole(entry, uri)
            except Exception:  # noqa: BLE001 - that step has said so itself; this one was recorded
                return


def _replay_whole(entry: _Entry, uri: str) -> None:
    """Replay an entry whose process is gone, and remove it."""
    entry.close()
    _Replay(entry, uri).advance()
    entry.remove()


class _Replay:
    """Sends the events of an entry to MLflow, from where it got to before."""

    def __init__(self, entry: _Entry, uri: str) -> None:
        self.entry = entry
        self.uri = uri
        self._cursor = entry.folder / "cursor.json"
        cursor = _read(self._cursor)
        if cursor.get("uri") != uri:  # another server: from the beginning
            cursor = {}
        self.done: int = cursor.get("done", 0)
        self.run_id: str = cursor.get("run_id", "")
        self.parent_run_id: str = cursor.get("parent_run_id", "")
        self._doubtful = bool(cursor)  # after a failure nobody knows whether the last values arrived

    def advance(self) -> None:
        """Send what was not sent. Raises whatever MLflow raises when it does not take it."""
        from mlflow.exceptions import MlflowException

        client = connect(self.uri)
        events = self.entry.events()
        start = events[0]
        before = self.done
        try:
            while self.done < len(events):
                count = 1
                if events[self.done]["kind"] == "metrics":
                    while events[self.done + count : self.done + count + 1] and (
                        events[self.done + count]["kind"] == "metrics"
                    ):
                        count += 1
                try:
                    self._apply(client, start, events[self.done : self.done + count])
                except MlflowException as error:
                    if error.error_code != "INVALID_PARAMETER_VALUE" or self.done == 0:
                        raise
                    # MLflow will never take it: waiting would keep all that follows from it
                    say(f"tracking: MLflow refused a record of '{start['step']}': {first_line(error)}")
                self.done += count
        except BaseException:
            self._doubtful = True
            raise
        finally:
            if self.done > before and self.entry.folder.exists():
                cursor = {
                    "uri": self.uri,
                    "done": self.done,
                    "run_id": self.run_id,
                    "parent_run_id": self.parent_run_id,
                }
                write_json(self._cursor, cursor)

    def _apply(self, client: MlflowClient, start: dict[str, Any], events: Sequence[dict[str, Any]]) -> None:
        event = events[0]
        kind = event["kind"]
        if kind == "start":
            self._open(client, event)
        elif kind == "metrics":
            self._log(client, self.run_id, events)
        elif kind == "summary":
            self._log(client, self.run_id, events)
            headline = {f"{start['step']}.{name}": value for name, value in event["values"].items()}
            self._log(client, self.parent_run_id, [{**event, "values": headline}])
        elif kind == "tags":
            _set_tags(client, self.run_id, event["values"])
        elif kind == "dataset":
            self._dataset(client, event)
        elif kind == "artifact":
            client.log_artifact(self.run_id, str(self.entry.folder / event["file"]), event["folder"] or None)
        elif kind == "finish":
            self._close(client, start, event)

    def _open(self, client: MlflowClient, start: dict[str, Any]) -> None:
        parent = self._find_parent(client, start)
        self.parent_run_id = parent.info.run_id
        own = parent.info.experiment_id
        child = _find_run(client, own, start["id"])
        if child is None:
            tags = {
                "mlflow.parentRunId": self.parent_run_id,
                "mlflow.source.name": f"retort {start['step']}",
                "mlflow.source.type": "LOCAL",
                "retort.id": start["id"],
                "retort.step": start["step"],
                **{_name(key): value for key, value in start["tags"].items()},
                **_origin(start["parent"]),
            }
            child = client.create_run(own, start["t"], tags, start["step"])
        else:
            self._doubtful = True
        self.run_id = child.info.run_id
        _log_params(client, self.run_id, start["params"])
        # the parent keeps the first value, should a step of the same run have been told another
        known = parent.data.params
        new = {key: value for key, value in start["params"].items() if _name(key) not in known}
        _log_params(client, self.parent_run_id, new)
        client.set_tag(self.parent_run_id, f"step.{start['step']}", f"RUNNING {self.run_id}")
        if parent.data.tags.get("retort.id") == start["parent"]["id"]:  # an adopted one has its own owner
            client.update_run(self.parent_run_id, status="RUNNING")

    def _find_parent(self, client: MlflowClient, start: dict[str, Any]) -> Run:
        from filelock import FileLock

        record = start["parent"]
        adopted = _get_run(client, record["adopt"])
        if adopted is not None:
            # KFP opens a run for the pipeline and one for each task: ours stand beside the tasks'
            above = _get_run(client, adopted.data.tags.get("mlflow.parentRunId", ""))
            run = above or adopted
            client.set_tag(run.info.run_id, "retort.key", record["key"])
            return run
        with FileLock(state_dir() / "parent.lock", timeout=BUDGET_SECONDS):
            known = _get_run(client, record["run_id"]) if record["uri"] == self.uri else None
            if known is not None:
                return known
            own = experiment_id(client, self.uri, start["experiment"])
            parent = _find_run(client, own, record["id"])
            if parent is None:
                tags = {
                    "mlflow.source.name": record["command"],
                    "mlflow.source.type": "LOCAL",
                    "retort.id": record["id"],
                    "retort.key": record["key"],
                    **_origin(record),
                }
                made = client.create_run(own, record["started"], tags, record["name"])
                # where steps share no folder (pods), two may make it at once: both take the older one
                parent = _find_run(client, own, record["id"]) or made
                if parent.info.run_id != made.info.run_id:
                    client.delete_run(made.info.run_id)
            _remember({**record, "uri": self.uri, "run_id": parent.info.run_id})
            return parent

    def _log(self, client: MlflowClient, run_id: str, events: Sequence[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(_name(key), value, event["t"], event.get("epoch", 0))
            for event in events
            for key, value in event["values"].items()
        ]
        if self._doubtful:
            metrics = _missing(client, run_id, metrics)
        for begin in range(0, len(metrics), 1000):
            client.log_batch(run_id, metrics=metrics[begin : begin + 1000])

    def _dataset(self, client: MlflowClient, event: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=event["name"],
            digest=event["fingerprint"][:36],
            source_type="local",
            source=json.dumps({"uri": event["source"]}),
            profile=json.dumps({"fingerprint": event["fingerprint"], **event["counts"]}),
        )
        used = DatasetInput(dataset, [InputTag("mlflow.data.context", "pipeline")])
        for run_id in (self.run_id, self.parent_run_id):
            client.log_inputs(run_id, [used])
            client.set_tag(run_id, "data.fingerprint", event["fingerprint"])

    def _close(self, client: MlflowClient, start: dict[str, Any], event: dict[str, Any]) -> None:
        status, ended = event["status"], event["t"]
        client.set_terminated(self.run_id, status, ended)
        steps = {f"step.{step}": f"reused {run_id}".strip() for step, run_id in event["reused"].items()}
        _set_tags(client, self.parent_run_id, {**steps, f"step.{start['step']}": f"{status} {self.run_id}"})
        parent = client.get_run(self.parent_run_id)
        if parent.data.tags.get("retort.id") != start["parent"]["id"]:
            return  # adopted: its owner ends it
        verdicts = {value.split()[0] for key, value in parent.data.tags.items() if key.startswith("step.")}
        if verdicts.intersection(ENDED_BADLY):
            verdict = "FAILED"
        elif "RUNNING" in verdicts:  # another step, side by side
            return
        else:
            verdict = "FINISHED"
        client.set_terminated(self.parent_run_id, verdict, max(ended, parent.info.end_time or 0))


def _find_run(client: MlflowClient, experiment: str, stable_id: str) -> Run | None:
    found = client.search_runs([experiment], f"tags.`retort.id` = '{stable_id}'", max_results=10)
    return min(found, key=lambda run: (run.info.start_time, run.info.run_id), default=None)


def _get_run(client: MlflowClient, run_id: str) -> Run | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _missing(client: MlflowClient, run_id: str, metrics: Sequence[Metric]) -> list[Metric]:
    """Those of ``metrics`` that the run does not have (a file store would append them a second time)."""
    there = {
        (metric.key, metric.timestamp, metric.step)
        for key in {metric.key for metric in metrics}
        for metric in client.get_metric_history(run_id, key)
    }
    return [metric for metric in metrics if (metric.key, metric.timestamp, metric.step) not in there]


def _set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    items = [RunTag(_name(key), value[:8000]) for key, value in tags.items()]
    for begin in range(0, len(items), 100):
        client.log_batch(run_id, tags=items[begin : begin + 100])


def _log_params(client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    items = [Param(_name(key), value[:6000]) for key, value in params.items()]
    for begin in range(0, len(items), 100):
        client.log_batch(run_id, params=items[begin : begin + 100])


def _name(key: str) -> str:
    """``key`` as MLflow takes names: letters, digits and ``_-. :/``, no empty or relative parts."""
    return posixpath.normpath(re.sub(r"[^\w./ :\-]", "_", key)).lstrip("/.")[:250] or "_"


def _numbers(values: Mapping[str, float]) -> dict[str, float]:
    return {key: float(value) for key, value in values.items()}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) and value else json.dumps(value)


# --- the pipeline's run ------------------------------------------------------------------------------


def _pipeline_run(step: str, uri: str, experiment: str) -> dict[str, Any]:
    """What the parent run is called and known by; the same for all steps of one pipeline run.

    The key is ``$RETORT_RUN`` (set by the KFP components), else the ``dvc`` process above this one, else
    this process. A run that KFP opened itself (``$MLFLOW_RUN_ID``) is adopted.
    """
    adopt = os.environ.get("MLFLOW_RUN_ID", "")
    run = os.environ.get("RETORT_RUN") or adopt
    dvc = None if run else _dvc_above()
    if run:
        key, command = f"run:{run}", "retort submit"
    elif dvc:
        key, command = dvc
    else:
        key, command = _process_key("process", os.getpid()), f"retort {step}"
    stable_id = sha256_json([key, uri, experiment])[:32]
    known = _read(state_dir() / "run.json").get(stable_id)
    if known:
        return known
    commit, dirty = _git()
    revision = f" {commit[:7]}{'+' if dirty else ''}" if commit else ""
    started = time.time()
    when = time.strftime("%m-%d %H:%M", time.localtime(started))
    record = {
        "id": stable_id,
        "key": key,
        "adopt": adopt,
        "name": f"{command} {when}{revision}",  # told apart in the narrow legends of charts too
        "command": command,
        "started": int(started * 1000),
        "commit": commit,
        "dirty": dirty,
        "uri": uri,
        "run_id": "",
    }
    _remember(record)
    return record


def _process_key(kind: str, pid: int) -> str:
    import psutil

    return f"{kind}:{socket.gethostname()}:{pid}:{psutil.Process(pid).create_time():.2f}"


def _dvc_above() -> tuple[str, str] | None:
    """Key and command of the nearest ancestor that is ``dvc``; None when there is none."""
    import psutil

    try:
        for process in psutil.Process().parents():
            words = process.cmdline()
            names = [Path(word).name for word in words[:3]]
            if "dvc" in names and (names[0] == "dvc" or names[0].startswith("python")):
                verbs = [word for word in words[names.index("dvc") + 1 :] if not word.startswith("-")]
                return _process_key("dvc", process.pid), " ".join(["dvc", *verbs[:1]])
    except psutil.Error:  # it ended meanwhile, or is another user's
        return None
    return None


def _read(path: Path) -> dict[str, Any]:
    """A JSON object that we keep for ourselves; empty when it is missing or damaged: it can be remade."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(record: dict[str, Any]) -> None:
    """Keep the pipeline's run in ``.retort/run.json``, by its stable id."""
    from filelock import FileLock

    path = state_dir() / "run.json"
    with FileLock(path.with_name("run.json.lock")):
        runs = {**_read(path), record["id"]: record}
        for stable_id in sorted(runs, key=lambda name: runs[name]["started"])[:-REMEMBERED_RUNS]:
            del runs[stable_id]
        write_json(path, runs)


def _origin(record: Mapping[str, Any]) -> dict[str, str]:
    """Tags that say which code ran, and who ran it."""
    tags = {}
    if record["commit"]:
        tags = {"mlflow.source.git.commit": record["commit"], "git.dirty": str(record["dirty"]).lower()}
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        tags["mlflow.user"] = str(os.getuid())
    return tags


def _git() -> tuple[str, bool]:
    """Commit, and whether tracked files differ from it; ``("", False)`` outside a repository."""

    def git(*words: str) -> str:
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(["git", *words], capture_output=True, text=True, env=environment, timeout=5)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return commit, bool(commit and git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.TimeoutExpired):
        return "", False


def _reused(inputs: Mapping[str, str], out: Path, parent_id: str) -> dict[str, str]:
    """Steps whose products this one read, directly or not, and that this pipeline run did not run itself.

    Read from what the steps left beside each other: ``run.json`` says who made a folder, ``report.json``
    which files went into it. Maps the step to the id of its MLflow run.
    """
    root = next((folder for folder in (out, *out.parents) if folder.name == "outputs"), None)
    if root is None:
        return {}
    makers: dict[Path, dict[str, Any]] = {}
    for path in (*root.glob("*/run.json"), *root.glob("*/*/run.json")):
        makers[path.parent] = _read(path)
    reused: dict[str, str] = {}
    seen: set[Path] = {out}
    labels = list(inputs)
    while labels:
        label = labels.pop()
        folder = _maker(label, root, makers)
        if folder is None or folder in seen:
            continue
        seen.add(folder)
        if makers[folder].get("parent_id") != parent_id:
            reused[makers[folder].get("step", folder.name)] = makers[folder].get("run_id", "")
        labels += _read(folder / "report.json").get("inputs", {})
    return dict(sorted(reused.items()))


def _maker(label: str, root: Path, makers: Mapping[Path, dict[str, Any]]) -> Path | None:
    """The step's folder that the file called ``label`` came from."""
    for folder, made in makers.items():
        if label in made.get("made", []):
            return folder
    parents = (root.parent / label).parents
    return next((folder for folder in parents if folder in makers), None)


# --- a server that may not answer --------------------------------------------------------------------


class _StuckError(RetortError):
    """The tracker holds a request beyond the time that a step has for it."""


def _bounded(uri: str, seconds: float, work: Callable[[], None]) -> None:
    """Do ``work``, and wait no longer than ``seconds`` for a server (a file is waited for)."""
    if uri.startswith("sqlite:"):
        work()
        return
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again, by the thread that waits
            raised.append(error)

    thread = threading.Thread(target=run, name="tracking", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise _StuckError(f"no answer within {seconds:.0f} s")
    if raised:
        raise raised[0]


def reach(uri: str) -> None:
    """Raise within seconds when nothing listens at ``uri`` (or at the proxy on the way to it)."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))

    def knock() -> None:
        socket.create_connection(address, timeout=PREFLIGHT_SECONDS).close()

    _bounded(uri, PREFLIGHT_SECONDS, knock)  # the look-up of a name knows no timeout of its own


def public_uri(uri: str) -> str:
    """``uri`` without user and password."""
    return re.sub(r"//[^/@]*@", "//", uri)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, short, without passwords."""
    lines = [line for line in str(error).strip().splitlines() if not line.startswith(NOT_THE_CAUSE)]
    lines = lines or [type(error).__name__]
    return re.sub(r"//[^/@\s]*@", "//", lines[0])[:160]

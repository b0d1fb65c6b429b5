"""From the spool into MLflow: a step's events are sent in order, from where it got to before."""

from __future__ import annotations

import json
import logging
import posixpath
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from components.common.errors import RetortError
from components.common.params import Registry
from components.common.storage import read_own_json, state_dir, write_json
from components.tracking import shared_spool
from components.tracking.client import (
    client_settings,
    connect,
    experiment_id,
    first_line,
    public_uri,
    reach,
    tracking_uri,
)
from components.tracking.run_identity import origin, remember
from components.tracking.spool import Entry, leftovers

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

log = logging.getLogger(__name__)

LOCK_SECONDS = 10.0  # for another step that makes the pipeline's run
LEFTOVER_SECONDS = 2.0  # at a step's end, for what other steps left in the spool
ENDED_BADLY = ("FAILED", "KILLED")


def sync(registry: Registry) -> dict[str, int]:
    """Send everything in the spool: ``{"sent": steps, "running": steps left to their own process}``.

    Raises:
        RetortError: when the tracker does not answer, or does not take a step; what it did not take stays.
    """
    counts = {"sent": 0, "running": 0}
    uri = tracking_uri(registry)
    failed: list[str] = []
    shared_spool.adopt()
    for entry in leftovers():
        with entry.held() as mine:
            if not mine:
                counts["running"] += 1
                continue
            try:
                reach(uri)
                with client_settings(30, retries=2):
                    replay_whole(entry, uri)
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


def send_leftovers(uri: str) -> None:
    """Send what earlier steps could not, for a short while; where it fails, 'retort sync' says why."""
    until = time.monotonic() + LEFTOVER_SECONDS
    for entry in leftovers(uri):
        with entry.held() as mine:
            if not mine or time.monotonic() > until:
                continue
            try:
                replay_whole(entry, uri)
            except Exception:  # noqa: BLE001 - that step has said so itself; this one was recorded
                return


def replay_whole(entry: Entry, uri: str) -> None:
    """Replay an entry whose process is gone, and remove it."""
    entry.close()
    Replay(entry, uri).advance()
    entry.remove()
    shared_spool.forget(entry.folder.name)


class Replay:
    """Sends the events of an entry to MLflow, from where it got to before."""

    def __init__(self, entry: Entry, uri: str) -> None:
        self.entry = entry
        self.uri = uri
        self._cursor = entry.folder / "cursor.json"
        cursor = read_own_json(self._cursor)
        if cursor.get("uri") != uri:  # another server: from the beginning
            cursor = {}
        self.done: int = cursor.get("done", 0)
        self.run_id: str = cursor.get("run_id", "")
        self.parent_run_id: str = cursor.get("parent_run_id", "")
        self.experiment_id: str = cursor.get("experiment_id", "")
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
                    log.warning(
                        f"tracking: MLflow refused a record of '{start['step']}': {first_line(error)}"
                    )
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
                    "experiment_id": self.experiment_id,
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
        parent, opened = self._find_parent(client, start)
        self.parent_run_id = parent.info.run_id
        own = self.experiment_id = parent.info.experiment_id
        child = find_run(client, own, start["id"])
        tags = {
            "mlflow.parentRunId": self.parent_run_id,
            "mlflow.source.name": f"retort {start['step']}",
            "mlflow.source.type": "LOCAL",
            "retort.id": start["id"],
            "retort.step": start["step"],
            **{_name(key): value for key, value in start["tags"].items()},
            **origin(start["parent"]),
        }
        if child is not None:
            self._doubtful = True
        elif opened is not None:
            child = opened
            _set_tags(client, child.info.run_id, tags)
        else:
            child = client.create_run(own, start["t"], tags, start["step"])
        self.run_id = child.info.run_id
        _log_params(client, self.run_id, start["params"])
        # the parent keeps the first value, should a step of the same run have been told another
        known = parent.data.params
        new = {key: value for key, value in start["params"].items() if _name(key) not in known}
        _log_params(client, self.parent_run_id, new)
        client.set_tag(self.parent_run_id, f"step.{start['step']}", f"RUNNING {self.run_id}")
        if parent.data.tags.get("retort.id") == start["parent"]["id"]:  # an adopted one has its own owner
            client.update_run(self.parent_run_id, status="RUNNING")

    def _find_parent(self, client: MlflowClient, start: dict[str, Any]) -> tuple[Run, Run | None]:
        """The pipeline's run, and the step's where KFP has opened that, too."""
        from filelock import FileLock

        record = start["parent"]
        adopted = _get_run(client, record["adopt"])
        if adopted is not None:
            above = _get_run(client, adopted.data.tags.get("mlflow.parentRunId", ""))
            run = above or adopted
            client.set_tag(run.info.run_id, "retort.key", record["key"])
            # a run holds one step: where a person's own run is named to several, the first takes it
            taken = adopted.data.tags.get("retort.step", start["step"]) != start["step"]
            return run, None if above is None or taken else adopted
        with FileLock(state_dir() / "parent.lock", timeout=LOCK_SECONDS):
            known = _get_run(client, record["run_id"]) if record["uri"] == self.uri else None
            if known is not None:
                return known, None
            own = experiment_id(client, self.uri, start["experiment"])
            parent = find_run(client, own, record["id"])
            if parent is None:
                tags = {
                    "mlflow.source.name": record["command"],
                    "mlflow.source.type": "LOCAL",
                    "retort.id": record["id"],
                    "retort.key": record["key"],
                    **origin(record),
                }
                made = client.create_run(own, record["started"], tags, record["name"])
                # where steps share no folder (pods), two may make it at once: both take the older one
                parent = find_run(client, own, record["id"]) or made
                if parent.info.run_id != made.info.run_id:
                    client.delete_run(made.info.run_id)
            remember({**record, "uri": self.uri, "run_id": parent.info.run_id})
            return parent, None

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
        if self.run_id != start["parent"]["adopt"]:  # KFP ends what it opened
            client.set_terminated(self.run_id, status, ended)
        steps = {f"step.{step}": f"reused {run_id}".strip() for step, run_id in event["reused"].items()}
        own = f"step.{start['step']}"
        told = client.get_run(self.parent_run_id).data.tags.get(own, "")
        if told.endswith(self.run_id):  # else it was tried again meanwhile, and that try's verdict stands
            steps[own] = f"{status} {self.run_id}"
        _set_tags(client, self.parent_run_id, steps)
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


def find_run(client: MlflowClient, experiment: str, stable_id: str) -> Run | None:
    """The run with this ``retort.id``; of several the oldest, which all agree on."""
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

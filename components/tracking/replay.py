"""From the spool into MLflow: a step's events are sent in order, from where it got to before."""

from __future__ import annotations

import json
import logging
import posixpath
import re
import time
from collections.abc import Callable, Mapping, Sequence
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

LOCK_SECONDS = 60.0  # for other steps that make the pipeline's run
LEFTOVER_SECONDS = 2.0  # at a step's end, for what other steps left in the spool
TRIES = 5  # to add to a run to which other steps add at the same time
ENDED_BADLY = ("FAILED", "KILLED")
PARENT = "mlflow.parentRunId"
CONTEXTS = {"train": "training", "val": "validation", "test": "testing"}  # of data sets, as MLflow says


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
            self._above(client, start, lambda run: self._log(client, run, [{**event, "values": headline}]))
        elif kind == "tags":
            _set_tags(client, self.run_id, event["values"])
            if event.get("above"):
                self._above(client, start, lambda run: _set_tags(client, run, event["values"]))
        elif kind == "dataset":
            self._dataset(client, start, event)
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
            PARENT: self.parent_run_id,
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

        def tell(run: str) -> None:
            _log_first_params(client, run, start["params"])
            client.set_tag(run, f"step.{start['step']}", f"RUNNING {self.run_id}")
            if parent.data.tags.get("retort.id") == start["parent"]["id"]:  # an adopted one has its own owner
                client.update_run(run, status="RUNNING")

        self._above(client, start, tell)

    def _above(self, client: MlflowClient, start: dict[str, Any], send: Callable[[str], None]) -> None:
        """Send to the pipeline's run, which another process may have moved into its own meanwhile."""
        from mlflow.exceptions import MlflowException

        try:
            send(self.parent_run_id)
        except MlflowException:
            if _is_there(_get_run(client, self.parent_run_id)):
                raise
            self.parent_run_id = self._find_parent(client, start)[0].info.run_id
            client.set_tag(self.run_id, PARENT, self.parent_run_id)
            send(self.parent_run_id)

    def _find_parent(self, client: MlflowClient, start: dict[str, Any]) -> tuple[Run, Run | None]:
        """The pipeline's run, and the step's where KFP has opened that, too."""
        from filelock import FileLock

        record = start["parent"]
        adopted = _get_run(client, record["adopt"])
        if adopted is not None:
            above = _get_run(client, adopted.data.tags.get(PARENT, ""))
            run = above or adopted
            client.set_tag(run.info.run_id, "retort.key", record["key"])
            # a run holds one step: where a person's own run is named to several, the first takes it
            taken = adopted.data.tags.get("retort.step", start["step"]) != start["step"]
            return run, None if above is None or taken else adopted
        with FileLock(state_dir() / "parent.lock", timeout=LOCK_SECONDS):
            known = _get_run(client, record["run_id"]) if record["uri"] == self.uri else None
            if known is not None and _is_there(known):
                return known, None
            own = experiment_id(client, self.uri, start["experiment"])
            parent = only_run(client, own, record["id"])
            if parent is None:
                tags = {
                    "mlflow.source.name": record["command"],
                    "mlflow.source.type": "LOCAL",
                    "retort.id": record["id"],
                    "retort.key": record["key"],
                    **record.get("tags", {}),
                    **origin(record),
                }
                made = client.create_run(own, record["started"], tags, record["name"])
                # where steps share no folder (pods), two may make it at once: who comes last sees both, or,
                # where a server did later what it had been asked, who looks next
                parent = only_run(client, own, record["id"]) or made
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

    def _dataset(self, client: MlflowClient, start: dict[str, Any], event: dict[str, Any]) -> None:
        """One data set a split at the step's run, and the whole at the pipeline's."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        def used(name: str, context: str, profile: dict[str, Any]) -> DatasetInput:
            dataset = Dataset(
                name=name,
                digest=event["fingerprint"][:36],
                source_type="local",
                source=json.dumps({"uri": event["source"]}),
                profile=json.dumps({"fingerprint": event["fingerprint"], **profile}),
            )
            return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])

        splits = [
            used(f"{event['name']} {split}", CONTEXTS.get(split, split), {"rows": rows})
            for split, rows in event["counts"].items()
            if rows
        ]
        client.log_inputs(self.run_id, splits)
        whole = [used(event["name"], "pipeline", event["counts"])]
        self._above(client, start, lambda run: client.log_inputs(run, whole))
        for run_id in (self.run_id, self.parent_run_id):
            client.set_tag(run_id, "data.fingerprint", event["fingerprint"])

    def _close(self, client: MlflowClient, start: dict[str, Any], event: dict[str, Any]) -> None:
        status, ended = event["status"], event["t"]
        if self.run_id != start["parent"]["adopt"]:  # KFP ends what it opened
            client.set_terminated(self.run_id, status, ended)
        if not start["parent"]["adopt"]:
            only_run(client, self.experiment_id, start["parent"]["id"])
        steps = {f"step.{step}": f"reused {run_id}".strip() for step, run_id in event["reused"].items()}
        own = f"step.{start['step']}"

        def tell(run: str) -> None:
            told = client.get_run(run).data.tags.get(own, "")
            # else it was tried again meanwhile, and that try's verdict stands
            mine = {own: f"{status} {self.run_id}"} if told.endswith(self.run_id) else {}
            _set_tags(client, run, {**steps, **mine})

        self._above(client, start, tell)
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
    return min(found, key=_age, default=None)


def only_run(client: MlflowClient, experiment: str, stable_id: str) -> Run | None:
    """The run with this ``retort.id``; of several the oldest, into which the others are moved."""
    found = sorted(client.search_runs([experiment], f"tags.`retort.id` = '{stable_id}'"), key=_age)
    if len(found) > 1:
        oldest, *others = found
        for other in others:
            _copy(client, other, oldest)
            client.delete_run(other.info.run_id)  # from now on nobody writes to it
            _copy(client, client.get_run(other.info.run_id), oldest)  # what was written meanwhile
            below = f"tags.`{PARENT}` = '{other.info.run_id}'"
            for child in client.search_runs([experiment], below):
                client.set_tag(child.info.run_id, PARENT, oldest.info.run_id)
        return client.get_run(oldest.info.run_id)
    return found[0] if found else None


def _copy(client: MlflowClient, run: Run, to: Run) -> None:
    """Copy what steps have told of a pipeline's run to another one, which keeps what it has."""
    there = client.get_run(to.info.run_id)
    own = to.info.run_id
    _log_params(client, own, {k: v for k, v in run.data.params.items() if k not in there.data.params})
    _set_tags(client, own, {k: v for k, v in run.data.tags.items() if k not in there.data.tags})
    metrics = [each for key in run.data.metrics for each in client.get_metric_history(run.info.run_id, key)]
    if missing := _missing(client, own, metrics):
        client.log_batch(own, metrics=missing)
    if run.inputs is not None and run.inputs.dataset_inputs:
        client.log_inputs(own, run.inputs.dataset_inputs)
    if run.outputs is not None and run.outputs.model_outputs:
        client.log_outputs(own, run.outputs.model_outputs)


def _age(run: Run) -> tuple[int, str]:
    return run.info.start_time, run.info.run_id


def _is_there(run: Run | None) -> bool:
    """Whether a run is one that can be written to: neither gone nor deleted."""
    return run is not None and run.info.lifecycle_stage == "active"


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


def _log_first_params(client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    """Log those that the run lacks: it keeps the first value, should a step of it have been told another.

    Steps that begin at once may find the same one missing; MLflow refuses who comes last.
    """
    from mlflow.exceptions import MlflowException

    for attempt in range(TRIES):
        known = client.get_run(run_id).data.params
        try:
            _log_params(client, run_id, {k: v for k, v in params.items() if _name(k) not in known})
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE" or attempt == TRIES - 1:
                raise
        else:
            return


def _name(key: str) -> str:
    """``key`` as MLflow takes names: letters, digits and ``_-. :/``, no empty or relative parts."""
    return posixpath.normpath(re.sub(r"[^\w./ :\-]", "_", key)).lstrip("/.")[:250] or "_"

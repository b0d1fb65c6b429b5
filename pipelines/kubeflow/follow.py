"""Follow a run on a KFP server until it ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import kfp_server_api as api
from urllib3.exceptions import HTTPError

from components.common.errors import RetortError, Terminated
from pipelines.catalogue import PIPELINES
from pipelines.kubeflow.client import TOKEN, Server, refusal

log = logging.getLogger(__name__)

POLL_SECONDS = 5.0
AWAY_SECONDS = 600.0  # without an answer, until the waiting ends (the run itself goes on)
PENDING_SECONDS = 300.0  # without a pod that starts, until that is said, and then again
STAGES = {stage.name for pipeline in PIPELINES for stage in pipeline.stages}
ENDED = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")
REFUSED = {
    401: f"the token has expired (kubeflow.token_file, {TOKEN})",
    403: "no right to see it",
    404: "no such run",
}


def follow(server: Server, run_id: str) -> None:
    """Say each task's state as it changes, until the run ends; a poll that fails says nothing about it.

    Raises:
        RetortError: when the run failed or was cancelled, or when nothing is heard of it any more.
    """
    try:
        run = _follow(server, run_id)
    except (KeyboardInterrupt, Terminated):
        log.warning(
            f"the run goes on: {server.link(run_id)}\n'retort submit --follow {run_id}' follows it again"
        )
        raise
    link = server.link(run_id)
    if run.state not in ("FAILED", "CANCELED"):
        log.info(f"the run {run.state.lower()}: {link}")
        return
    failed = _failed(_tasks(run)) or _failed({task.display_name: task.state for task in _details(run)})
    where = f" at {', '.join(failed)}" if failed else ""
    reason = next((f": {text}" for text in _reasons(run)), "")
    raise RetortError(f"the run {run.state.lower()}{where}{reason}\nits logs, and the step's report: {link}")


def _follow(server: Server, run_id: str) -> Any:
    said: dict[str, str] = {}
    heard, waiting = time.monotonic(), Waiting(server, run_id)
    while True:
        try:
            run = server.runs.run_service_get_run(run_id)
        except (api.ApiException, HTTPError) as error:
            refused = REFUSED.get(getattr(error, "status", 0))
            if refused or time.monotonic() - heard > AWAY_SECONDS:
                reason = f"{refused}: {refusal(error)}" if refused else refusal(error)
                raise RetortError(
                    f"kubeflow.host {server.host}: no word of the run any more ({reason}); it may go on\n"
                    f"'retort submit --follow {run_id}' follows it again; {server.link(run_id)}"
                ) from None
        else:
            heard = time.monotonic()
            for task, state in _tasks(run).items():
                if state != said.get(task):
                    log.info(f"{task}: {state.lower()}")
                    said[task] = state
            if run.state in ENDED:
                return run
            waiting.look(run, said)
        time.sleep(POLL_SECONDS)


class Waiting:
    """Pods that do not start. The server says that they wait, but not for what: the workflow's nodes do."""

    def __init__(self, server: Server, run_id: str) -> None:
        self._server = server
        self._run_id = run_id
        self._since: float | None = None
        self._next = 0.0

    def look(self, run: Any, states: dict[str, str]) -> None:
        """Say so when pods have been pending for long."""
        now = time.monotonic()
        if not any(task.state == "PENDING" for task in _details(run)) and run.state != "PENDING":
            self._since = None
            return
        if self._since is None:
            self._since, self._next = now, now + PENDING_SECONDS
        if now < self._next:
            return
        self._next = now + PENDING_SECONDS
        tasks = [task for task, state in states.items() if state in ("RUNNING", "PENDING")]
        where = f"-n {self._server.namespace} " if self._server.namespace else "-n kubeflow "
        told = next((f" ({text})" for text in _reasons(run)), "")
        log.warning(
            f"{', '.join(tasks) or 'the run'}: its pod has not started for {(now - self._since) / 60:.0f} min"
            f"{told}: no node has the GPUs, memory or processors that it asks for (kubeflow.*, ray.*), "
            "the image cannot be pulled (kubeflow.image), a quota is used up, or a Secret is missing. The "
            "cluster knows which:\n"
            f"kubectl {where}get workflows -l pipeline/runid={self._run_id} -o "
            "jsonpath='{range .items[*].status.nodes.*}{.displayName}: {.message}{\"\\n\"}{end}'"
        )


def _details(run: Any) -> list[Any]:
    return list((run.run_details.task_details if run.run_details else None) or [])


def _tasks(run: Any) -> dict[str, str]:
    """State by name of the steps; what KFP makes beside them (root, drivers, executors) is left out."""
    return {task.display_name: task.state for task in _details(run) if task.display_name in STAGES}


def _failed(states: Mapping[str, str]) -> list[str]:
    return [task for task, state in states.items() if state == "FAILED" and task]


def _reasons(run: Any) -> list[str]:
    """What the server says went wrong, of the run as a whole first."""
    errors = [
        run.error,
        *(state.error for state in run.state_history or []),
        *(t.error for t in _details(run)),
    ]
    return [" ".join(error.message.split()) for error in errors if error and error.message]

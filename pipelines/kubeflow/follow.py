"""Follow a run on a KFP server until it ends."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from components.common.errors import RetortError
from pipelines.kubeflow.client import refusal

if TYPE_CHECKING:
    import kfp
    from kfp_server_api import V2beta1Run

log = logging.getLogger(__name__)

POLL_SECONDS = 5.0
AWAY_SECONDS = 600.0  # without an answer, until the waiting ends (the run itself goes on)
ENDED = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")


def follow(client: kfp.Client, run_id: str, host: str) -> None:
    """Say each task's state as it changes, until the run ends; a poll that fails says nothing about it."""
    from kfp_server_api import ApiException
    from urllib3.exceptions import HTTPError

    link = f"{host}/#/runs/details/{run_id}"
    said: dict[str, str] = {}
    heard = time.monotonic()
    while True:
        try:
            run = client.get_run(run_id)
        except (ApiException, HTTPError) as error:
            away = time.monotonic() - heard
            if away > AWAY_SECONDS or getattr(error, "status", None) in (401, 403, 404):
                reason = f"no word of the run any more ({refusal(error)}); it may go on"
                raise RetortError(f"kubeflow.host {host}: {reason}: {link}") from None
        else:
            heard = time.monotonic()
            for task, state in _tasks(run).items():
                if state != said.get(task):
                    log.info(f"{task}: {state.lower()}")
                    said[task] = state
            if run.state in ENDED:
                break
        time.sleep(POLL_SECONDS)
    if run.state in ("FAILED", "CANCELED"):
        failed = [task for task, state in said.items() if state in ("FAILED", "SYSTEM_ERROR")]
        where = f" at {', '.join(failed)}" if failed else ""
        reason = f": {run.error.message}" if run.error and run.error.message else ""
        raise RetortError(f"the run {run.state.lower()}{where}{reason}\nits logs: {link}")
    log.info(f"the run {run.state.lower()}: {link}")


def _tasks(run: V2beta1Run) -> dict[str, str]:
    """State by name of a run's tasks; the drivers that KFP runs before each are left out."""
    details = run.run_details.task_details if run.run_details else None
    return {
        task.display_name: task.state
        for task in details or []
        if task.state and task.display_name and not task.display_name.endswith(("driver", "executor"))
    }

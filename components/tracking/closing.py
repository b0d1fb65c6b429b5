"""The end of a pipeline's run in MLflow, for steps whose pods were killed and could not tell theirs."""

from __future__ import annotations

import logging
import os

from components.common.params import Registry
from components.tracking.client import (
    bounded,
    client_settings,
    connect,
    first_line,
    public_uri,
    reach,
    tracking_uri,
)
from components.tracking.replay import ENDED_BADLY, find_run
from components.tracking.run_identity import pipeline_run

log = logging.getLogger(__name__)

SECONDS = 60.0  # for the tracker, in all
REQUEST_SECONDS = 10
ENDED_WELL = ("SUCCEEDED", "COMPLETE", "CACHED")  # as Kubeflow's local runner says it, and its server


def close_run(registry: Registry, state: str) -> None:
    """End the MLflow run of a pipeline whose steps are over, and those of steps that could not end theirs.

    A tracker that does not answer is told, and is no failure: the pipeline's own end says more.

    Args:
        state: how the steps ended, as Kubeflow says it.
    """
    if os.environ.get("MLFLOW_RUN_ID"):  # KFP opened it, and ends it
        return
    uri = tracking_uri(registry)
    record = pipeline_run("submit", uri, registry.name)
    try:
        reach(uri)
        with client_settings(REQUEST_SECONDS, retries=2):
            bounded(uri, SECONDS, lambda: _close(uri, registry.name, record["id"], state))
    except Exception as error:  # noqa: BLE001 - whatever a tracker does, the run has ended
        log.warning(f"tracking: {public_uri(uri)}: {first_line(error)}; the run may stay open there")


def _close(uri: str, name: str, stable_id: str, state: str) -> None:
    client = connect(uri)
    experiment = client.get_experiment_by_name(name)
    parent = find_run(client, experiment.experiment_id, stable_id) if experiment else None
    if experiment is None or parent is None:  # every step came out of Kubeflow's cache, or none began
        log.info(f"tracking: no run of this pipeline in '{name}': none of its steps began")
        return
    own = parent.info.run_id
    tags = {key: value for key, value in parent.data.tags.items() if key.startswith("step.")}
    mine = f"tags.`mlflow.parentRunId` = '{own}' and attributes.status = 'RUNNING'"
    for child in client.search_runs([experiment.experiment_id], mine):
        client.set_terminated(child.info.run_id, "KILLED")
        step = f"step.{child.info.run_name}"
        log.info(f"tracking: {child.info.run_name} did not say how it ended: killed")
        if tags.get(step) == f"RUNNING {child.info.run_id}":  # else it was tried again
            tags[step] = f"KILLED {child.info.run_id}"
            client.set_tag(own, step, tags[step])
    badly = any(value.split()[0] in ENDED_BADLY for value in tags.values())
    stopped = "CANCEL" in state
    verdict = "KILLED" if stopped else "FINISHED" if state in ENDED_WELL and not badly else "FAILED"
    client.set_terminated(own, verdict)
    log.info(f"tracking: the run is {verdict.lower()}")

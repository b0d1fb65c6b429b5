"""Run the DAG on a KFP server."""

from __future__ import annotations

import logging
import secrets
import time
from typing import Any

import kfp_server_api as api

from pipelines.kubeflow.client import ensure
from pipelines.kubeflow.follow import follow
from pipelines.kubeflow.upload import upload
from pipelines.params import Params
from pipelines.steps import MAIN, Pipeline

log = logging.getLogger(__name__)


def submit(params: Params, in_file: Params, wait: bool, pipeline: Pipeline = MAIN) -> str:
    """Start a run of the pipeline on the server at ``kubeflow.host``; follow it when ``wait``.

    Args:
        params: with the overrides; they are values of the run.
        in_file: without; the pipeline is compiled from them.

    Returns:
        The id of the run.

    Raises:
        RetortError: when this cannot run there, with all reasons; when the server refuses; when the run
            failed.
    """
    uploaded = upload(params, in_file, pipeline)
    server = uploaded.server
    # found again by its name, should the answer to its start be lost
    name = f"{uploaded.name} {time.strftime('%Y-%m-%d %H:%M:%S')} {secrets.token_hex(2)}"

    def find() -> Any:
        call, where = server.runs.run_service_list_runs, {"experiment_id": uploaded.experiment_id}
        return next(server.named(call, "runs", name, **where), None)

    with server.asked():
        run = ensure(
            find,
            lambda: server.runs.run_service_create_run(
                api.V2beta1Run(
                    display_name=name,
                    experiment_id=uploaded.experiment_id,
                    pipeline_version_reference=uploaded.reference,
                    runtime_config=api.V2beta1RuntimeConfig(parameters=uploaded.values),
                    service_account=params.kubeflow.service_account,
                )
            ),
        )
    log.info(f"run {run.run_id} of version {uploaded.version}: {server.link(run.run_id)}")
    if wait:
        follow(server, run.run_id)
    return str(run.run_id)

"""Run the DAG on a KFP server: upload the pipeline as a version, start a run, follow it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from components.common.errors import RetortError
from pipelines.kubeflow import dag
from pipelines.kubeflow.client import connect, find_host, refusal
from pipelines.kubeflow.follow import follow
from pipelines.params import Params

if TYPE_CHECKING:
    import kfp


def submit(params: Params, wait: bool) -> str:
    """Upload the pipeline to the server at ``kubeflow.host`` and start a run; follow it when ``wait``.

    The pipeline is called after ``registry.name``; a new version is uploaded only when the compiled file
    differs from those that are there.

    Returns:
        The id of the run.

    Raises:
        RetortError: when the host is empty, does not answer, or refuses; when the run failed.
    """
    from kfp_server_api import ApiException
    from urllib3.exceptions import HTTPError

    host = find_host(params)
    try:
        client = connect(host)
        experiment = client.create_experiment(name=params.kubeflow.experiment)
        pipeline_id, version_id = _upload(client, params)
        name = dag.pipeline_name(params)
        run = client.run_pipeline(
            experiment_id=experiment.experiment_id,
            job_name=f"{name} {time.strftime('%Y-%m-%d %H:%M:%S')}",
            params=dag.arguments(params),
            pipeline_id=pipeline_id,
            version_id=version_id,
        )
    except ApiException as error:
        raise RetortError(f"kubeflow.host {host}: {refusal(error)}") from None
    except HTTPError as error:
        raise RetortError(f"kubeflow.host {host}: {error}") from None
    if wait:
        follow(client, run.run_id, host)
    return run.run_id


def _upload(client: kfp.Client, params: Params) -> tuple[str, str]:
    """The ids of the pipeline and of the version that equals the compiled file."""
    name = dag.pipeline_name(params)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        dag.compile(params, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        pipeline_id = client.get_pipeline_id(name)
        if pipeline_id is None:
            pipeline_id = client.upload_pipeline(os.fspath(path), pipeline_name=name).pipeline_id
            # the server calls the first version after the pipeline
            versions = client.list_pipeline_versions(pipeline_id)
        else:
            wanted = {"operation": "EQUALS", "key": "display_name", "stringValue": f"{name}-{digest}"}
            versions = client.list_pipeline_versions(pipeline_id, filter=json.dumps({"predicates": [wanted]}))
        if versions.pipeline_versions:
            return pipeline_id, versions.pipeline_versions[0].pipeline_version_id
        version = client.upload_pipeline_version(os.fspath(path), f"{name}-{digest}", pipeline_id)
        return pipeline_id, version.pipeline_version_id

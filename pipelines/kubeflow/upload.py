"""The pipeline on a KFP server: refused when it cannot run there, else uploaded once, as a version."""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfp_server_api as api

from components.common.errors import RetortError
from components.common.storage import sha256_json
from components.tracking.run_identity import git_state
from pipelines.kubeflow import dag
from pipelines.kubeflow.client import Server, ensure
from pipelines.kubeflow.obstacles import obstacles, too_old
from pipelines.params import Params
from pipelines.steps import MAIN, Pipeline

log = logging.getLogger(__name__)

DIGITS = 12  # of the digest, in a version's name


@dataclass(frozen=True)
class Uploaded:
    """A version of the pipeline on a server, and what a run of it is started with.

    Attributes:
        name: of the pipeline.
        version: the version's name.
        reference: of the version, as the API has it.
        values: the run's parameters.
    """

    server: Server
    name: str
    version: str
    experiment_id: str
    reference: Any
    values: dict[str, dict[str, Any]]


def upload(params: Params, in_file: Params, pipeline: Pipeline = MAIN) -> Uploaded:
    """Bring the pipeline to the server at ``kubeflow.host``; what is there already is taken as it is.

    The pipeline is called after ``registry.name``. Its version is compiled from the file's values, and is
    called ``<commit or nogit>[-dirty]-<digest of what was compiled>``: an override is a value of the run,
    and makes another version only where it changes pods, such as their image or their size.

    Args:
        params: with the overrides.
        in_file: without.

    Raises:
        RetortError: with all that stands against running this in pods there; when the server refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        documents = dag.compile(params, path, pipeline, in_file=in_file)
        server = connect(params, documents)
        name = dag.pipeline_name(params, pipeline)
        commit, dirty = git_state()
        version = f"{commit[:DIGITS] or 'nogit'}{'-dirty' if dirty else ''}-{sha256_json(documents)[:DIGITS]}"
        with server.asked():
            experiment = find_experiment(server, params) or ensure(
                lambda: find_experiment(server, params),
                lambda: server.experiments.experiment_service_create_experiment(
                    api.V2beta1Experiment(display_name=params.kubeflow.experiment, namespace=server.namespace)
                ),
            )
            found = _version(server, name, version, path)
    reference = api.V2beta1PipelineVersionReference(
        pipeline_id=found.pipeline_id, pipeline_version_id=found.pipeline_version_id
    )
    values = dag.arguments(params, pipeline.of(params))
    return Uploaded(server, name, version, experiment.experiment_id, reference, values)


def connect(params: Params, documents: list[dict[str, Any]]) -> Server:
    """The server, when nothing stands against running the compiled pipeline there.

    Raises:
        RetortError: with all reasons against it, a line each.
    """
    reasons = obstacles(params)
    try:
        server = Server(params.kubeflow)
    except RetortError as error:
        raise RetortError("\n".join([*str(error).splitlines(), *reasons])) from None
    if server.multi_user and not server.namespace:
        reasons.append(
            "kubeflow.namespace is empty: this server has users; give the namespace of your profile"
        )
    reasons += too_old(server.version, documents)
    if reasons:
        raise RetortError("\n".join(reasons))
    if server.version is None:
        log.warning(
            f"kubeflow.host {server.host}: the server does not say its version; one older than KFP 2.17 "
            "drops settings of pods in silence, or refuses the pipeline"
        )
    return server


def find_experiment(server: Server, params: Params) -> Any:
    """The experiment ``kubeflow.experiment``, or None."""
    call = server.experiments.experiment_service_list_experiments
    name = params.kubeflow.experiment
    return next(server.named(call, "experiments", name, namespace=server.namespace), None)


def _version(server: Server, name: str, version: str, path: Path) -> Any:
    """The pipeline's version of that name, made with its pipeline when there is none."""

    def find_pipeline() -> Any:
        call = server.pipelines.pipeline_service_list_pipelines
        return next(server.named(call, "pipelines", name, namespace=server.namespace), None)

    pipeline = ensure(
        find_pipeline,
        # not by uploading a file: the server would call that one's version after the pipeline
        lambda: server.pipelines.pipeline_service_create_pipeline(
            api.V2beta1Pipeline(display_name=name, namespace=server.namespace)
        ),
    )

    def find() -> Any:
        call = server.pipelines.pipeline_service_list_pipeline_versions
        return next(server.named(call, "pipeline_versions", version, pipeline_id=pipeline.pipeline_id), None)

    def make() -> Any:
        log.info(f"uploading version {version} of {name}")
        return server.uploads.upload_pipeline_version(
            os.fspath(path), name=version, pipelineid=pipeline.pipeline_id
        )

    return ensure(find, make)

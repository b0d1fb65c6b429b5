"""A step elsewhere: its inputs are sent, its job is followed, what it left is brought back."""

from __future__ import annotations

import logging
import os
import secrets
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.common import progress, shared, signals
from components.common.errors import ConfigError, RetortError
from components.common.params import StepParams
from components.dataset import s3
from components.step import name_of, step
from components.training import remote
from components.training.kuberay import follow, life, parcel, template
from components.training.kuberay.api import Api, ApiError, own_name
from components.training.kuberay.life import Job
from components.training.kuberay.template import Pod, Scheduling
from components.training.params import Ray

log = logging.getLogger(__name__)

TRIES = 3  # jobs, when one ended because its owner was lost


@dataclass(frozen=True)
class Work:
    """A step, and what it is called with.

    Attributes:
        name: of the stage, such as finetune.
        function: import path of the step's function.
        parameters: import path of its parameter class.
        params: its parameters, with ``ray`` and ``data``.
        arguments: its arguments that are paths; ``out`` is its own folder.
    """

    name: str
    function: str
    parameters: str
    params: Any
    arguments: Mapping[str, Path]

    @property
    def ray(self) -> Ray:
        ray: Ray = self.params.ray
        return ray


def run(work: Work, scheduling: Scheduling | None = None, api: Api | None = None) -> None:
    """Run a step in a Ray cluster that KubeRay makes for it, as if it ran here.

    Args:
        scheduling: where its workers may run.
        api: of Kubernetes; None: that of the cluster which this pod runs in.

    Raises:
        FindingsError: the step's own; its report is in ``out``.
        RetortError: a file or a value is at fault, or Kubernetes refuses; then there is a report, too.
    """
    with progress.doing(work.name):
        try:
            result = _elsewhere(work, scheduling or Scheduling(), api)
        except RetortError as error:
            _report(work, error)
            raise
        if result["kind"] != "ok":
            raise parcel.error_of(result)


def _report(work: Work, error: RetortError) -> None:
    """Leave the report of a step that did not come to its own frame."""
    try:
        with step(work.name, _params(work), work.arguments["out"]):
            raise error
    except RetortError as same:
        if same is not error:
            raise


def _params(work: Work) -> StepParams:
    params: StepParams = work.params
    return params


def _elsewhere(work: Work, scheduling: Scheduling, api: Api | None) -> Mapping[str, Any]:
    """How the step ended there; what it left is in its place."""
    ray = work.ray
    # the prefix of all runs does for this, too
    uri = ray.storage or os.environ.get(shared.VARIABLE, "")
    if not ray.storage and not uri.startswith("s3://"):
        raise ConfigError(
            "ray.address: kuberay: ray.storage is empty, and the cluster shares no disk with this pod; set "
            "it (or kubeflow.state) to s3://bucket/prefix, for what goes there and comes back"
        )
    if getattr(getattr(work.params, "distill", None), "teachers", None):
        raise ConfigError(
            "ray.address: kuberay: distill.teachers are folders of this pod, which the cluster lacks"
        )
    progress.at("asking Kubernetes who this pod is")
    api = api or Api.here()
    mine = api.pod(own_name())
    if mine is None:
        raise RetortError(f"ray.address: kuberay: no pod {own_name()} in namespace {api.namespace}")
    pod = Pod.of(mine)
    run = os.environ.get("RETORT_RUN") or pod.name
    name = template.job_name(run, work.name)
    remote.remember(uri, work.params.data.s3)
    storage = remote.open_storage(uri)
    silence = 60 * ray.silence_minutes
    with parcel.beating(storage, name, silence):
        progress.at("sending the inputs")
        content = _content(storage, work, pod.image)
        key = parcel.key(content)
        life.sweep(api, run, work.name, keep=name)
        for _ in range(TRIES):
            attempt = secrets.token_hex(6)
            settings = {"stores": s3.stores(), "silence": silence, "attempt": attempt}
            parcel.put_json(
                storage, f"{parcel.folder(name)}/{attempt}-{parcel.WORK}", {**content, **settings}
            )
            arguments = _arguments(storage, name, attempt)
            wanted = template.render(
                ray, pod, scheduling, run=run, step=work.name, work=key, attempt=attempt, arguments=arguments
            )
            result = _one(api, storage, wanted, pod, work)
            if result is not None:
                return result
            log.warning(f"RayJob {name} ended since its owner was lost; going on with another")
    raise RetortError(
        f"RayJob {name}: ended {TRIES} times since its owner was lost; are there two of this run?"
    )


def _content(storage: remote.Storage, work: Work, image: str) -> dict[str, Any]:
    """What decides about the job's work; the inputs are in the storage then."""
    out = work.arguments["out"]
    inputs = {}
    for argument, path in work.arguments.items():
        if argument == "out":
            continue
        if not path.exists():
            raise RetortError(f"{name_of(path)}: no such file; run the step that writes it first")
        inputs[argument] = {
            "name": _plain(path, argument), "ref": parcel.packed(remote.put(storage, path)),
        }  # fmt: skip
    params = work.params.model_dump(mode="json", by_alias=True)
    params["ray"] |= {"address": "auto", "storage": storage.uri}
    root = Path(params["data"]["root"])
    images = None
    if "://" not in params["data"]["root"] and root.is_dir() and any(root.iterdir()):
        images = parcel.packed(parcel.put_images(storage, root))
    params["data"]["root"] = "data/images" if images else params["data"]["root"]
    return {
        "function": work.function,
        "parameters": work.parameters,
        "params": params,
        "inputs": inputs,
        "images": images,
        "out": _plain(out, "out"),
        "image": image,
    }


def _plain(path: Path, argument: str) -> str:
    """Where a file lies in the cluster: in the place by which reports name it."""
    called = name_of(path)
    return (
        called if not Path(called).is_absolute() and ".." not in Path(called).parts else f"given/{argument}"
    )


def _arguments(storage: remote.Storage, job: str, attempt: str) -> str:
    words = [storage.uri, job, attempt]
    for option in ("endpoint_url", "region"):
        if value := getattr(storage, option, None):
            words += [f"--{option.replace('_', '-')}", value]
    return shlex.join(words)


def _one(api: Api, storage: remote.Storage, wanted: Job, pod: Pod, work: Work) -> Mapping[str, Any] | None:
    """How one job ended; None when it did for want of an owner, which it has by now."""
    name = wanted["metadata"]["name"]

    def result_of(job: Job) -> Mapping[str, Any] | None:
        attempt = (job["metadata"].get("annotations") or {}).get(template.ATTEMPT, "")
        found: Mapping[str, Any] | None = parcel.read_json(
            storage, f"{parcel.folder(name)}/{attempt}-{parcel.RESULT}"
        )
        return found

    progress.at("making the RayJob")
    job, found = life.start(api, wanted, pod, lambda job: result_of(job) is not None)
    follower = follow.Follower(api, name)
    try:
        progress.at("following the RayJob")
        end, why = life.wait(api, job, work.ray, lambda: result_of(job) is not None)
    except ApiError:  # it would refuse this, too: the job ends by itself
        raise
    except RetortError:
        _remove(api, job)
        raise
    except BaseException as error:
        if signals.stopped_by(error) is not None:
            log.info(
                f"RayJob {name} is left to a next try; it saves its state and ends when nobody comes within "
                f"{work.ray.silence_minutes:g} minutes"
            )
        raise
    finally:
        follower.end()
    result = result_of(job if end is None else end)
    if end is None:
        if result is None and found:  # its first owner's pod was removed, and it with that
            return None
        if result is None:
            raise RetortError(f"RayJob {name}: somebody removed it")
    elif life.succeeded(end):
        if result is None or result["kind"] != "ok":
            raise RetortError(f"RayJob {name}: ended well, but left no result in {storage.uri}")
    elif result is None or result["kind"] == "ok":
        if life.status_of(end)[0] != "Failed":  # no rule of KubeRay's removes it
            _remove(api, end)
        raise life.failure(end, work.ray, why)
    elif result["kind"] == parcel.SILENT and found:
        _remove(api, end)
        return None
    progress.at("bringing back what the step left")
    parcel.bring(storage, result, work.arguments["out"])
    if end is not None and (life.succeeded(end) or not life.ended(end)):
        _remove(api, end)
    return result


def _remove(api: Api, job: Job) -> None:
    """Remove a job of which nothing is wanted any more; where that fails, its own rules do it later."""
    try:
        api.delete(job["metadata"]["name"], job["metadata"]["uid"])
    except RetortError as error:
        log.warning(f"{error}; the job's own deadlines remove it")

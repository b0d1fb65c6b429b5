"""What cannot work on a cluster, found before any pod starts: each reason names its key, and the way out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from posixpath import normpath
from typing import Any
from urllib.parse import urlsplit

from components.common.params import Place
from components.tracking.client import public_uri
from pipelines.kubeflow.pods import KEYS, STATE_VOLUME
from pipelines.params import Params, keys
from pipelines.steps import MAIN, Pipeline

URI = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+:")  # s3://..., https://..., hf:..., timm:..., package:...
NO_PLACE = ("", "none", "digits")  # embedded, or nothing at all
HERE = ("localhost", "127.0.0.1", "::1", "0.0.0.0")  # noqa: S104 - no address to listen on
# What a pod is given, in the IR's words; since which KFP a server knows it (an older one drops it without a
# word), and what the run would lose.
OF_PODS = {
    "fieldPathAsEnv": ((2, 2), "pods do not know their run: each step gets a run of its own in MLflow"),
    "emptyDirMounts": ((2, 3), "pods get no volumes of their own: loaders die for want of /dev/shm"),
    "securityContext": ((2, 16), "pods may run as root, and a restricted namespace refuses them"),
}
# The same of the pipeline as a whole, which an older server refuses.
OF_RUNS = {
    "activeDeadlineSeconds": ((2, 17), "it refuses a pipeline with a deadline (kubeflow.deadline_hours)")
}


def obstacles(params: Params, pipeline: Pipeline = MAIN) -> list[str]:
    """Why this cannot run in pods, one line a reason; empty when nothing stands against it."""
    return [
        *_unreachable(params, pipeline),
        *_addresses(params),
        *_images(params),
        *_workers(params),
    ]


def too_old(version: tuple[int, int] | None, documents: Sequence[dict[str, Any]]) -> list[str]:
    """What a compiled pipeline asks for that a server of that version does not know, one line each."""
    platforms = [platform for document in documents for platform in document.get("platforms", {}).values()]
    executors = [each for platform in platforms for each in platform["deploymentSpec"]["executors"].values()]
    asked = {name: OF_PODS[name] for each in executors for name in OF_PODS.keys() & each.keys()}
    for platform in platforms:
        asked |= {name: OF_RUNS[name] for name in OF_RUNS.keys() & platform.get("pipelineConfig", {}).keys()}
    return [
        f"kubeflow.host: KFP {version[0]}.{version[1]} has no {name}, KFP {since[0]}.{since[1]} does: {lost}"
        for name, (since, lost) in sorted(asked.items(), key=lambda item: item[1])
        if version is not None and version < since
    ]


def _unreachable(params: Params, pipeline: Pipeline) -> Iterator[str]:
    """Keys that name files or folders: pods have another disk."""
    sections = {name for stage in pipeline.stages for name in stage.step.sections()}
    values = params.model_dump()
    for key, field in keys():
        place = next((mark for mark in field.metadata if isinstance(mark, Place)), None)
        section, _, rest = key.partition(".")
        name = next(n for n, f in Params.model_fields.items() if (f.alias or n) == section)
        if place is None or name not in sections:
            continue
        value = values[name]
        for part in rest.split("."):
            value = value[part]
        for path in _paths(value):
            if path in NO_PLACE or (place.anywhere and URI.match(path)):
                continue
            if params.kubeflow.state_volume and f"{normpath(path)}/".startswith(f"{STATE_VOLUME}/"):
                continue  # every pod has it; whether the file is there, the step says
            if params.kubeflow.sign_secret and f"{normpath(path)}/".startswith(f"{KEYS}/"):
                continue  # the pod that registers has it
            way = (
                "give what pods reach, such as s3://bucket/prefix"
                if place.anywhere
                else "pods have no such file"
            )
            yield f"{key} '{path}' lies on this machine: {way}"


def _paths(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [str(item) for item in value.values()]
    return [str(item) for item in value] if isinstance(value, list) else [str(value)] if value else []


def _addresses(params: Params) -> Iterator[str]:
    """Servers that a pod cannot reach."""
    uri = params.registry.tracking_uri
    if urlsplit(uri).scheme in ("", "file", "sqlite"):
        yield (
            f"registry.tracking_uri '{uri}' is a file, lost with each pod: give an MLflow server's URL "
            "(infra/k8s brings one)"
        )
    for key, address in (
        ("registry.tracking_uri", uri),
        ("data.s3.endpoint_url", params.data.s3.endpoint_url or ""),
    ):
        if urlsplit(address).hostname in HERE:
            yield f"{key} '{public_uri(address)}' means the pod itself in a pod: give its name in the cluster"


def _images(params: Params) -> Iterator[str]:
    kubeflow = params.kubeflow
    for key, image in (("image", kubeflow.image), ("light_image", kubeflow.light_image)):
        if image is None:
            continue
        name, digest = image.rsplit("/", 1)[-1], "@sha256:" in image
        tag = name.partition(":")[2]
        if not digest and tag in ("", "latest"):
            yield (
                f"kubeflow.{key} '{image}' may be another image tomorrow: push it ('make images'), and give "
                "REGISTRY/NAME:TAG, or NAME@sha256:... (then steps are cached, too)"
            )


def _workers(params: Params) -> Iterator[str]:
    kubeflow, ray = params.kubeflow, params.ray
    if ray.gpus_per_worker and not kubeflow.gpu and ray.address == "":
        yield (
            f"ray.gpus_per_worker {ray.gpus_per_worker:g} without kubeflow.gpu: no pod asks for a GPU, and "
            "training waits for ever; name the resource, such as kubeflow.gpu=nvidia.com/gpu"
        )
    if ray.address == "auto":
        yield "ray.address 'auto': no Ray runs in a task's pod; '' starts one, ray://HOST:PORT is elsewhere"
    elif ray.address and not URI.match(ray.storage or (ray.address == "kuberay" and kubeflow.state) or ""):
        yield (
            f"ray.storage '{ray.storage}' with ray.address {ray.address}: that cluster shares no disk with a "
            "task's pod; give a prefix that both reach, such as s3://bucket/prefix"
        )

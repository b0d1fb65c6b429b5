"""What a task's pod gets on a cluster: image, processors, memory, keys, and whether its result is cached."""

from __future__ import annotations

import math

from kfp import dsl, kubernetes

from pipelines.params import Params
from pipelines.steps import Stage

S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def equip(task: dsl.PipelineTask, stage: Stage, params: Params) -> None:
    """Give the task of ``stage`` its pod; a local run ignores all of it.

    The server's cache knows an image by its name, not by its content, and a source by its name too: a task
    is cached only when its image is pinned by a digest and what it reads cannot change under its name.
    """
    step, kubeflow = stage.step, params.kubeflow
    image = kubeflow.light_image if step.pod == "light" and kubeflow.light_image else kubeflow.image
    task.set_display_name(stage.title)
    task.set_container_image(image)
    task.set_caching_options(step.cached(params) and "@sha256:" in image)
    # the run's key for the tracker; as an argument it would be part of the cache's key
    kubernetes.use_field_path_as_env(task, "RETORT_RUN", "metadata.labels['pipeline/runid']")
    _reach_images(task, params)
    if step.pod == "training":
        _train(task, params)
    elif cpus := step.cpus(params):
        task.set_cpu_request(str(cpus)).set_cpu_limit(str(cpus))


def _reach_images(task: dsl.PipelineTask, params: Params) -> None:
    """Every pod reads images; none finds what another one noted about stores."""
    s3 = params.data.s3
    if s3.endpoint_url:
        task.set_env_variable("AWS_ENDPOINT_URL_S3", s3.endpoint_url)
    if s3.region:
        task.set_env_variable("AWS_DEFAULT_REGION", s3.region)
    if params.kubeflow.s3_secret:
        kubernetes.use_secret_as_env(task, params.kubeflow.s3_secret, {key: key for key in S3_KEYS})


def _train(task: dsl.PipelineTask, params: Params) -> None:
    """Room for Ray's workers, unless they live elsewhere, and a /dev/shm for their loaders."""
    kubeflow, ray = params.kubeflow, params.ray
    workers = ray.workers if ray.address == "" else 0
    cpus = str(1 + math.ceil(workers * ray.cpus_per_worker))
    task.set_cpu_request(cpus).set_cpu_limit(cpus)
    # requests = limits; pages of a memory-backed volume count against the limit
    task.set_memory_request(kubeflow.memory).set_memory_limit(kubeflow.memory)
    shm = {"mount_path": "/dev/shm", "medium": "Memory", "size_limit": kubeflow.shm}  # noqa: S108
    kubernetes.empty_dir_mount(task, volume_name="shm", **shm)
    gpus = math.ceil(workers * ray.gpus_per_worker)
    if kubeflow.gpu and gpus:
        task.set_accelerator_type(kubeflow.gpu).set_accelerator_limit(gpus)

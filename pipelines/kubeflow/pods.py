"""What a task's pod gets on a cluster: image, size, user, disks, keys and settings. A local run ignores it.

KFP's SDK sets a container's user; its compiler adds the rest of what a *restricted* namespace asks for: no
capability, no escalation, the default seccomp profile. A read-only root is the administrator's to set:
``/tmp`` and ``/work`` are volumes, so that it can be. Of a pod's disk only volumes get a limit: the SDK knows
no ``ephemeral-storage``, so a quota on that needs a LimitRange with defaults.
"""

from __future__ import annotations

import math
from typing import Any

from kfp import dsl, kubernetes
from kubernetes.utils.quantity import parse_quantity

from components.common.links import IMAGE
from components.provenance.signing import KEY
from pipelines.params import Kubeflow, Params
from pipelines.steps import Stage

SETTINGS = "retort-settings"  # the annotation of a pod that holds them
KEYS = "/retort-keys"  # where kubeflow.sign_secret is mounted, in the pod that registers
GROUP = 0  # what an image gives to it, any user may use: OpenShift's rule
SCRATCH = {"tmp": "/tmp", "work": "/work"}  # noqa: S108 - where pods write
STATE_VOLUME = "/retort-state"  # where kubeflow.state_volume is mounted
FILLED = 0.9  # of the disk in /work, that state may fill: Kubernetes ends a pod whose volume is full
ELSEWHERE = ("1", "2Gi")  # of a pod whose step runs in a cluster of its own: it sends, waits, and fetches
CLOSING = ("500m", "1Gi")  # of the pod that closes the run: MLflow's client, and nothing else
CLOSING_SECONDS = 600
BACKOFF = "60s"  # before the first retry; twice as long before the next
# Keys of a secret, and what a pod calls them. KFP's launcher, in the same container, takes AWS_... for keys
# of its own, and would bring its artifacts to our store. The adapter gives them back their names.
S3_KEYS = {f"AWS_{key}": f"RETORT_S3_{key}" for key in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")}
LOGIN = {f"MLFLOW_TRACKING_{key}": f"RETORT_MLFLOW_{key}" for key in ("USERNAME", "PASSWORD")}


def shared(kubeflow: Kubeflow) -> dict[str, Any]:
    """What a pod is told of what outlives it: the place, the bytes of its own disk until then, and the page.

    That is Kubeflow's page of the run, which the run in MLflow names; known where the server's address is.
    """
    place = STATE_VOLUME if kubeflow.state_volume else kubeflow.state
    told = {"place": place or "", "bytes": int(FILLED * float(parse_quantity(kubeflow.scratch)))}
    if not kubeflow.host:
        return told
    user = f"?ns={kubeflow.namespace}" if kubeflow.namespace else ""
    return {**told, "page": f"{kubeflow.host.rstrip('/')}/#/runs/details/RUN{user}"}


def equip(task: dsl.PipelineTask, stage: Stage, params: Params, settings: str, retried: bool = True) -> None:
    """Give the task of ``stage`` its pod.

    The server's cache knows an image by its name, not by its content, and a source by its name too: a task
    is cached only when its image is pinned by a digest and what it reads cannot change under its name.

    Args:
        settings: what is no parameter of the run, as JSON.
        retried: whether steps are tried again that are worth it.
    """
    step, kubeflow = stage.step, params.kubeflow
    image = kubeflow.light_image if step.pod == "light" and kubeflow.light_image else kubeflow.image
    task.set_display_name(stage.title)
    task.set_caching_options(step.cached(params) and "@sha256:" in image)
    if retried and step.retries:
        # KFP's longest time is an hour from the first start, after which a pod is ended in mid-work
        longest = f"{kubeflow.deadline_seconds}s"
        task.set_retry(step.retries, BACKOFF, backoff_factor=2.0, backoff_max_duration=longest)
    _house(task, image, kubeflow, settings, kubeflow.deadline_seconds)
    if kubeflow.s3_secret:
        kubernetes.use_secret_as_env(task, kubeflow.s3_secret, S3_KEYS)
    if kubeflow.sign_secret and step.name == "register":
        kubernetes.use_secret_as_volume(task, kubeflow.sign_secret, mount_path=KEYS)
        task.set_env_variable(KEY, f"{KEYS}/key.pem")
    if step.pod == "training":
        _train(task, stage, params)
    else:
        cpus = max(kubeflow.small_cpus, step.cpus(params))
        _size(task, str(cpus), kubeflow.small_memory)


def equip_closing(task: dsl.PipelineTask, params: Params, settings: str) -> None:
    """Give its pod to the task that closes the run."""
    kubeflow = params.kubeflow
    task.set_display_name("Close the run in MLflow")
    task.set_caching_options(False)
    _house(task, kubeflow.light_image or kubeflow.image, kubeflow, settings, CLOSING_SECONDS)
    _size(task, *CLOSING)


def _house(task: dsl.PipelineTask, image: str, kubeflow: Kubeflow, settings: str, seconds: int) -> None:
    """What every pod gets.

    Settings travel as an annotation, and not as a parameter, nor as a plain variable: both are parts of the
    cache's key, in the servers' newest version at least.
    """
    task.set_container_image(image)
    task.set_env_variable(IMAGE, image)  # a part of the cache's key, as the image itself is
    kubernetes.set_timeout(task, seconds)
    user = kubeflow.run_as_user
    given = {} if user == "namespace" else {"run_as_user": user, "run_as_group": GROUP}
    kubernetes.set_security_context(task, run_as_non_root=True, **given)
    for name, path in SCRATCH.items():
        kubernetes.empty_dir_mount(task, volume_name=name, mount_path=path, size_limit=kubeflow.scratch)
    if kubeflow.state_volume:
        kubernetes.mount_pvc(task, pvc_name=kubeflow.state_volume, mount_path=STATE_VOLUME)
    if kubeflow.pull_secrets:
        kubernetes.set_image_pull_secrets(task, kubeflow.pull_secrets)
    if kubeflow.mlflow_secret:
        kubernetes.use_secret_as_env(task, kubeflow.mlflow_secret, LOGIN)
    # the run's key for the tracker
    kubernetes.use_field_path_as_env(task, "RETORT_RUN", "metadata.labels['pipeline/runid']")
    kubernetes.add_pod_annotation(task, SETTINGS, settings)
    kubernetes.use_field_path_as_env(task, "RETORT_SETTINGS", f"metadata.annotations['{SETTINGS}']")


def _size(task: dsl.PipelineTask, cpus: str, memory: str) -> None:
    """Requests equal limits: a quota counts both, and such a pod is the last to be evicted."""
    task.set_cpu_request(cpus).set_cpu_limit(cpus)
    task.set_memory_request(memory).set_memory_limit(memory)


def _train(task: dsl.PipelineTask, stage: Stage, params: Params) -> None:
    """Room for Ray's workers, unless they live elsewhere, and a /dev/shm for their loaders."""
    kubeflow, ray = params.kubeflow, params.ray
    for key, value in kubeflow.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for each in kubeflow.tolerations:
        kubernetes.add_toleration(task, **each.model_dump(exclude_defaults=True))
    if ray.address == "kuberay":
        _size(task, *ELSEWHERE)
        return
    workers = ray.workers if ray.address == "" and stage.step.workers(params) else 0
    _size(task, str(1 + math.ceil(workers * ray.cpus_per_worker)), kubeflow.memory)
    # pages of a memory-backed volume count against the pod's memory
    shm = {"mount_path": "/dev/shm", "medium": "Memory", "size_limit": kubeflow.shm}  # noqa: S108
    kubernetes.empty_dir_mount(task, volume_name="shm", **shm)
    gpus = math.ceil(workers * ray.gpus_per_worker)
    if kubeflow.gpu and gpus:
        task.set_accelerator_type(kubeflow.gpu).set_accelerator_limit(gpus)


def passthroughs(stage: Stage, params: Params) -> list[dsl.TaskConfigPassthrough] | None:
    """What KFP hands to the step itself, as its argument ``task_config``; None: all of it is the pod's.

    A step that makes a cluster of its own (``ray.address: kuberay``) gives its workers the node selectors and
    tolerations; its own pod goes where it likes. Once one thing is passed on, KFP gives the pod only what is
    named to be the pod's, too. Resources are: those passed on are the pod's own, and a pod without any is
    refused where a quota rules. A worker's are ``ray.cpus_per_worker`` and its like.
    """
    if stage.step.pod != "training" or params.ray.address != "kuberay":
        return None
    field = dsl.TaskConfigField
    own = (field.RESOURCES, field.ENV, field.KUBERNETES_VOLUMES)
    workers = (field.KUBERNETES_TOLERATIONS, field.KUBERNETES_NODE_SELECTOR, field.KUBERNETES_AFFINITY)
    return [dsl.TaskConfigPassthrough(field=each, apply_to_task=each in own) for each in (*own, *workers)]

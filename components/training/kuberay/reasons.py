"""Why a job does not start: what its pods, its cluster and Kubernetes' events say, as one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from components.training.kuberay import template
from components.training.kuberay.api import Api

PULL = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
CONFIG = ("CreateContainerConfigError", "CreateContainerError")
WAYS = (  # what is said, in small letters, and the way out
    ("quota", "raise the namespace's ResourceQuota, or lower ray.workers and the memory of its pods"),
    ("podsecurity", "the namespace admits other pods only: adapt infra/k8s/ray/rayjob.yaml"),
    ("gpu", "no node has them free: see ray.gpus_per_worker, ray.gpu_resource and the node selectors"),
    ("insufficient", "no node has that free: see ray.workers, ray.cpus_per_worker and ray.memory_per_worker"),
    ("taint", "no node tolerates the pods: see the tolerations and node selectors of the GPU pool"),
    ("secret", "make that secret in this namespace, or correct kubeflow.s3_secret"),
    ("image", "see that the nodes can pull kubeflow.image, and its pull secrets"),
)  # fmt: skip


def why_waiting(api: Api, job: Mapping[str, Any]) -> str:
    """What holds a job up, with the way out; empty when nothing says anything."""
    said = next(_said(api, job), "")
    if not said:
        return ""
    low = said.lower()
    return f"{said}; {next((way for words, way in WAYS if words in low), 'see kubectl describe rayjob')}"


def _said(api: Api, job: Mapping[str, Any]) -> Iterator[str]:
    name = job["metadata"]["name"]
    pods = api.pods(f"{template.JOB}={name}")
    for pod in pods:
        yield from _of_pod(pod)
    status = job.get("status") or {}
    cluster = status.get("rayClusterStatus") or {}
    for condition in cluster.get("conditions") or []:
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            yield str(condition.get("message") or condition.get("reason"))
    for subject in (status.get("rayClusterName"), name):
        if subject:
            yield from reversed(api.warnings(subject))


def _of_pod(pod: Mapping[str, Any]) -> Iterator[str]:
    called, status = pod["metadata"]["name"], pod.get("status") or {}
    for one in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waiting = (one.get("state") or {}).get("waiting") or {}
        said = f"{waiting.get('reason')}: {waiting.get('message') or 'no more is said'}"
        if waiting.get("reason") in PULL:
            yield f"pod {called}: the image {one.get('image')} cannot be pulled ({said})"
        elif waiting.get("reason") in CONFIG:
            yield f"pod {called} cannot start ({said})"
    for condition in status.get("conditions") or []:
        if condition.get("reason") == "Unschedulable":
            yield f"pod {called} finds no node ({condition.get('message')})"

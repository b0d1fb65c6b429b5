"""The RayJob of one step: ``templates/rayjob.yaml`` with what belongs to this run filled in."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from components.common.shared import VARIABLE
from components.training.params import Ray

TEMPLATE = Path(__file__).parent / "templates" / "rayjob.yaml"
RUN, STEP, JOB, PART = "retort/run", "retort/step", "retort/job", "retort/part"  # labels
WORK, ATTEMPT = (
    "retort/work",
    "retort/attempt",
)  # annotations: what the job does, as a hash; its result's name
QUEUE = "kueue.x-k8s.io/queue-name"
# what the pod's variables that a step reads begin with; its own state and those of KFP stay there
KEPT = ("RETORT_", "MLFLOW_", "AWS_", "OMP_NUM_THREADS", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_")
LOCAL = ("RETORT_STATE", "RETORT_STATE_BYTES", "RETORT_NODE_CACHE", "RETORT_SETTINGS")
# clients know keys by these names; in a pod of KFP they have others, which its launcher does not read
KEYS = {
    "RETORT_S3_ACCESS_KEY_ID": "AWS_ACCESS_KEY_ID",
    "RETORT_S3_SECRET_ACCESS_KEY": "AWS_SECRET_ACCESS_KEY",
    "RETORT_MLFLOW_USERNAME": "MLFLOW_TRACKING_USERNAME",
    "RETORT_MLFLOW_PASSWORD": "MLFLOW_TRACKING_PASSWORD",
}
# set by this process for itself, out of parameters: where things are, and no key
PLACES = (VARIABLE, "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_REGION")


@dataclass(frozen=True)
class Scheduling:
    """Where workers may run, as Kubernetes writes it in a pod; what KFP's ``TaskConfig`` hands on."""

    tolerations: Sequence[Mapping[str, Any]] = ()
    node_selector: Mapping[str, str] = field(default_factory=dict)
    affinity: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pod:
    """What the job takes over from the pipeline's pod.

    ``env``: entries of its container, as Kubernetes writes them: keys stay references to a secret. ``user``:
    its ``runAsUser`` and ``runAsGroup``, where it has them.
    """

    name: str
    uid: str
    image: str
    service_account: str = ""
    pull_secrets: Sequence[Mapping[str, Any]] = ()
    env: Sequence[Mapping[str, Any]] = ()
    user: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, pod: Mapping[str, Any]) -> Pod:
        """The same of a pod as the API gives it (its container is called main, or is the first)."""
        spec = pod["spec"]
        main = next((one for one in spec["containers"] if one["name"] == "main"), spec["containers"][0])
        given = main.get("securityContext") or {}
        return cls(
            name=pod["metadata"]["name"],
            uid=pod["metadata"]["uid"],
            image=main["image"],
            service_account=spec.get("serviceAccountName", ""),
            pull_secrets=spec.get("imagePullSecrets") or (),
            env=main.get("env") or (),
            user={key: given[key] for key in ("runAsUser", "runAsGroup") if key in given},
        )

    def owner(self) -> dict[str, Any]:
        """Kubernetes removes the job when this pod is removed, and the pod waits for nothing."""
        return {
            "apiVersion": "v1", "kind": "Pod", "name": self.name, "uid": self.uid,
            "controller": False, "blockOwnerDeletion": False,
        }  # fmt: skip


def job_name(run: str, step: str) -> str:
    """One name for each step of each run: a second job of the same cannot be made (47 characters at most)."""
    digest = hashlib.sha256(f"{run}/{step}".encode()).hexdigest()[:12]
    return f"retort-{re.sub('[^a-z0-9]+', '-', step.lower())[:24].strip('-')}-{digest}"


def label(value: str) -> str:
    """A value in the letters of a label: 63 at most."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", value)[:63].strip("-_.")
    return plain or hashlib.sha256(value.encode()).hexdigest()[:12]


def labels(run: str, step: str) -> dict[str, str]:
    """By which a sweep finds all jobs of one step of one run."""
    return {RUN: label(run), STEP: label(step)}


def render(
    ray: Ray,
    pod: Pod,
    scheduling: Scheduling,
    *,
    run: str,
    step: str,
    work: str,
    attempt: str,
    arguments: str,
) -> dict[str, Any]:
    """The RayJob as it is sent to Kubernetes.

    Args:
        run: the pipeline's run.
        work: the hash of what the job does.
        attempt: what its result is called.
        arguments: of the entry point, for a shell.
    """
    from ruamel.yaml import YAML

    job: dict[str, Any] = copy.deepcopy(YAML(typ="safe", pure=True).load(TEMPLATE.read_text("utf-8")))
    name = job_name(run, step)
    known = {**labels(run, step), JOB: name}
    head = job["metadata"]
    head |= {"name": name, "annotations": {WORK: work, ATTEMPT: attempt}, "ownerReferences": [pod.owner()]}
    head["labels"] = {**head["labels"], **known}
    spec = job["spec"]
    spec["entrypoint"] = f"{spec['entrypoint']} {arguments}"
    spec["backoffLimit"] = ray.restarts
    spec["preRunningDeadlineSeconds"] = _seconds(ray.start_minutes)
    spec["activeDeadlineSeconds"] = _seconds(ray.deadline_minutes)
    for rule in spec["deletionStrategy"]["deletionRules"]:
        if rule["policy"] == "DeleteSelf":
            rule["condition"]["ttlSeconds"] = round(60 * ray.keep_minutes)
    if ray.queue:
        head["labels"][QUEUE] = ray.queue
        del spec["deletionStrategy"]
        ttl = round(60 * ray.keep_minutes)
        spec |= {"suspend": True, "shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": ttl}
    cluster = spec["rayClusterSpec"]
    cluster["rayVersion"] = metadata.version("ray")
    (group,) = cluster["workerGroupSpecs"]
    group |= {"replicas": ray.workers, "minReplicas": ray.workers, "maxReplicas": ray.workers}
    env = environment(pod.env)
    parts = {
        "submitter": spec["submitterPodTemplate"],
        "head": cluster["headGroupSpec"]["template"],
        "worker": group["template"],
    }
    for part, template in parts.items():
        parts[part] = _filled(template, part, ray, pod, known, env)
    spec["submitterPodTemplate"] = parts["submitter"]
    cluster["headGroupSpec"]["template"] = parts["head"]
    group["template"] = parts["worker"]
    _schedule(group["template"]["spec"], scheduling)
    return job


def _filled(
    template: dict[str, Any],
    part: str,
    ray: Ray,
    pod: Pod,
    known: Mapping[str, str],
    env: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """One kind of pod; parts of the template that are written once are shared, and must not change twice."""
    # an alias in YAML is the same object: deepcopy keeps it one, so each part is copied for itself
    filled = _unshared(template)
    filled["metadata"]["labels"] |= {**known, PART: part}
    spec = filled["spec"]
    (container,) = spec["containers"]
    container["image"] = pod.image
    container["env"] = [*container.get("env", []), *env]
    container["securityContext"] |= pod.user
    if part != "submitter":
        container["resources"] = _resources(part, ray)
    for volume in spec["volumes"]:
        if "emptyDir" in volume:
            volume["emptyDir"]["sizeLimit"] = ray.disk
    if pod.pull_secrets:
        spec["imagePullSecrets"] = [dict(one) for one in pod.pull_secrets]
    if pod.service_account:  # a store may know the pod by it; there is no token for Kubernetes itself
        spec["serviceAccountName"] = pod.service_account
    return filled


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_unshared(inner) for inner in value]
    return value


def _resources(part: str, ray: Ray) -> dict[str, dict[str, str]]:
    """Requests equal limits: memory that is shared out twice is what kills a worker in the night."""
    if part == "head":
        wanted = {"cpu": f"{ray.head_cpus:g}", "memory": ray.head_memory}
    else:
        wanted = {"cpu": f"{ray.cpus_per_worker:g}", "memory": ray.memory_per_worker}
        if ray.gpus_per_worker:
            wanted[ray.gpu_resource] = str(math.ceil(ray.gpus_per_worker))
    return {"requests": dict(wanted), "limits": dict(wanted)}


def _schedule(spec: dict[str, Any], scheduling: Scheduling) -> None:
    if scheduling.tolerations:
        spec["tolerations"] = [*spec.get("tolerations", []), *map(dict, scheduling.tolerations)]
    if scheduling.node_selector:
        spec["nodeSelector"] = {**spec.get("nodeSelector", {}), **scheduling.node_selector}
    if scheduling.affinity:
        spec["affinity"] = {**spec.get("affinity", {}), **scheduling.affinity}


def environment(env: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Variables of the pipeline's pod for those of the cluster.

    A reference to a secret or a config map stays one. What refers to the pod itself (its labels, say) is
    handed on by its value, which only this process knows.
    """
    found: dict[str, dict[str, Any]] = {}
    for entry in env:
        name = entry["name"]
        if not name.upper().startswith(KEPT) or name in LOCAL:
            continue
        source = entry.get("valueFrom") or {}
        if source.get("secretKeyRef") or source.get("configMapKeyRef"):
            taken: dict[str, Any] = {"valueFrom": dict(source)}
        else:
            taken = {"value": os.environ.get(name, entry.get("value") or "")}
        for called in {name, KEYS.get(name, name)}:
            found[called] = {"name": called, **taken}
    for name in PLACES:
        if name in os.environ:
            found[name] = {"name": name, "value": os.environ[name]}
    shared = found.get(VARIABLE, {}).get("value", "")
    if shared and not shared.startswith("s3://"):  # a volume of this pod, which no other mounts
        del found[VARIABLE]
    return [found[name] for name in sorted(found)]


def _seconds(minutes: float) -> int:
    return max(1, round(60 * minutes))

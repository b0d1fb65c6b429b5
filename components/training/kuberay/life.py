"""The life of one RayJob, from the pipeline's pod: made or found again, waited for by its status, judged.

What cleans up when this process is killed, at any moment: the owner reference (the pod is gone), the entry
point in the cluster (no sign of life), the job's own deadlines and deletion rules, and ``sweep``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from components.common.errors import RetortError
from components.training.kuberay import reasons, template
from components.training.kuberay.api import WATCH_SECONDS, Api
from components.training.kuberay.template import Pod
from components.training.params import Ray

log = logging.getLogger(__name__)

Job = dict[str, Any]
PAUSE = 1.0  # seconds, at least, between two looks at a job
WHY_SECONDS = 15.0  # between two looks for what holds it up
GONE_SECONDS = 600.0  # for a job that is being removed
GRACE = 120.0  # seconds for KubeRay to end a job itself, past its deadline
FINISHED = ("Succeeded", "Failed")  # phases of a pod whose process has ended
STARTING, SLEEPING = ("", "Initializing", "Waiting", "Retrying"), ("Suspending", "Suspended")


def status_of(job: Mapping[str, Any]) -> tuple[str, str]:
    """The status of its cluster (Initializing, Running, Complete, Failed, ...) and of the job in it."""
    status = job.get("status") or {}
    return status.get("jobDeploymentStatus") or "", status.get("jobStatus") or ""


def ended(job: Mapping[str, Any]) -> bool:
    """Whether nothing more will become of it."""
    return status_of(job)[0] in ("Complete", "Failed", "ValidationFailed")


def succeeded(job: Mapping[str, Any]) -> bool:
    """Whether it ended well."""
    return status_of(job) == ("Complete", "SUCCEEDED")


def sweep(api: Api, run: str, step: str, keep: str) -> list[str]:
    """Remove jobs of this step of this run that nobody owns any more; their names.

    A job is owned as long as one of the pods that it belongs to is there and has not ended. Jobs of other
    runs are not even looked at.

    Args:
        keep: the name of a job that is judged elsewhere.
    """
    removed = []
    selector = ",".join(f"{key}={value}" for key, value in template.labels(run, step).items())
    for job in api.jobs(selector):
        head = job["metadata"]
        if head["name"] != keep and not head.get("deletionTimestamp") and not _owned(api, job):
            api.delete(head["name"], head["uid"])
            removed.append(head["name"])
    return removed


def _owned(api: Api, job: Mapping[str, Any]) -> bool:
    for owner in job["metadata"].get("ownerReferences") or []:
        pod = api.pod(owner["name"]) if owner["kind"] == "Pod" else None
        if pod is None or pod["metadata"]["uid"] != owner["uid"]:
            continue
        if (pod.get("status") or {}).get("phase") not in FINISHED:
            return True
    return False


def start(api: Api, wanted: Job, pod: Pod, finished: Callable[[Job], bool]) -> tuple[Job, bool]:
    """The job that does what ``wanted`` does, found or made; and whether it was found.

    Args:
        finished: whether a job that ended well has left what it made.

    Raises:
        RetortError: Kubernetes refuses it, or an earlier one does not go away.
    """
    name = wanted["metadata"]["name"]
    began = time.monotonic()
    while time.monotonic() - began < GONE_SECONDS:
        made = api.create(wanted)
        if made is not None:
            log.info(f"RayJob {name} is made, in namespace {api.namespace}")
            return made, False
        found = api.job(name)
        if found is not None and not found["metadata"].get("deletionTimestamp"):
            if not _same(found, wanted) or (ended(found) and not (succeeded(found) and finished(found))):
                api.delete(name, found["metadata"]["uid"])
            else:
                owned = own(api, found, pod)
                if owned is not None:
                    mine = _note(found, template.ATTEMPT) == _note(wanted, template.ATTEMPT)
                    log.info(f"RayJob {name} {'is made' if mine else 'is there already: going on with it'}")
                    return owned, not mine
        time.sleep(PAUSE)
    raise RetortError(
        f"ray.address: kuberay: RayJob {name} of an earlier try does not go away within "
        f"{GONE_SECONDS / 60:.0f} minutes; is the KubeRay operator running? (it has to let go of the job)"
    )


def _same(found: Job, wanted: Job) -> bool:
    """Whether both do the same work, on the same inputs."""
    return _note(found, template.WORK) == _note(wanted, template.WORK)


def _note(job: Job, key: str) -> str | None:
    return (job["metadata"].get("annotations") or {}).get(key)


def own(api: Api, job: Job, pod: Pod) -> Job | None:
    """Make the pod an owner of the job, beside the earlier ones; None when the job changed meanwhile."""
    head = job["metadata"]
    owners = head.get("ownerReferences") or []
    if any(owner["uid"] == pod.uid for owner in owners):
        return job
    change = {"ownerReferences": [*owners, pod.owner()], "resourceVersion": head["resourceVersion"]}
    return api.patch(head["name"], {"metadata": change})


def wait(api: Api, job: Job, ray: Ray, broken: Callable[[], bool]) -> tuple[Job | None, str]:
    """The job once it has ended (None: somebody removed it), and what last held it up.

    Args:
        broken: whether the step failed in a way that no new cluster changes; asked before one is made.

    Raises:
        RetortError: it did not start, or end, in time, and KubeRay has not ended it either.
    """
    name, said, why, looked = job["metadata"]["name"], None, "", time.monotonic()
    clock = _Clock(ray)
    while True:
        cluster, inside = status_of(job)
        if cluster != said:
            log.info(f"RayJob {name}: {_words(cluster, ray)}")
            said = cluster
        if ended(job):
            return job, why or reasons.why_waiting(api, job)
        if cluster in STARTING and (job.get("status") or {}).get("failed") and broken():
            return job, why  # it would only fail again, in a new cluster
        if not inside and time.monotonic() - looked > WHY_SECONDS and cluster not in SLEEPING:
            looked, before = time.monotonic(), why
            why = reasons.why_waiting(api, job) or why
            if why != before:
                log.warning(f"RayJob {name} waits: {why}")
        clock.need_time(job, why)
        turn = time.monotonic()
        for changed in api.changes(job, min(WATCH_SECONDS, clock.left)):
            if status_of(changed) != (cluster, inside):
                break
        time.sleep(max(0.0, PAUSE - (time.monotonic() - turn)))
        found = api.job(name)
        if found is None or found["metadata"]["uid"] != job["metadata"]["uid"]:
            return None, why
        job = found


class _Clock:
    """Deadlines by this process's own clock: for an operator that is not there, and ends nothing."""

    def __init__(self, ray: Ray) -> None:
        self._start, self._whole = 60 * ray.start_minutes + GRACE, 60 * ray.deadline_minutes + GRACE
        self._began = self._waiting = time.monotonic()
        self.left = self._start

    def need_time(self, job: Job, why: str) -> None:
        cluster, _ = status_of(job)
        now = time.monotonic()
        if cluster in SLEEPING:  # in a queue, for as long as that takes
            self._began = self._waiting = now
        starting = cluster in STARTING
        if not starting:
            self._waiting = now
        self.left = min(self._waiting + self._start, self._began + self._whole) - now
        if self.left > 0:
            return
        name = job["metadata"]["name"]
        if not cluster:
            said = "KubeRay's operator has not looked at it; is the operator running, and for this namespace?"
        else:
            said = why or f"its status is still {cluster}"
        limit = "ray.start_minutes" if starting else "ray.deadline_minutes"
        raise RetortError(f"RayJob {name}: not in time ({limit}): {said}")


def _words(cluster: str, ray: Ray) -> str:
    if cluster in SLEEPING and ray.queue:
        return f"waits in the queue {ray.queue}"
    return {
        "": "waits for KubeRay",
        "Initializing": "its pods are started",
        "Running": "runs",
        "Retrying": "its cluster was lost; another is made",
    }.get(cluster, cluster.lower())


def failure(job: Job, ray: Ray, why: str) -> RetortError:
    """What to say of a job that failed and left no report.

    Args:
        why: what held its pods up, as ``reasons`` says it.
    """
    status = job.get("status") or {}
    reason, message = status.get("reason") or "", " ".join(str(status.get("message") or "").split())
    cluster, inside = status_of(job)
    if reason == "PreRunningDeadlineExceeded":
        said = f"its pods did not run within ray.start_minutes ({ray.start_minutes:g}): "
        said += why or f"{message}; kubectl describe rayjob shows more"
    elif reason == "DeadlineExceeded":
        said = (
            f"not done within ray.deadline_minutes ({ray.deadline_minutes:g}); another try goes on from its "
        )
        said += "last checkpoint"
    elif cluster == "ValidationFailed":
        said = f"KubeRay refuses it ({message}); this needs KubeRay 1.6 or later"
    elif inside == "STOPPED":
        said = "somebody stopped it"
    else:
        said = f"{reason or cluster or 'failed'}: {message or 'no more is said'}; its log above says more"
    return RetortError(f"RayJob {job['metadata']['name']}: {said}")

"""A Kubernetes that behaves, and a KubeRay that lives in it, with the faults that a test plants.

What nobody owns is collected; a finalizer holds a RayJob until the operator has stopped it. The operator
moves each RayJob through its states, starts a stand-in for the step in its cluster, and applies its rules.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tests.components.training.kuberay.api_server import NAMESPACE, Object, Server, handler
from tests.components.training.kuberay.entries import TICK, Entry, Process

FINALIZER = "ray.io/rayjob-finalizer"
RETRY_SECONDS = 0.5  # until the pods of a cluster are gone


class Cluster:
    """State, and the faults that a test plants.

    Attributes:
        skew: seconds by which the cluster's clock is ahead of ours.
        crd: whether RayJobs are known.
        operator: whether KubeRay runs.
        pods_say: what pods say instead of starting: image, secret, gpu, nothing; or quota.
        forbidden: (verb, resource) pairs that the account lacks.
        away: whether nothing is answered.
        drop_watches: whether each watch breaks off at once; ``gone``: each is told that it is too old.
        cut_logs: whether each log ends two lines after the one before.
        outcome: how the step ends: ok, findings, crash or stopped.
        command: runs the real entry point, as its last words; None: a stand-in runs in its place.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.version = 0
        self.objects: dict[tuple[str, str], Object] = {}
        self.history: list[tuple[int, str, Object]] = []
        self.floor = 0
        self.events: list[Object] = []
        self.logs: dict[str, list[str]] = {}
        self.asked: set[tuple[str, str]] = set()
        self.entries: dict[str, Entry] = {}  # by uid of the RayJob
        self.started: list[tuple[str, str]] = []  # name and uid of each cluster that came up
        self.lost: list[str] = []  # names of jobs that were removed while they ran
        self.silenced: list[str] = []  # ... that ended themselves, since nobody was there
        self.trained: list[str] = []  # ... whose step began to work, or went on
        self.expired: list[str] = []  # ... that a deletion rule removed, some time after their end
        self.endless: set[str] = set()  # ... whose step goes on until it is stopped
        self.skew = 0.0
        self.crd = self.operator = True
        self.pods_say = ""
        self.forbidden: set[tuple[str, str]] = set()
        self.away = self.drop_watches = self.gone = self.cut_logs = False
        self.outcome = "ok"
        self.command: list[str] | None = None
        self.quota = ""
        self.cuts = 0  # logs that were asked for
        self._end = threading.Event()
        self.server = Server(("127.0.0.1", 0), handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        for work in (self.server.serve_forever, self._operate):
            threading.Thread(target=work, daemon=True).start()

    def close(self) -> None:
        self._end.set()
        for entry in list(self.entries.values()):
            entry.stop("closed")
        self.server.shutdown()
        self.server.server_close()

    # --- what tests look at, and do ---

    def now(self) -> str:
        return (datetime.now(UTC) + timedelta(seconds=self.skew)).strftime("%Y-%m-%dT%H:%M:%SZ")

    def add_pod(self, name: str, **spec: Any) -> Object:
        container = {"name": "main", "image": "registry/retort@sha256:1", "env": [], **spec.pop("main", {})}
        pod = {
            "metadata": {"name": name, "labels": spec.pop("labels", {})},
            "spec": {"containers": [container], "serviceAccountName": "pipeline-runner", **spec},
            "status": {"phase": "Running"},
        }
        return self.put("pods", pod, "ADDED")

    def end_pod(self, name: str, phase: str = "Failed") -> None:
        with self.lock:
            pod = copy.deepcopy(self.objects["pods", name])
            pod["status"] = {**pod["status"], "phase": phase}
            self.put("pods", pod, "MODIFIED")

    def remove_pod(self, name: str) -> None:
        with self.lock:
            self.objects.pop(("pods", name), None)
            self._collect()

    def jobs(self) -> list[Object]:
        with self.lock:
            return [copy.deepcopy(one) for (kind, _), one in self.objects.items() if kind == "rayjobs"]

    def running(self) -> list[str]:
        """Names of jobs whose step runs."""
        with self.lock:
            return [entry.name for entry in self.entries.values() if entry.is_alive()]

    def forget_history(self) -> None:
        with self.lock:
            self.floor = self.version

    def put(self, kind: str, value: Object, change: str) -> Object:
        with self.changed:
            self.version += 1
            stored = copy.deepcopy(value)
            head = stored["metadata"]
            head.setdefault("namespace", NAMESPACE)
            head.setdefault("uid", str(uuid.uuid4()))
            head.setdefault("creationTimestamp", self.now())
            head["resourceVersion"] = str(self.version)
            self.objects[kind, head["name"]] = stored
            if kind == "rayjobs":
                self.history.append((self.version, change, stored))
            self.changed.notify_all()
            return copy.deepcopy(stored)

    def drop(self, kind: str, name: str) -> None:
        with self.changed:
            gone = self.objects.pop((kind, name))
            self.version += 1
            if kind == "rayjobs":
                gone = copy.deepcopy(gone)
                gone["metadata"]["resourceVersion"] = str(self.version)
                self.history.append((self.version, "DELETED", gone))
                for key in [key for key, one in self.objects.items() if self._belongs(one, name)]:
                    del self.objects[key]
            self.changed.notify_all()

    @staticmethod
    def _belongs(one: Object, name: str) -> bool:
        return one["metadata"].get("labels", {}).get("retort/job") == name

    def delete_job(self, name: str) -> None:
        """As DELETE does: at once without a finalizer, else the operator is asked first."""
        with self.lock:
            job = copy.deepcopy(self.objects["rayjobs", name])
            if not job["metadata"].get("finalizers"):
                self.drop("rayjobs", name)
            elif not job["metadata"].get("deletionTimestamp"):
                job["metadata"]["deletionTimestamp"] = self.now()
                self.put("rayjobs", job, "MODIFIED")

    def _collect(self) -> None:
        """Remove RayJobs none of whose owners is there any more."""
        for job in self.jobs():
            owners = job["metadata"].get("ownerReferences") or []
            there = [
                owner
                for owner in owners
                if self.objects.get(("pods", owner["name"]), {}).get("metadata", {}).get("uid")
                == owner["uid"]
            ]
            if owners and not there and not job["metadata"].get("deletionTimestamp"):
                self.delete_job(job["metadata"]["name"])

    # --- KubeRay ---

    def _operate(self) -> None:
        while not self._end.wait(TICK):
            if not self.operator:
                continue
            for job in self.jobs():
                with self.lock, contextlib.suppress(KeyError):
                    current = self.objects["rayjobs", job["metadata"]["name"]]
                    if current["metadata"]["uid"] == job["metadata"]["uid"]:
                        self._reconcile(copy.deepcopy(current))

    def _status(self, job: Object, **values: Any) -> None:
        job["status"] = {**(job.get("status") or {}), **values}
        if values.get("jobDeploymentStatus") in ("Complete", "Failed"):
            job["status"]["ended"] = time.monotonic()
        self.put("rayjobs", job, "MODIFIED")

    def _reconcile(self, job: Object) -> None:
        head, spec = job["metadata"], job["spec"]
        status = job.get("status") or {}
        name, uid = head["name"], head["uid"]
        entry = self.entries.get(uid)
        if head.get("deletionTimestamp"):
            if entry is not None and entry.is_alive():
                entry.stop("deleted")
                if entry.at_work and not entry.silent:
                    self.lost.append(name)
            head["finalizers"] = []
            self.objects["rayjobs", name] = job
            self.drop("rayjobs", name)
            return
        state = status.get("jobDeploymentStatus", "")
        if state == "":
            if spec.get("suspend"):
                self._status(job, jobDeploymentStatus="Suspended")
                return
            head["finalizers"] = [FINALIZER]
            self._status(
                job,
                jobDeploymentStatus="Initializing",
                rayClusterName=f"{name}-abcde",
                began=time.monotonic(),
            )
        elif state == "Suspended":
            if not spec.get("suspend"):
                self._status(job, jobDeploymentStatus="")
        elif state == "Initializing":
            if time.monotonic() - status["began"] > spec["preRunningDeadlineSeconds"]:
                self._status(
                    job, jobDeploymentStatus="Failed", reason="PreRunningDeadlineExceeded", message="passed"
                )
                self._drop_pods(name)
            elif self.pods_say:
                self._hold_up(job)
            else:
                for part in ("head", "worker"):
                    self._ray_pod(job, part)
                self._status(job, jobDeploymentStatus="Running")
                self._ray_pod(job, "submitter")
        elif state == "Running":
            self._run(job, entry)
        elif state == "Retrying":
            self._drop_pods(name)
            if time.monotonic() - status["retrying"] > RETRY_SECONDS:
                self._status(job, jobDeploymentStatus="", jobStatus="", reason="", message="")
        elif state in ("Complete", "Failed"):
            self._drop_pods(name)
            for rule in spec.get("deletionStrategy", {}).get("deletionRules", []):
                condition = rule["condition"]
                fits = condition.get("jobStatus") == status.get("jobStatus") or (
                    condition.get("jobDeploymentStatus") == state
                )
                due = time.monotonic() - status["ended"] >= condition["ttlSeconds"]
                if rule["policy"] == "DeleteSelf" and fits and due:
                    self.expired.append(name)
                    self.delete_job(name)
                    return

    def _run(self, job: Object, entry: Entry | None) -> None:
        name, uid, spec = job["metadata"]["name"], job["metadata"]["uid"], job["spec"]
        if entry is None:
            self.entries[uid] = Entry(self, job) if self.command is None else Process(self, job)
            self.started.append((name, uid))
            self.entries[uid].start()
            self._status(job, jobStatus="RUNNING")
        elif time.monotonic() - job["status"]["began"] > spec["activeDeadlineSeconds"]:
            entry.stop("deadline")
            self._status(job, jobDeploymentStatus="Failed", reason="DeadlineExceeded", message="passed")
        elif not entry.is_alive():
            del self.entries[uid]
            if entry.ended == "stopped":
                self._status(job, jobDeploymentStatus="Complete", jobStatus="STOPPED")
            elif entry.status == 0:
                self._status(job, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
            else:
                failed = job["status"].get("failed", 0) + 1
                again = failed <= spec["backoffLimit"]
                self._status(
                    job,
                    jobDeploymentStatus="Retrying" if again else "Failed", jobStatus="FAILED",
                    reason="AppFailed", message=f"exit {entry.status}", failed=failed,
                    retrying=time.monotonic(),
                )  # fmt: skip

    def _ray_pod(self, job: Object, part: str, status: Object | None = None) -> None:
        name = job["metadata"]["name"]
        labels = {"retort/job": name, "retort/part": part}
        pod = {"metadata": {"name": f"{name}-{part}", "labels": labels}, "spec": {"containers": []}}
        self.put("pods", {**pod, "status": status or {"phase": "Running"}}, "ADDED")

    def _drop_pods(self, name: str) -> None:
        """The cluster's pods; the submitter's lives as long as the RayJob, as its log does."""
        for part in ("head", "worker"):
            self.objects.pop(("pods", f"{name}-{part}"), None)

    def _hold_up(self, job: Object) -> None:
        if self.pods_say == "quota":
            message = (
                'pods "x" is forbidden: exceeded quota: small, requested: memory=8Gi, limited: memory=4Gi'
            )
            condition = {"type": "ReplicaFailure", "status": "True", "message": message}
            if "rayClusterStatus" not in job["status"]:
                self._status(job, rayClusterStatus={"conditions": [condition]})
            return
        if self.pods_say == "nothing":
            return
        waiting = {
            "image": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"},
            "secret": {"reason": "CreateContainerConfigError", "message": 'secret "retort-store" not found'},
        }
        if self.pods_say in waiting:
            state = {"image": "registry/retort:wrong", "state": {"waiting": waiting[self.pods_say]}}
            status: Object = {"phase": "Pending", "containerStatuses": [state]}
        else:
            message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
            condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
            status = {"phase": "Pending", "conditions": [{**condition, "message": message}]}
        self._ray_pod(job, "worker", status)

    def say(self, job: str, text: str) -> None:
        """A line in the submitter's log; its time is the cluster's."""
        stamp = datetime.now(UTC) + timedelta(seconds=self.skew)
        with self.changed:
            self.logs.setdefault(f"{job}-submitter", []).append(f"{stamp:%Y-%m-%dT%H:%M:%S.%f}000Z {text}")
            self.changed.notify_all()

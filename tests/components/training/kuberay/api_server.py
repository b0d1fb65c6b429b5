"""A Kubernetes API that behaves, and a KubeRay that lives in it.

Objects have versions; watches send bookmarks, drop, and are told 410 when they fall behind; writes conflict;
what nobody owns is collected; a finalizer holds a RayJob until the operator has stopped it. The operator
moves each RayJob through its states, starts a stand-in for the step in its cluster, and applies its rules.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from components.common.storage import write_json
from components.training import remote
from components.training.kuberay import parcel
from components.training.kuberay.entry import Watch

NAMESPACE = "team"
FINALIZER = "ray.io/rayjob-finalizer"
TICK = 0.02
RETRY_SECONDS = 0.5  # until the pods of a cluster are gone
STEPS = 20  # of the stand-in, each a tick
Object = dict[str, Any]


class Refused(Exception):  # noqa: N818
    def __init__(self, code: int, reason: str, message: str, plain: bool = False) -> None:
        self.code, self.reason, self.message, self.plain = code, reason, message, plain


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
        self.server = _Server(("127.0.0.1", 0), _handler(self))
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


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no fault of the server's."""


class Entry(threading.Thread):
    """A stand-in for the step in its cluster: goes on from its checkpoint, ends itself when nobody lives."""

    def __init__(self, cluster: Cluster, job: Object) -> None:
        super().__init__(daemon=True)
        self.name_of_job = job["metadata"]["name"]
        self.cluster, self.status, self.ended, self.silent, self.at_work = cluster, 1, "", False, False
        words = shlex.split(job["spec"]["entrypoint"])
        self.storage = remote.open_storage(words[3])
        self.attempt = words[5]
        self.name = self.name_of_job
        self._stop_now = threading.Event()

    def stop(self, why: str) -> None:
        self.ended = why
        self._stop_now.set()

    def _be_silent(self) -> None:
        if not self.is_alive():  # a real one's watch ends with its process
            return
        self.silent = True
        self.cluster.silenced.append(self.name)
        self.stop("silent")

    def run(self) -> None:
        place = parcel.folder(self.name)
        before = parcel.read_json(self.storage, f"{place}/{self.attempt}-{parcel.RESULT}")
        if before is not None:
            self.status = before["status"]
            return
        work = parcel.read_json(self.storage, f"{place}/{self.attempt}-{parcel.WORK}")
        watch = Watch(
            lambda: parcel.read_text(self.storage, f"{place}/{parcel.BEAT}"), work["silence"], self._be_silent
        )
        watch.start()
        self.at_work = True
        self.cluster.trained.append(self.name)
        checkpoint = f"{place}/checkpoint"
        done = int(parcel.read_text(self.storage, checkpoint) or 0)
        self.cluster.say(self.name, f"going on at step {done}")
        while (done < STEPS or self.name in self.cluster.endless) and not self._stop_now.wait(TICK):
            done += 1
            parcel.put_text(self.storage, checkpoint, str(done))
            self.cluster.say(self.name, f"step {done}")
        if self.ended == "silent":
            self._leave(kind=parcel.SILENT, message="nobody there", rule="", status=143)
        elif not self.ended:
            self._finish()

    def _finish(self) -> None:
        outcome = self.cluster.outcome
        if outcome == "findings":
            message = "finetune: train.learns: it does not learn\nsee outputs/teacher/report.html"
            self._leave(kind="FindingsError", message=message, rule="", status=1)
        elif outcome == "stopped":
            self.ended = "stopped"
        elif outcome == "ok":
            self._leave(kind="ok", message="", rule="", status=0)

    def _leave(self, **result: Any) -> None:
        with tempfile.TemporaryDirectory() as name:
            out = Path(name) / "out"
            write_json(out / "report.json", {"left by": self.attempt, "kind": result["kind"]})
            (out / "report.html").write_text("<html></html>")
            result["out"] = parcel.packed(remote.put(self.storage, out))
        parcel.put_json(self.storage, f"{parcel.folder(self.name)}/{self.attempt}-{parcel.RESULT}", result)
        self.status = result["status"]


class Process(Entry):
    """The real entry point, in a process: what Ray's job server would run on the head."""

    def __init__(self, cluster: Cluster, job: Object) -> None:
        super().__init__(cluster, job)
        assert cluster.command is not None
        _, *words = shlex.split(job["spec"]["entrypoint"])
        self._command = [*cluster.command, sys.executable, *words]
        self._process: subprocess.Popen[str] | None = None

    def stop(self, why: str) -> None:
        super().stop(why)
        if self._process is not None:
            self._process.terminate()

    def run(self) -> None:
        with subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as self._process:
            assert self._process.stdout is not None
            for line in self._process.stdout:
                self.cluster.say(self.name, line.rstrip("\n"))
        self.status = self._process.returncode


def _handler(cluster: Cluster) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._answer("GET")

        def do_POST(self) -> None:
            self._answer("POST")

        def do_PATCH(self) -> None:
            self._answer("PATCH")

        def do_DELETE(self) -> None:
            self._answer("DELETE")

        def _answer(self, method: str) -> None:
            if cluster.away:
                self.close_connection = True
                self.connection.close()
                return
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            try:
                self._route(method, body)
            except Refused as refused:
                status = {
                    "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": refused.reason,
                    "message": refused.message, "code": refused.code,
                }  # fmt: skip
                self._send(refused.code, refused.message.encode() if refused.plain else status)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def _route(self, method: str, body: Any) -> None:
            parts = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(parts.query).items()}
            found = re.fullmatch(
                rf"/(?:api/v1|apis/ray\.io/v1)/namespaces/{NAMESPACE}/(rayjobs|pods|events)(?:/([^/]+))?(/log)?",
                parts.path,
            )
            if found is None or (found[1] == "rayjobs" and not cluster.crd):
                raise Refused(404, "NotFound", "404 page not found", plain=True)
            kind, name, log = found[1], found[2], bool(found[3])
            verb = {"POST": "create", "PATCH": "patch", "DELETE": "delete"}.get(
                method, "get" if name else "list"
            )
            verb = "watch" if query.get("watch") in ("true", "True") else verb
            resource = "pods/log" if log else kind
            cluster.asked.add((verb, resource))
            if (verb, resource) in cluster.forbidden:
                who = "system:serviceaccount:team:pipeline-runner"
                message = f'{resource} is forbidden: User "{who}" cannot {verb} resource "{resource}"'
                raise Refused(403, "Forbidden", message)
            if verb == "watch":
                self._watch(query)
            elif log:
                self._log(name)
            elif kind == "events":
                self._send(200, {"kind": "EventList", "items": cluster.events})
            else:
                self._send(*self._object(verb, kind, name, query, body))

        def _object(self, verb: str, kind: str, name: str, query: dict[str, str], body: Any) -> Any:
            with cluster.lock:
                if verb == "list":
                    wanted = [pair.split("=") for pair in query.get("labelSelector", "").split(",") if pair]
                    items = [
                        one
                        for (of, _), one in cluster.objects.items()
                        if of == kind
                        and all(one["metadata"].get("labels", {}).get(key) == value for key, value in wanted)
                    ]
                    return 200, {"items": items, "metadata": {"resourceVersion": str(cluster.version)}}
                if verb == "create":
                    name = body["metadata"]["name"]
                    if (kind, name) in cluster.objects:
                        raise Refused(409, "AlreadyExists", f'{kind}.ray.io "{name}" already exists')
                    if cluster.quota:
                        raise Refused(403, "Forbidden", cluster.quota)
                    return 201, cluster.put(kind, body, "ADDED")
                if (kind, name) not in cluster.objects:
                    raise Refused(404, "NotFound", f'{kind} "{name}" not found')
                if verb == "get":
                    return 200, cluster.objects[kind, name]
                if verb == "patch":
                    return 200, self._patch(kind, name, body)
                uid = (body or {}).get("preconditions", {}).get("uid")
                if uid not in (None, cluster.objects[kind, name]["metadata"]["uid"]):
                    raise Refused(409, "Conflict", "the UID in the precondition does not match")
                cluster.delete_job(name)
                return 200, {"kind": "Status", "status": "Success"}

        def _patch(self, kind: str, name: str, body: Any) -> Object:
            assert self.headers["Content-Type"] == "application/merge-patch+json"
            changed = copy.deepcopy(cluster.objects[kind, name])
            version = body.get("metadata", {}).get("resourceVersion")
            if version not in (None, changed["metadata"]["resourceVersion"]):
                raise Refused(409, "Conflict", "the object has been modified")
            changed["metadata"] |= {k: v for k, v in body["metadata"].items() if k != "resourceVersion"}
            return cluster.put(kind, changed, "MODIFIED")

        def _watch(self, query: dict[str, str]) -> None:
            since = int(query["resourceVersion"])
            name = query["fieldSelector"].partition("=")[2]
            end = time.monotonic() + float(query["timeoutSeconds"])
            self._begin()
            if cluster.gone or since < cluster.floor:
                status = {
                    "kind": "Status",
                    "code": 410,
                    "reason": "Expired",
                    "message": "too old resource version",
                }
                self._piece({"type": "ERROR", "object": status})
                self._finish()
                return
            self._piece({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(since)}}})
            while time.monotonic() < end and not cluster.drop_watches and not cluster.away:
                with cluster.changed:
                    news = [
                        one
                        for one in cluster.history
                        if one[0] > since and one[2]["metadata"]["name"] == name
                    ]
                    if not news:
                        cluster.changed.wait(0.05)
                for version, change, value in news:
                    since = version
                    self._piece({"type": change, "object": value})
            if cluster.drop_watches or cluster.away:
                self.close_connection = True
                self.connection.close()
                return
            self._finish()

        def _log(self, pod: str) -> None:
            job = pod.removesuffix("-submitter")
            if ("pods", pod) not in cluster.objects:
                raise Refused(404, "NotFound", f'pods "{pod}" not found')
            self._begin("text/plain")
            cluster.cuts += 1
            for sent, line in enumerate(self._lines(pod, job), start=1):
                self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
                if cluster.cut_logs and sent == 2 * cluster.cuts:
                    break
            self._finish()

        def _lines(self, pod: str, job: str) -> Iterator[bytes]:
            number = 0
            while not cluster.away:
                with cluster.changed:
                    lines = cluster.logs.get(pod, [])
                    if number == len(lines):
                        if job not in cluster.running():
                            return
                        cluster.changed.wait(0.05)
                for line in lines[number:]:
                    number += 1
                    yield f"{line}\n".encode()

        def _begin(self, kind: str = "application/json") -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()

        def _piece(self, value: Any) -> None:
            line = json.dumps(value).encode() + b"\n"
            self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
            self.wfile.flush()

        def _finish(self) -> None:
            self.wfile.write(b"0\r\n\r\n")

        def _send(self, code: int, value: Any) -> None:
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain" if isinstance(value, bytes) else "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler

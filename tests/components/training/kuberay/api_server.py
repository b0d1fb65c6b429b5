"""The API of a Kubernetes over HTTP: versions, conflicts, and watches that drop or fall behind (410)."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from tests.components.training.kuberay.cluster import Cluster

NAMESPACE = "team"
Object = dict[str, Any]


class Refused(Exception):  # noqa: N818
    def __init__(self, code: int, reason: str, message: str, plain: bool = False) -> None:
        self.code, self.reason, self.message, self.plain = code, reason, message, plain


class Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no fault of the server's."""


def handler(cluster: Cluster) -> type[BaseHTTPRequestHandler]:
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

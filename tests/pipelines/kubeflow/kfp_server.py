"""A small KFP API server for contract tests: the v2beta1 endpoints that submit and schedule call.

Every request body is parsed, and every answer built, by the message types of ``kfp_server_api``, which are
generated from the real server's API: a message that is not of the contract fails here as it would there. What
the real server refuses (backend/src/apiserver of kubeflow/pipelines) is refused here in like words.
"""

from __future__ import annotations

import email
import json
import re
import ssl
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kfp_server_api as api
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

PREFIX = "/apis/v2beta1"
CODES = {400: 3, 401: 16, 403: 7, 404: 5, 409: 6, 500: 13}  # of HTTP to those of gRPC


class RefusedError(Exception):
    """An answer that is an error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests to a path that begins like this.

    Attributes:
        request: method and path below the prefix, such as 'POST /runs'.
        code: of the answer; 0 for none: the connection breaks.
        done: whether the request was carried out all the same.
        seconds: before it is answered.
        empty: a list without messages instead, as before another client made one.
    """

    request: str
    code: int = 0
    message: str = "it broke"
    done: bool = False
    seconds: float = 0.0
    empty: bool = False
    times: int = 1


class KfpServer:
    """Listens on a free port of 127.0.0.1; remembers what it was sent.

    ``states`` are what a run's polls see, the last one for ever; ``None`` cuts the connection instead.

    Args:
        users: namespaces that the token's user may write to; None for a server without users.
        token: without which every request is refused; '' for none.
        tag: its version, as healthz says it; '' for a server that does not.
        new: whether v2beta1's healthz says the version, too (KFP 2.17 does).
        certificate: file with the server's certificate and key, for https.
        page: most messages in one answer of a list.
    """

    def __init__(
        self,
        *,
        users: list[str] | None = None,
        token: str = "",
        tag: str = "2.17.0",
        new: bool = True,
        certificate: Path | None = None,
        page: int = 200,
    ) -> None:
        self.users, self.token, self.tag, self.new, self.page = users, token, tag, new, page
        self.experiments: list[api.V2beta1Experiment] = []
        self.pipelines: list[api.V2beta1Pipeline] = []
        self.versions: list[api.V2beta1PipelineVersion] = []
        self.runs: list[api.V2beta1Run] = []
        self.schedules: list[api.V2beta1RecurringRun] = []
        self.states: list[api.V2beta1Run | None] = [api.V2beta1Run(state="SUCCEEDED")]
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self._made = 0
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._https = certificate is not None
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    @property
    def url(self) -> str:
        return f"http{'s' if self._https else ''}://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> KfpServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def writes(self) -> list[str]:
        """The requests that change something, in order."""
        return [request for request in self.requests if not request.startswith("GET")]

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        """The message that answers one request; raises KeyError where there is no such endpoint."""
        if match := re.fullmatch(r"/pipelines/([^/]+)/versions", path):
            found = [version for version in self.versions if version.pipeline_id == match[1]]
            return self._page(api.V2beta1ListPipelineVersionsResponse, "pipeline_versions", found, query)
        if match := re.fullmatch(r"/runs/([^/]+)", path):
            return self._poll(match[1])
        if match := re.fullmatch(r"/recurringruns/([^/:]+)(?::(\w+))?", path):
            return self._change(method, match[1], match[2])
        return {
            ("GET", "/experiments"): lambda: self._page(
                api.V2beta1ListExperimentsResponse, "experiments", self._seen(self.experiments, query), query
            ),
            ("POST", "/experiments"): lambda: self._add_experiment(_parse(body, "V2beta1Experiment")),
            ("GET", "/pipelines"): lambda: self._page(
                api.V2beta1ListPipelinesResponse, "pipelines", self._seen(self.pipelines, query), query
            ),
            ("POST", "/pipelines"): lambda: self._add_pipeline(_parse(body, "V2beta1Pipeline")),
            ("POST", "/pipelines/upload_version"): lambda: self._add_version(
                query["pipelineid"], query["name"], body
            ),
            ("GET", "/runs"): lambda: self._page(
                api.V2beta1ListRunsResponse, "runs", self._of_experiment(self.runs, query), query
            ),
            ("POST", "/runs"): lambda: self._add_run(_parse(body, "V2beta1Run")),
            ("GET", "/recurringruns"): lambda: self._page(
                api.V2beta1ListRecurringRunsResponse,
                "recurring_runs",
                self._of_experiment(self.schedules, query),
                query,
            ),
            ("POST", "/recurringruns"): lambda: self._add_schedule(_parse(body, "V2beta1RecurringRun")),
        }[method, path]()

    def health(self, version: str) -> dict[str, Any]:
        """The real server answers this by hand, with more than its message type has."""
        message: dict[str, Any] = {"multi_user": self.users is not None}
        if version == "v1beta1" or self.new:
            message |= {"commit_sha": "abc", "tag_name": self.tag or "unknown"}
        return message

    def _seen(self, messages: list[Any], query: dict[str, str]) -> list[Any]:
        self._may(query.get("namespace"))
        return [message for message in messages if message.namespace == query.get("namespace")]

    def _may(self, namespace: str | None) -> None:
        if self.users is None:
            return
        if not namespace:
            raise RefusedError(400, "An experiment cannot have an empty namespace in multi-user mode")
        if namespace not in self.users:
            raise RefusedError(
                403, f"User 'ada' is not authorized with reason: no rights in namespace {namespace}"
            )

    def _of_experiment(self, messages: list[Any], query: dict[str, str]) -> list[Any]:
        return [message for message in messages if message.experiment_id == query["experiment_id"]]

    def _page(self, kind: Any, field: str, messages: list[Any], query: dict[str, str]) -> Any:
        """One page of what the filter lets through; an empty list is left out, as the real server does."""
        for predicate in json.loads(query.get("filter", "{}")).get("predicates", []):
            assert predicate["operation"] == "EQUALS", predicate
            messages = [m for m in messages if getattr(m, predicate["key"]) == predicate["stringValue"]]
        begin = int(query.get("page_token") or 0)
        end = begin + min(self.page, int(query["page_size"]))
        more = {"next_page_token": str(end)} if end < len(messages) else {}
        return kind(**{field: messages[begin:end] or None}, total_size=len(messages), **more)

    def _id(self, kind: str) -> str:
        self._made += 1
        return f"{kind}-{self._made}"

    def _unique(self, messages: list[Any], name: str, what: str) -> None:
        if any(message.display_name == name for message in messages):
            raise RefusedError(409, f"Failed to create a new {what}: already exists: {name}")

    def _add_experiment(self, experiment: api.V2beta1Experiment) -> api.V2beta1Experiment:
        self._may(experiment.namespace)
        beside = [other for other in self.experiments if other.namespace == experiment.namespace]
        self._unique(beside, experiment.display_name, "experiment")
        experiment.experiment_id = self._id("experiment")
        self.experiments.append(experiment)
        return experiment

    def _add_pipeline(self, pipeline: api.V2beta1Pipeline) -> api.V2beta1Pipeline:
        self._may(pipeline.namespace)
        beside = [other for other in self.pipelines if other.namespace == pipeline.namespace]
        self._unique(beside, pipeline.display_name, "pipeline")
        pipeline.pipeline_id = self._id("pipeline")
        self.pipelines.append(pipeline)
        return pipeline

    def _add_version(self, pipeline_id: str, name: str, content: bytes) -> api.V2beta1PipelineVersion:
        spec, platform = yaml.load_all(content, yaml.CSafeLoader)
        json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
        json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
        (pipeline,) = (pipeline for pipeline in self.pipelines if pipeline.pipeline_id == pipeline_id)
        self._may(pipeline.namespace)
        self._unique([v for v in self.versions if v.pipeline_id == pipeline_id], name, "pipeline version")
        version = api.V2beta1PipelineVersion(
            pipeline_id=pipeline_id,
            pipeline_version_id=self._id("version"),
            display_name=name,
            pipeline_spec={"pipeline_spec": spec, "platform_spec": platform},
        )
        self.versions.append(version)
        return version

    def _startable(self, message: Any) -> None:
        """The experiment and the version must be there, and the values must be parameters of it."""
        if not any(e.experiment_id == message.experiment_id for e in self.experiments):
            raise RefusedError(404, f"experiment {message.experiment_id} not found")
        wanted = message.pipeline_version_reference.pipeline_version_id
        found = [version for version in self.versions if version.pipeline_version_id == wanted]
        if not found:
            raise RefusedError(404, f"pipeline version {wanted} not found")
        inputs = found[0].pipeline_spec["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
        unknown = set(message.runtime_config.parameters) - set(inputs)
        if unknown:
            raise RefusedError(400, f"Unrecognized input parameters: {sorted(unknown)}")

    def _add_run(self, run: api.V2beta1Run) -> api.V2beta1Run:
        self._startable(run)
        run.run_id = self._id("run")
        self.runs.append(run)
        return run

    def _poll(self, run_id: str) -> api.V2beta1Run:
        found = [run for run in self.runs if run.run_id == run_id]
        if not found:
            raise RefusedError(404, f"Run {run_id} not found")
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if state is None:
            raise ConnectionError
        return api.V2beta1Run(
            run_id=run_id,
            state=state.state,
            error=state.error,
            run_details=state.run_details,
            state_history=state.state_history,
        )

    def _add_schedule(self, schedule: api.V2beta1RecurringRun) -> api.V2beta1RecurringRun:
        self._startable(schedule)
        if not 1 <= int(schedule.max_concurrency) <= 10:
            raise RefusedError(400, "Max concurrency of a recurring run must be at least 1 and at most 10")
        schedule.recurring_run_id = self._id("schedule")
        schedule.status = "ENABLED" if schedule.mode == "ENABLE" else "DISABLED"
        schedule.service_account = schedule.service_account or "pipeline-runner"
        self.schedules.append(schedule)
        return schedule

    def _change(self, method: str, schedule_id: str, verb: str | None) -> dict[str, Any]:
        found = [schedule for schedule in self.schedules if schedule.recurring_run_id == schedule_id]
        if not found:
            raise RefusedError(404, f"recurring run {schedule_id} not found")
        if (method, verb) == ("DELETE", None):
            self.schedules.remove(found[0])
        else:
            mode = {("POST", "enable"): "ENABLE", ("POST", "disable"): "DISABLE"}[method, str(verb)]
            found[0].mode, found[0].status = mode, f"{mode}D"
        return {}

    def _fault(self, request: str) -> Fault | None:
        """The first fault that is meant for a request."""
        fault = next((fault for fault in self.faults if request.startswith(fault.request)), None)
        if fault is not None:
            fault.times -= 1
            if not fault.times:
                self.faults.remove(fault)
        return fault

    def _handler(server: KfpServer) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - the handler has a self
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._do(None)

            def do_DELETE(self) -> None:
                self._do(None)

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                kind, body = self.headers.get("Content-Type", ""), self.rfile.read(length)
                if kind.startswith("multipart/form-data"):
                    form = email.message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + body)
                    (file,) = form.get_payload()
                    self._do(file.get_payload(decode=True))
                else:
                    self._do(json.loads(body) if body else None)

            def _do(self, body: Any) -> None:
                url = urlsplit(self.path)
                query = {key: values[0] for key, values in parse_qs(url.query).items()}
                path = url.path.removeprefix(PREFIX)
                request = f"{self.command} {path}"
                server.requests.append(request)
                try:
                    if server.token and self.headers.get("Authorization") != f"Bearer {server.token}":
                        raise RefusedError(401, "Request header error: there is no user identity header")
                    fault = server._fault(request)
                    time.sleep(fault.seconds if fault else 0)
                    if fault and not fault.seconds and not fault.done and not fault.empty:
                        raise RefusedError(fault.code, fault.message) if fault.code else ConnectionError
                    answer: Any = {}
                    if health := re.fullmatch(r"/apis/(v\dbeta1)/healthz", url.path):
                        answer = server.health(health[1])
                    elif not fault or not fault.empty:
                        answer = server.answer(self.command, path, query, body)
                    if fault and fault.done:
                        raise RefusedError(fault.code, fault.message) if fault.code else ConnectionError
                except ConnectionError:
                    self.close_connection = True
                except RefusedError as error:
                    self._send(error.code, _error(path, error))
                except KeyError:
                    self._send(404, {"message": f"no endpoint {self.command} {url.path}"})
                else:
                    self._send(200, api.ApiClient().sanitize_for_serialization(answer))

            def _send(self, code: int, message: Any) -> None:
                content = json.dumps(message).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


def _error(path: str, error: RefusedError) -> dict[str, Any]:
    """As the gRPC gateway writes it; the endpoints that take files have a way of their own."""
    if "upload" in path:
        return {"error_message": str(error), "error_details": f"{error}: stack"}
    return {"error": str(error), "code": CODES.get(error.code, 2), "message": str(error), "details": []}


def _parse(body: Any, kind: str) -> Any:
    """The body as the API's own message type; a key that the type does not have is refused."""
    message = api.ApiClient().deserialize(SimpleNamespace(data=json.dumps(body)), kind)
    assert set(body) <= set(type(message).attribute_map.values()), f"{kind}: {sorted(body)}"
    return message

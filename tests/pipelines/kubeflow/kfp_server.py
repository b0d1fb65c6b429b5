"""A small KFP API server for contract tests: the v2beta1 endpoints that kfp.Client calls.

Every request body is parsed, and every answer built, by the message types of ``kfp_server_api``, which are
generated from the real server's API: a message that is not of the contract fails here as it would there.
"""

from __future__ import annotations

import email
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kfp_server_api as api
import yaml

PREFIX = "/apis/v2beta1"


class KfpServer:
    """Listens on a free port of 127.0.0.1; remembers what it was sent.

    ``states`` are what a run's polls see, the last one for ever; ``None`` cuts the connection instead.
    """

    def __init__(self) -> None:
        self.experiments: list[api.V2beta1Experiment] = []
        self.pipelines: list[api.V2beta1Pipeline] = []
        self.versions: list[api.V2beta1PipelineVersion] = []
        self.runs: list[api.V2beta1Run] = []
        self.states: list[api.V2beta1Run | None] = [api.V2beta1Run(state="SUCCEEDED")]
        self.refuse: tuple[int, str] | None = None
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> KfpServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        """The message that answers one request; raises KeyError where there is no such endpoint."""
        match = re.fullmatch(r"/pipelines/([^/]+)/versions", path)
        if match:
            found = [version for version in self.versions if version.pipeline_id == match[1]]
            return api.V2beta1ListPipelineVersionsResponse(pipeline_versions=_filtered(found, query) or None)
        if match := re.fullmatch(r"/runs/([^/]+)", path):
            (run,) = (run for run in self.runs if run.run_id == match[1])
            state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
            if state is None:
                raise ConnectionError
            return api.V2beta1Run(
                run_id=run.run_id, state=state.state, error=state.error, run_details=state.run_details
            )
        return {
            ("GET", "/healthz"): lambda: api.V2beta1GetHealthzResponse(multi_user=False),
            ("GET", "/experiments"): lambda: api.V2beta1ListExperimentsResponse(
                experiments=_filtered(self.experiments, query) or None
            ),
            ("POST", "/experiments"): lambda: self._add_experiment(_parse(body, "V2beta1Experiment")),
            ("GET", "/pipelines"): lambda: api.V2beta1ListPipelinesResponse(
                pipelines=_filtered(self.pipelines, query) or None
            ),
            ("POST", "/pipelines/upload"): lambda: self._add_pipeline(query, body),
            ("POST", "/pipelines/upload_version"): lambda: self._add_version(
                query["pipelineid"], query["name"], body
            ),
            ("POST", "/runs"): lambda: self._add_run(_parse(body, "V2beta1Run")),
        }[method, path]()

    def _add_experiment(self, experiment: api.V2beta1Experiment) -> api.V2beta1Experiment:
        experiment.experiment_id = f"experiment-{len(self.experiments)}"
        self.experiments.append(experiment)
        return experiment

    def _add_pipeline(self, query: dict[str, str], content: bytes) -> api.V2beta1Pipeline:
        pipeline = api.V2beta1Pipeline(
            pipeline_id=f"pipeline-{len(self.pipelines)}", display_name=query["name"]
        )
        self.pipelines.append(pipeline)
        self._add_version(pipeline.pipeline_id, query["name"], content)
        return pipeline

    def _add_version(self, pipeline_id: str, name: str, content: bytes) -> api.V2beta1PipelineVersion:
        spec, platform = yaml.safe_load_all(content)
        version = api.V2beta1PipelineVersion(
            pipeline_id=pipeline_id,
            pipeline_version_id=f"version-{len(self.versions)}",
            display_name=name,
            pipeline_spec={"pipeline_spec": spec, "platform_spec": platform},
        )
        self.versions.append(version)
        return version

    def _add_run(self, run: api.V2beta1Run) -> api.V2beta1Run:
        run.run_id = f"run-{len(self.runs)}"
        self.runs.append(run)
        return run

    def _handler(server: KfpServer) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - the handler has a self
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._do(None)

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                kind, body = self.headers["Content-Type"], self.rfile.read(length)
                if kind.startswith("multipart/form-data"):
                    form = email.message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + body)
                    (file,) = form.get_payload()
                    self._do(file.get_payload(decode=True))
                else:
                    self._do(json.loads(body))

            def _do(self, body: Any) -> None:
                url = urlsplit(self.path)
                query = {key: values[0] for key, values in parse_qs(url.query).items()}
                path = url.path.removeprefix(PREFIX)
                if server.refuse and path != "/healthz":
                    code, message = server.refuse
                    self._send(code, {"error": message, "code": 7, "message": message})
                    return
                try:
                    answer = server.answer(self.command, path, query, body)
                except ConnectionError:
                    self.close_connection = True
                    return
                except KeyError:
                    self._send(404, {"message": f"no endpoint {self.command} {url.path}"})
                    return
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


def _parse(body: Any, kind: str) -> Any:
    """The body as the API's own message type; a key that the type does not have is refused."""
    message = api.ApiClient().deserialize(SimpleNamespace(data=json.dumps(body)), kind)
    assert set(body) <= set(type(message).attribute_map.values()), f"{kind}: {sorted(body)}"
    return message


def _filtered(messages: list[Any], query: dict[str, str]) -> list[Any]:
    predicates = json.loads(query.get("filter", "{}")).get("predicates", [])
    for predicate in predicates:
        assert predicate["operation"] in ("EQUALS", 1), predicate
        key = {"name": "display_name"}.get(predicate["key"], predicate["key"])
        messages = [m for m in messages if getattr(m, key) == predicate["stringValue"]]
    return messages

"""A KFP server: where it is, who asks, what it can do, and what its refusals mean."""

from __future__ import annotations

import json
import logging
import os
import re
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kfp_server_api as api
from urllib3 import Retry, Timeout
from urllib3.exceptions import HTTPError, SSLError

from components.common.errors import RetortError
from pipelines.params import Kubeflow

log = logging.getLogger(__name__)

ANSWER_SECONDS = 20.0  # for a connection, and for the server's first answer
REQUEST_SECONDS = 60.0  # for each answer after that
PAGE = 100  # messages in one answer of a list; the server's limit is 200
# a request that changes nothing is asked again when the connection breaks, or the server is being restarted
AGAIN = Retry(
    connect=2, read=2, status=2, other=0, redirect=0, backoff_factor=0.2,
    status_forcelist=(502, 503, 504), allowed_methods=("GET",), raise_on_status=False,
)  # fmt: skip
TOKEN = "RETORT_KFP_TOKEN"  # noqa: S105 - the variable's name
# of kfp: where a pod finds a token that its service account presents to KFP
ACCOUNT_TOKEN = ("KF_PIPELINES_SA_TOKEN_PATH", "/var/run/secrets/kubeflow/pipelines/token")
LOCAL = ("localhost", "127.0.0.1", "::1")


class Server:
    """A KFP server that has answered: its services, by the client that is generated from its API.

    Attributes:
        host: its URL.
        namespace: where runs and pipelines belong; None on a server without users.
        multi_user: whether it knows users, and a namespace for each.
        version: of the server, such as (2, 17); None when it does not say.
    """

    def __init__(self, kubeflow: Kubeflow) -> None:
        """Connect to the server at ``kubeflow.host``.

        Raises:
            RetortError: when the host is empty or no URL, does not answer, or is no KFP server; when token
                or CA cannot be read.
        """
        self.host = _host(kubeflow)
        self._client = _client(kubeflow, self.host)
        self.experiments = api.ExperimentServiceApi(self._client)
        self.pipelines = api.PipelineServiceApi(self._client)
        self.uploads = api.PipelineUploadServiceApi(self._client)
        self.runs = api.RunServiceApi(self._client)
        self.schedules = api.RecurringRunServiceApi(self._client)
        health = self._health("v2beta1")
        tag = health.get("tag_name") or self._health("v1beta1", needed=False).get("tag_name", "")
        number = re.match(r"v?(\d+)\.(\d+)", str(tag))
        self.version = (int(number[1]), int(number[2])) if number else None
        self.multi_user = bool(health.get("multi_user"))
        self.namespace = kubeflow.namespace or None if self.multi_user else None

    def link(self, run_id: str) -> str:
        """The run's page in the UI, which is at the host, or where ``KF_PIPELINES_UI_ENDPOINT`` says."""
        page = os.environ.get("KF_PIPELINES_UI_ENDPOINT", self.host).rstrip("/")
        return f"{page}/#/runs/details/{run_id}" + (f"?ns={self.namespace}" if self.namespace else "")

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Requests inside the block; what goes wrong is an error of a line or two that says the way out.

        Raises:
            RetortError: when the server refuses, or does not answer.
        """
        try:
            yield
        except (api.ApiException, HTTPError) as error:
            advice = f"\n{way}" if (way := self._way_out(error)) else ""
            raise RetortError(f"kubeflow.host {self.host}: {refusal(error)}{advice}") from None

    def named(self, call: Callable[..., Any], field: str, name: str, **where: Any) -> Iterator[Any]:
        """All messages with the display name ``name``, page by page.

        Args:
            call: a list of one of the services.
            field: the messages' field in its answer.
            where: more arguments, such as the namespace.
        """
        equals = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
        for message in self.listed(call, field, filter=json.dumps({"predicates": [equals]}), **where):
            if message.display_name == name:
                yield message

    def listed(self, call: Callable[..., Any], field: str, **where: Any) -> Iterator[Any]:
        """All messages of a list, page by page."""
        given = {key: value for key, value in where.items() if value is not None}
        token = ""
        while True:
            answer = call(page_size=PAGE, page_token=token, **given)
            yield from getattr(answer, field) or []
            token = answer.next_page_token or ""
            if not token:
                return

    def _health(self, version: str, *, needed: bool = True) -> dict[str, Any]:
        """What the server says of itself. Its answer holds more than its own client's message type does.

        Older servers say their version at v1beta1 only, newer ones at v2beta1, too.
        """
        url = f"{self.host}/apis/{version}/healthz"
        headers: dict[str, str] = {}
        self._client.update_params_for_auth(headers, [], ["Bearer"])
        pool = self._client.rest_client.pool_manager
        try:
            answer = pool.request("GET", url, headers=headers, timeout=Timeout(ANSWER_SECONDS), retries=False)
        except HTTPError as error:
            if not needed:
                return {}
            raise RetortError(
                f"kubeflow.host {self.host}: no KFP server answers there ({_cause(error)}); "
                + (_certificate(error) or "is it running, and forwarded?")
            ) from None
        try:
            said = json.loads(answer.data)
        except ValueError:
            said = None
        if answer.status == 200 and isinstance(said, dict):
            return said
        if not needed:
            return {}
        if answer.status == 200 or 300 <= answer.status < 400:
            raise RetortError(
                f"kubeflow.host {self.host}: {url} answered with a page, not as KFP does; to log in?\n"
                f"Give a token (kubeflow.token_file, or {TOKEN}); on a multi-user Kubeflow the API lies at "
                "https://HOST/pipeline"
            )
        refused = api.ApiException(status=answer.status, reason=answer.reason)
        refused.body = answer.data
        way = self._way_out(refused)
        raise RetortError(
            f"kubeflow.host {self.host}: {url} answered {refusal(refused)}" + (way and f"\n{way}")
        )

    def _way_out(self, error: Exception) -> str:
        status = getattr(error, "status", None)
        if status == 401:
            return f"The token is missing, wrong or expired: give another in kubeflow.token_file or {TOKEN}."
        if status == 403:
            namespace = getattr(self, "namespace", None)
            where = f"kubeflow.namespace '{namespace}'" if namespace else "this server"
            return f"Whoever the token stands for has no right to this in {where}: ask its owner for it."
        if status == 404:
            return (
                "Is kubeflow.host the URL of KFP's API? On a multi-user Kubeflow it is https://HOST/pipeline."
            )
        return _certificate(error)


def ensure(find: Callable[[], Any], make: Callable[[], Any]) -> Any:
    """What ``find`` finds, else what ``make`` makes: once, though another asks too, or the answer is lost.

    A server refuses a second one of a name with 409. When a connection breaks, nobody knows whether the
    request was carried out: what is found then was made by it.
    """
    found = find()
    if found is not None:
        return found
    try:
        return make()
    except (api.ApiException, HTTPError) as error:
        if getattr(error, "status", 409) not in (409, 502, 504):
            raise
        found = find()
        if found is None:
            raise
        return found


def refusal(error: Exception) -> str:
    """The server's own words of a refused request, or why there are none, on one line."""
    body = getattr(error, "body", None)
    try:
        told = json.loads(body) if body else {}
        text = told.get("message") or told.get("error_message") or told.get("error") or ""
    except (ValueError, AttributeError):
        text = ""
    status = f"{getattr(error, 'status', None) or ''} {getattr(error, 'reason', '')}".strip()
    if not isinstance(error, api.ApiException):
        status = _cause(error)
    return " ".join(f"{status} {text}".split())[:600] or type(error).__name__


def _cause(error: Exception) -> str:
    """What broke, without urllib3's account of its connections and attempts."""
    cause = getattr(error, "reason", None) or error
    return str(cause).rsplit("Failed to establish a new connection: ", 1)[-1]


def _certificate(error: Exception) -> str:
    if isinstance(getattr(error, "reason", error), SSLError) or "CERTIFICATE" in _cause(error):
        return "its certificate must be signed by one that is trusted here: give the CA in kubeflow.ca_file"
    return ""


def _host(kubeflow: Kubeflow) -> str:
    host = (kubeflow.host or os.environ.get("KF_PIPELINES_ENDPOINT", "")).rstrip("/")
    if not host:
        raise RetortError(
            "kubeflow.host is empty: give the URL of the KFP server's API, such as "
            "-o kubeflow.host=http://localhost:8888; 'retort submit --local' needs no server"
        )
    if not host.startswith(("http://", "https://")):
        raise RetortError(f"kubeflow.host '{host}': expected a URL, such as http://localhost:8888")
    return host


def _client(kubeflow: Kubeflow, host: str) -> Any:
    """The generated client, with token, CA and proxy; no request of it waits for ever."""
    configuration = api.Configuration(host=host)
    configuration.retries = AGAIN
    configuration.logger["urllib3_logger"].setLevel(logging.ERROR)  # of attempts that are made again
    if kubeflow.ca_file:
        if not Path(kubeflow.ca_file).is_file():
            raise RetortError(f"kubeflow.ca_file {kubeflow.ca_file}: no such file; give the CA's, as PEM")
        configuration.ssl_ca_cert = kubeflow.ca_file
    address = urlsplit(host)
    if not urllib.request.proxy_bypass(address.hostname or ""):
        configuration.proxy = urllib.request.getproxies().get(address.scheme)
    if _token(kubeflow):
        # read again before each request: a service account's token is renewed while a run is followed
        def renew(configuration: Any) -> None:
            configuration.api_key["authorization"] = _token(kubeflow)

        configuration.api_key["authorization"] = "read below"
        configuration.api_key_prefix["authorization"] = "Bearer"
        configuration.refresh_api_key_hook = renew
        if address.scheme == "http" and address.hostname not in LOCAL:
            log.warning(
                f"kubeflow.host {host}: the token goes there unencrypted; is there an https:// address?"
            )
    client = api.ApiClient(configuration)
    request = client.rest_client.request

    def bounded(*args: Any, **kwargs: Any) -> Any:
        return request(*args, **{**kwargs, "_request_timeout": (ANSWER_SECONDS, REQUEST_SECONDS)})

    client.rest_client.request = bounded
    return client


def _token(kubeflow: Kubeflow) -> str:
    """The bearer token: a file's, a variable's, or the one that a pod has for KFP; '' when there is none.

    Raises:
        RetortError: when the file cannot be read or is empty.
    """
    variable, usual = ACCOUNT_TOKEN
    key, file = "kubeflow.token_file", kubeflow.token_file or ""
    if not file:
        if token := os.environ.get(TOKEN, "").strip():
            return token
        key, file = variable, os.environ.get(variable, "")
        if not file and Path(usual).is_file():
            file = usual
    if not file:
        return ""
    try:
        token = Path(file).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RetortError(f"{key} {file}: cannot be read ({getattr(error, 'strerror', error)})") from None
    if not token or "\n" in token:
        raise RetortError(f"{key} {file}: expected one line, the token")
    return token

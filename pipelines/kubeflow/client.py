"""A KFP server: where it is, whether it answers, and what its refusals say."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
import warnings
from typing import TYPE_CHECKING, Any

from components.common.errors import RetortError
from pipelines.params import Params

if TYPE_CHECKING:
    import kfp

ANSWER_SECONDS = 20.0  # for the server's first answer
REQUEST_SECONDS = 60  # for each answer after that


def find_host(params: Params) -> str:
    """The server's URL, after it answered there.

    Raises:
        RetortError: when there is none, when it does not answer, or when a pod could not reach the tracker.
    """
    host = params.kubeflow.host.rstrip("/")
    if not host:
        raise RetortError(
            "kubeflow.host is empty: give the URL of the KFP server's API, such as "
            "-o kubeflow.host=http://localhost:8888; 'retort submit --local' needs no server"
        )
    if not host.startswith(("http://", "https://")):
        raise RetortError(f"kubeflow.host '{host}': expected a URL, such as http://localhost:8888")
    if params.registry.tracking_uri.startswith("sqlite:"):
        raise RetortError(
            f"registry.tracking_uri '{params.registry.tracking_uri}' is a file, lost with each pod; "
            "give an MLflow server's URL (infra/k8s brings one)"
        )
    url = f"{host}/apis/v2beta1/healthz"
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:  # noqa: S310 - http or https
            json.load(answer)
    except urllib.error.HTTPError as error:
        raise RetortError(f"kubeflow.host {host}: {url} answered {error.code} {error.reason}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise RetortError(
            f"kubeflow.host {host}: no KFP server answers there ({reason}); is it running, and forwarded?"
        ) from None
    return host


def connect(host: str) -> kfp.Client:
    """A client whose requests end: the generated one waits for ever unless each call says how long."""
    import kfp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        client = kfp.Client(host=host)
    rest = client._run_api.api_client.rest_client
    request = rest.request

    def bounded(*args: Any, **kwargs: Any) -> Any:
        return request(*args, **{**kwargs, "_request_timeout": REQUEST_SECONDS})

    rest.request = bounded
    return client


def refusal(error: Exception) -> str:
    """The server's own words of a refused request, on one line."""
    body = getattr(error, "body", None)
    try:
        text = json.loads(body)["message"] if body else ""
    except (ValueError, KeyError, TypeError):
        text = ""
    status = f"{getattr(error, 'status', '')} {getattr(error, 'reason', '')}".strip()
    return " ".join(f"{status} {text}".split()) or str(error)

"""What the pipeline's pod asks of Kubernetes: RayJobs, and the pods, logs and events that belong to them.

Every question is asked again while the API is away, for some minutes: a control plane that is renewed must
cost no training. ``VERBS`` is all that a Role has to grant; a test holds the calls to it.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from components.common.errors import RetortError

log = logging.getLogger(__name__)

T = TypeVar("T")
GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
VERBS = {
    "rayjobs": ("get", "list", "watch", "create", "patch", "delete"),
    "pods": ("get", "list"),
    "pods/log": ("get",),
    "events": ("list",),
}
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
AWAY_SECONDS = 900.0  # without an answer, until the step ends (the job ends itself then)
PAUSES = (0.5, 1.0, 2.0, 5.0, 10.0)  # seconds between tries; the last one again and again
TIMEOUT = (5.0, 30.0)  # seconds: to connect, and for each answer
WATCH_SECONDS = 20  # of one watch, after which the object is read anew
AWAY = (408, 429, 500, 502, 503, 504)
EXPIRED = 60.0  # seconds for which a refused token is tried again: a new one is read from its file


class ApiError(RetortError):
    """Kubernetes refused; ``code`` is its status."""

    code = 0


class Api:
    """Kubernetes' API in one namespace. ``client``: an ``ApiClient`` of the package kubernetes."""

    def __init__(self, client: Any, namespace: str, account: str = "") -> None:
        from kubernetes import client as kubernetes

        self.namespace, self.account = namespace, account
        self._custom = kubernetes.CustomObjectsApi(client)
        self._core = kubernetes.CoreV1Api(client)

    @classmethod
    def here(cls) -> Api:
        """As the account of the pod that this process runs in.

        Raises:
            RetortError: when it runs in none.
        """
        from kubernetes import client, config
        from kubernetes.config import ConfigException

        try:
            config.load_incluster_config()
            namespace = (ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
        except (ConfigException, OSError):
            raise RetortError(
                "ray.address: kuberay: this process runs in no pod of Kubernetes, whose account could make a "
                "RayJob; 'retort submit' runs the pipeline there, ray.address: '' trains on this machine"
            ) from None
        return cls(client.ApiClient(), namespace)

    # --- RayJobs ---

    def job(self, name: str) -> dict[str, Any] | None:
        """A RayJob, or None."""
        return self._ask(
            f"read rayjobs/{name}",
            lambda: self._custom.get_namespaced_custom_object(*self._place(), name, _request_timeout=TIMEOUT),
            missing=True,
        )

    def jobs(self, selector: str) -> list[dict[str, Any]]:
        """The RayJobs with these labels."""
        found = self._ask(
            "list rayjobs",
            lambda: self._custom.list_namespaced_custom_object(
                *self._place(), label_selector=selector, _request_timeout=TIMEOUT
            ),
        )
        return list(found["items"])

    def create(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        """Make a RayJob; None when there is one of its name already."""
        try:
            return self._ask(
                "create rayjobs",
                lambda: self._custom.create_namespaced_custom_object(
                    *self._place(), job, _request_timeout=TIMEOUT
                ),
            )
        except ApiError as error:
            if error.code == 409:
                return None
            raise

    def patch(self, name: str, change: Mapping[str, Any]) -> dict[str, Any] | None:
        """Merge into a RayJob; None when it is gone, or has changed since the version that is named."""
        try:
            return self._ask(
                f"patch rayjobs/{name}",
                lambda: self._custom.patch_namespaced_custom_object(
                    *self._place(), name, change, _request_timeout=TIMEOUT
                ),
                missing=True,
            )
        except ApiError as error:
            if error.code == 409:
                return None
            raise

    def delete(self, name: str, uid: str) -> None:
        """Remove exactly this RayJob, and what belongs to it; nothing happens when it is gone."""
        from kubernetes import client as kubernetes

        body = kubernetes.V1DeleteOptions(
            propagation_policy="Background", preconditions=kubernetes.V1Preconditions(uid=uid)
        )
        try:
            self._ask(
                f"delete rayjobs/{name}",
                lambda: self._custom.delete_namespaced_custom_object(
                    *self._place(), name, body=body, _request_timeout=TIMEOUT
                ),
                missing=True,
            )
        except ApiError as error:
            if error.code != 409:  # another one of the same name by now
                raise

    def changes(self, job: Mapping[str, Any], seconds: float = WATCH_SECONDS) -> Iterator[dict[str, Any]]:
        """What becomes of a RayJob from this version on, for some seconds; it ends early when a watch does.

        A watch may drop, fall behind or hear nothing: whoever waits reads the object again afterwards.
        """
        from kubernetes.watch import Watch

        watch = Watch()
        try:
            for event in watch.stream(
                self._custom.list_namespaced_custom_object,
                *self._place(),
                field_selector=f"metadata.name={job['metadata']['name']}",
                resource_version=job["metadata"]["resourceVersion"],
                allow_watch_bookmarks=True,
                timeout_seconds=max(1, round(seconds)),
                _request_timeout=(TIMEOUT[0], seconds + TIMEOUT[0]),
            ):
                if event["type"] in ("ADDED", "MODIFIED"):
                    yield event["raw_object"]
                elif event["type"] == "DELETED":
                    return
        except Exception as error:
            if _status(error) is None and not _dropped(error):
                raise
            log.debug(f"the watch ended: {error}")

    # --- what belongs to them ---

    def pod(self, name: str) -> dict[str, Any] | None:
        """A pod, or None."""
        return self._ask(
            f"read pods/{name}",
            lambda: self._json(
                self._core.read_namespaced_pod(
                    name, self.namespace, _preload_content=False, _request_timeout=TIMEOUT
                )
            ),
            missing=True,
        )

    def pods(self, selector: str) -> list[dict[str, Any]]:
        """The pods with these labels, the oldest first."""
        found = self._ask(
            "list pods",
            lambda: self._json(
                self._core.list_namespaced_pod(
                    self.namespace, label_selector=selector, _preload_content=False, _request_timeout=TIMEOUT
                )
            ),
        )
        return sorted(found["items"], key=lambda pod: pod["metadata"].get("creationTimestamp") or "")

    def warnings(self, name: str) -> list[str]:
        """What Kubernetes complains of about objects of this name, the latest last."""
        selector = f"involvedObject.name={name},type=Warning"
        found = self._ask(
            "list events",
            lambda: self._json(
                self._core.list_namespaced_event(
                    self.namespace, field_selector=selector, _preload_content=False, _request_timeout=TIMEOUT
                )
            ),
        )
        items = sorted(found["items"], key=lambda one: one.get("lastTimestamp") or one.get("eventTime") or "")
        return [str(one.get("message", "")) for one in items]

    def log(self, pod: str, since: float | None) -> Any:
        """A pod's log as it grows, each line with its time: a response of urllib3, to be closed.

        Args:
            since: of how many seconds; None: all of it.
        """
        more: dict[str, Any] = {} if since is None else {"since_seconds": max(1, round(since))}
        return self._core.read_namespaced_pod_log(
            pod, self.namespace, follow=True, timestamps=True, _preload_content=False,
            _request_timeout=(TIMEOUT[0], 60.0), **more,
        )  # fmt: skip

    # --- how it is asked ---

    def _place(self) -> tuple[str, str, str, str]:
        return GROUP, VERSION, self.namespace, PLURAL

    @staticmethod
    def _json(response: Any) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(response.data)
        return found

    def _ask(self, what: str, question: Callable[[], Any], missing: bool = False) -> Any:
        """The answer. ``missing``: whether an object that is not there is None, and no error.

        Raises:
            ApiError: in one line, when Kubernetes refuses, or is away too long.
        """
        began = time.monotonic()
        said = False
        for number in range(1 << 30):
            try:
                return question()
            except Exception as error:
                status = _status(error)
                if status is None and not _dropped(error):
                    raise
                away = time.monotonic() - began
                again = status is None or status in AWAY or (status == 401 and away < EXPIRED)
                if (
                    status == 404
                    and missing
                    and "not found" in _message(error)
                    and "page" not in _message(error)
                ):
                    return None
                if not again or away > AWAY_SECONDS:
                    raise self._refusal(what, status, _message(error), away) from None
                if not said:
                    log.warning(f"Kubernetes' API does not answer ({_message(error)}); asking again")
                    said = True
            time.sleep(PAUSES[min(number, len(PAUSES) - 1)])
        raise AssertionError("not reached")

    def _refusal(self, what: str, status: int | None, message: str, away: float) -> ApiError:
        where = f"namespace {self.namespace}"
        if status == 404:
            said = (
                f"Kubernetes knows no RayJobs ({message}): install the KubeRay operator, 1.6 or later, with "
                "its CRDs"
            )
        elif status == 403 and "quota" in message:
            said = f"{where}: the quota has no room for another RayJob ({message})"
        elif status == 403:
            said = (
                f"this pod's account may not {what} in {where} ({message}); infra/k8s/base/ray-rights.yaml "
                "grants it"
            )
        elif status == 401:
            said = f"Kubernetes refuses the account's token ({message}); a pod with a new one may get through"
        elif status is None or status in AWAY:
            said = f"Kubernetes' API did not answer for {away / 60:.0f} minutes ({message}); try again later"
        else:
            said = f"Kubernetes refused to {what} in {where} ({status}: {message})"
        error = ApiError(f"ray.address: kuberay: {said}")
        error.code = status or 0
        return error


def own_name() -> str:
    """The name of the pod that this process runs in."""
    return os.environ.get("KFP_POD_NAME") or os.environ.get("HOSTNAME") or os.uname().nodename


def _status(error: BaseException) -> int | None:
    """The status that Kubernetes answered with; None when the error is none of its."""
    from kubernetes.client import ApiException

    return int(error.status) if isinstance(error, ApiException) and error.status else None


def _dropped(error: BaseException) -> bool:
    """Whether a connection did not come about, or broke off."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    return isinstance(error, (HTTPError, ConnectionError, TimeoutError)) or (
        isinstance(error, ApiException) and not error.status
    )


def _message(error: BaseException) -> str:
    """Kubernetes' own words, on one line."""
    body = getattr(error, "body", None)
    text = body.decode(errors="replace") if isinstance(body, bytes) else body or ""
    try:
        text = json.loads(text)["message"]
    except (ValueError, KeyError, TypeError):
        text = text or getattr(error, "reason", None) or str(error)
    return " ".join(str(text).split())

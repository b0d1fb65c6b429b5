"""MLflow's client, and a server that may not answer."""

from __future__ import annotations

import functools
import logging
import os
import re
import socket
import threading
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from components.common.environment import environment
from components.common.errors import RetortError
from components.common.params import Registry
from components.common.storage import remove
from components.tracking import view

if TYPE_CHECKING:
    from mlflow import MlflowClient

PREFLIGHT_SECONDS = 2.0  # a step waits for a connection no longer than this
THIS_PROCESS = uuid.uuid4().hex
NOT_THE_CAUSE = "(raised as a result of"  # how SQLAlchemy begins what a database says while it flushes


class StuckError(RetortError):
    """The tracker holds a request beyond the time that a step has for it."""


def tracking_uri(registry: Registry) -> str:
    """MLflow's URI, a SQLite file's path made absolute.

    Where KFP itself opened an MLflow run (``MLFLOW_RUN_ID``), that run's server is the tracker.
    """
    uri = registry.tracking_uri
    if os.environ.get("MLFLOW_RUN_ID"):
        uri = os.environ.get("MLFLOW_TRACKING_URI") or uri
    prefix = "sqlite:///"
    return f"{prefix}{Path(uri.removeprefix(prefix)).absolute()}" if uri.startswith(prefix) else uri


def client_settings(request_seconds: int, retries: int) -> AbstractContextManager[None]:
    """How long MLflow's client waits for one answer, and how often it tries, inside the block."""
    return environment(
        {
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(request_seconds),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        }
    )


@functools.cache
def connect(uri: str) -> MlflowClient:
    """MLflow's client for ``uri``: no banners, no progress bars, no usage statistics sent to anybody.

    A SQLite file that is not there is made: one process at a time, since that runs MLflow's migrations.
    """
    for name, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_LOGGING_LEVEL", "WARNING"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
        ("GIT_PYTHON_REFRESH", "quiet"),
    ):
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # it logs the traceback of what it raises; whoever catches that says it in a line
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    if not uri.startswith("sqlite:///"):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    from filelock import FileLock

    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    making = database.with_name(f"{database.name}.making-{THIS_PROCESS}")
    with FileLock(database.with_name(f"{database.name}.lock")):
        for other in set(database.parent.glob(f"{database.name}.making-*")) - {making}:
            # its process ended, or its disk was full, in the midst of the migrations: they cannot be resumed
            remove(database)
            remove(other)
        if not database.exists():
            making.touch()
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)  # opens the file
        remove(making)
        return client


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """The experiment ``name``, made if missing; beside a SQLite file stands the folder of its artifacts."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        location = None
        if uri.startswith("sqlite:///"):
            location = Path(uri.removeprefix("sqlite:///")).with_name("artifacts").as_uri()
        try:
            # the kind opens MLflow's pages on runs and metrics, not on conversations and prompts
            kind = {"mlflow.experimentKind": "custom_model_development", view.TAG: view.shared_view()}
            return client.create_experiment(name, location, tags=kind)
        except MlflowException:  # another process was quicker
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


def bounded(uri: str, seconds: float, work: Callable[[], None]) -> None:
    """Do ``work``, and wait no longer than ``seconds`` for a server (a file is waited for)."""
    if uri.startswith("sqlite:"):
        work()
        return
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again, by the thread that waits
            raised.append(error)

    thread = threading.Thread(target=run, name="tracking", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise StuckError(f"no answer within {seconds:.0f} s")
    if raised:
        raise raised[0]


def reach(uri: str) -> None:
    """Raise within seconds when nothing listens at ``uri`` (or at the proxy on the way to it)."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))

    def knock() -> None:
        socket.create_connection(address, timeout=PREFLIGHT_SECONDS).close()

    bounded(uri, PREFLIGHT_SECONDS, knock)  # the look-up of a name knows no timeout of its own


def public_uri(uri: str) -> str:
    """``uri`` without user and password."""
    return re.sub(r"//[^/@]*@", "//", uri)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, short, without passwords."""
    lines = [line for line in str(error).strip().splitlines() if not line.startswith(NOT_THE_CAUSE)]
    lines = lines or [type(error).__name__]
    return re.sub(r"//[^/@\s]*@", "//", lines[0])[:160]

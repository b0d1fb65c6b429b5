"""``retort ui``: MLflow's pages on the runs of this folder."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from pathlib import Path
from urllib.parse import quote

from components.common.errors import RetortError
from components.common.params import Registry
from components.common.storage import state_dir
from components.tracking import view
from components.tracking.client import client_settings, connect, first_line, public_uri, reach, tracking_uri

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
PORTS = 100  # that are tried, one after the other
START_SECONDS = 180.0  # MLflow imports much; on a busy machine that takes a minute
END_SECONDS = 10.0
PAGES_SECONDS = 10  # for one answer of a server about what it has
SQLITE = "sqlite:///"
SETTINGS = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def ui(registry: Registry, port: int, browser: bool) -> None:
    """Serve ``registry.tracking_uri`` on this machine until Ctrl-C; of a server, say the URL.

    Args:
        port: the first that is tried.
        browser: open the pages too.

    Raises:
        RetortError: when there are no runs yet, no port is free, or MLflow does not start.
    """
    uri = tracking_uri(registry)
    if not uri.startswith(SQLITE):
        _show(public_uri(uri), uri, registry.name, browser)
        return
    if not Path(uri.removeprefix(SQLITE)).exists():
        raise RetortError(
            f"{uri.removeprefix(SQLITE)}: no such file, so there are no runs to show yet; run a step first"
        )
    free = _free_port(port)
    said = state_dir() / "ui.log"
    if free != port:
        log.warning(f"port {port} is taken")
    log.info("MLflow starts; that may take some seconds")
    with said.open("w", encoding="utf-8") as out:
        server = subprocess.Popen(
            [
                sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri,
                "--host", HOST, "--port", str(free), "--workers", "1",
            ],
            env={**os.environ, **SETTINGS}, stdout=out, stderr=out, stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C comes here, and all of its processes are ended together
        )  # fmt: skip
    try:
        _await(server, free, said)
        url = f"http://{HOST}:{free}"
        _show(url, url, registry.name, browser, " (Ctrl-C ends it)")
        server.wait()
        raise RetortError(f"MLflow ended with status {server.returncode}; see {said}")
    except KeyboardInterrupt:
        log.info("ended")
    finally:
        _end(server)


def _show(url: str, uri: str, name: str, browser: bool, how: str = "") -> None:
    """Print the address, and the pages of the project's runs and of its model; open the first of them.

    Args:
        url: what a person types; without user and password.
        uri: with them.
    """
    print(f"MLflow: {url}{how}", flush=True)
    pages = _pages(uri, name)
    for what, page in pages.items():
        print(f"  {what}: {url.rstrip('/')}/#/{page}", flush=True)
    first = next(iter(pages.values()), "")
    if browser and not webbrowser.open(f"{url.rstrip('/')}/#/{first}" if first else url):
        log.warning("no browser was found; open the address by hand")


def _pages(uri: str, name: str) -> dict[str, str]:
    """The pages that show something of this project; none of a server that does not say."""
    try:
        reach(uri)
        with client_settings(PAGES_SECONDS, retries=0):
            client = connect(uri)
            experiment = client.get_experiment_by_name(name)
            found = {}
            if experiment is not None:
                shared = f"&viewStateShareKey={view.KEY}" if view.TAG in experiment.tags else ""
                found["runs"] = f"experiments/{experiment.experiment_id}/runs?{view.QUERY}{shared}"
            if client.search_registered_models(f"name = '{name}'"):
                found["model"] = f"models/{quote(name)}?{view.QUERY}"
            return found
    except Exception as error:  # noqa: BLE001 - the address is of use all the same
        log.info(f"{public_uri(uri)}: {first_line(error)}")
        return {}


def _free_port(first: int) -> int:
    for port in range(first, min(first + PORTS, 65536)):
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
            try:
                taken.bind((HOST, port))
            except OSError:
                continue
            return port
    raise RetortError(f"--port {first}: this port and the {PORTS - 1} after it are taken; name another")


def _await(server: subprocess.Popen[bytes], port: int, said: Path) -> None:
    """Return when the server answers."""
    started = time.monotonic()
    while server.poll() is None and time.monotonic() - started < START_SECONDS:
        try:
            socket.create_connection((HOST, port), timeout=1).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise RetortError(f"MLflow did not start: {lines[-1][:160] if lines else 'no word from it'}; see {said}")


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server and its workers: they are a process group of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:  # all of them ended
            break
        try:
            server.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    server.wait()

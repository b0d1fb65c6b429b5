"""``registry.notify``: a URL or a command that is told of each promotion, and can hinder none."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from components.common.params import Registry
from components.tracking.client import bounded, first_line
from components.tracking.run_identity import in_kubeflow

log = logging.getLogger(__name__)

SECONDS = 10.0  # for all of it
TOLD = ("number", "version", "replaced", "at", "how", "who", "why")


def notify(registry: Registry, record: Mapping[str, Any]) -> str:
    """Tell ``registry.notify`` of a promotion; returns why that failed, in a line without secrets, or "".

    A URL gets a POST; a command, which no shell sees, gets the same JSON on its standard input. ``text`` is
    what a chat's incoming webhook shows.

    Args:
        record: as ``Versions.set_champion`` returned it.
    """
    if not registry.notify.strip():
        return ""
    content = json.dumps(_message(registry.name, record)).encode()
    if is_url(registry.notify):
        return _post(registry.notify, content)
    if in_kubeflow():
        return "registry.notify: a command is not run in a pod of Kubeflow; give a URL"
    return _run(shlex.split(registry.notify), content)


def is_url(value: str) -> bool:
    """Whether it is one that can be posted to; else it is a command."""
    return value.startswith(("http://", "https://"))


def _message(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    replaced = f", in place of {record['replaced']}" if record.get("replaced") else ""
    why = f": {record['why']}" if record.get("why") else ""
    by = f"{record['how']} by {record.get('who')}"
    text = f"{name}: version {record['version']} is champion{replaced} ({by}){why}"
    told = {key: record.get(key) for key in TOLD}
    return {
        "event": "promotion",
        "name": name,
        **told,
        "model_uri": f"models:/{name}/{record['version']}",
        "text": text,
    }


def _post(address: str, content: bytes) -> str:
    """``address`` may name variables of the environment, as its path is often a secret."""
    url = os.path.expandvars(address)
    request = urllib.request.Request(  # noqa: S310 - http or https: see is_url
        url, content, {"Content-Type": "application/json", "User-Agent": "retort"}
    )

    def send() -> None:
        urllib.request.urlopen(request, timeout=SECONDS).close()  # noqa: S310 - http or https: see is_url

    try:
        bounded(url, SECONDS, send)
    except Exception as error:  # noqa: BLE001 - whatever a foreign server makes of it, the promotion stands
        said = first_line(error).replace(url, "the URL")
        return f"registry.notify: {urlsplit(url).hostname} was not told ({said})"
    return ""


def _run(command: list[str], content: bytes) -> str:
    try:
        done = subprocess.run(command, input=content, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"registry.notify: '{command[0]}' took over {SECONDS:.0f} s, and was ended"
    except OSError as error:
        return f"registry.notify: '{command[0]}' cannot be run ({error.strerror or error})"
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        return f"registry.notify: '{command[0]}' ended with status {done.returncode} ({said[0][:160]})"
    return ""

"""Who promotes: a person, a run of Kubeflow, a pod's account."""

from __future__ import annotations

import base64
import json
import os
import socket
from pathlib import Path

from components.tracking.run_identity import in_kubeflow, user

TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


def actor() -> str:
    """Whoever this process acts for, as the record of promotions names it.

    ``Kubeflow run <id>``, or user and host; with the service account of a pod, and the name that the tracker
    knows, where there are such.
    """
    if in_kubeflow() and os.environ.get("RETORT_RUN"):
        name = f"Kubeflow run {os.environ['RETORT_RUN']}"
    else:
        name = f"{user()}@{socket.gethostname()}"
    login = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    also = [account(), f"login {login}" if login else ""]
    more = ", ".join(part for part in also if part)
    return f"{name} ({more})" if more else name


def account() -> str:
    """The service account of this pod, ``system:serviceaccount:<namespace>:<name>``; empty outside a pod.

    What its token says of itself: nobody checks it here, the record is no proof of it.
    """
    try:
        middle = TOKEN.read_text(encoding="ascii").split(".")[1]
        said = json.loads(base64.urlsafe_b64decode(middle + "=" * (-len(middle) % 4)))
        return str(said["sub"])
    except (OSError, ValueError, LookupError, TypeError):  # no pod, or a token of another kind
        return ""

"""The manifests as ``kubectl apply -k`` would send them, and the secrets that are made for them."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

K8S = Path(__file__).resolve().parents[2] / "infra" / "k8s"
OVERLAYS = ("local", "production")
WORKLOADS = ("Deployment", "StatefulSet", "Job")
BYTES = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@functools.cache
def rendered(overlay: str) -> list[dict[str, Any]]:
    """Skips the test where ``kubectl`` is not installed."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed here; it renders the manifests")
    command = ["kubectl", "kustomize", str(K8S / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@functools.cache
def secrets() -> dict[str, dict[str, str]]:
    """What ``infra/k8s/secrets.sh`` prints: name of a secret -> its keys and values."""
    done = subprocess.run([K8S / "secrets.sh"], capture_output=True, text=True, check=True)
    return {made["metadata"]["name"]: made["stringData"] for made in yaml.safe_load_all(done.stdout)}


def of_kind(manifests: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def workloads(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [manifest for manifest in manifests if manifest["kind"] in WORKLOADS]


def pods(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [manifest["spec"]["template"]["spec"] for manifest in workloads(manifests)]


def of_pod(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def containers(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [container for pod in pods(manifests) for container in of_pod(pod)]


def container(manifests: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (found,) = (container for container in containers(manifests) if container["name"] == name)
    return found


def environment(container: dict[str, Any], given: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The variables that the kubelet would set, with secrets' values from ``given``."""
    values = {}
    for variable in container.get("env", []):
        if "value" in variable:
            values[variable["name"]] = str(variable["value"])
        else:
            reference = variable["valueFrom"]["secretKeyRef"]
            values[variable["name"]] = given[reference["name"]][reference["key"]]
    return values


def command(container: dict[str, Any], variables: Mapping[str, str]) -> list[str]:
    """Command and arguments, with ``$(NAME)`` filled in as the kubelet does."""
    words = [*container.get("command", []), *container.get("args", [])]
    return [re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], word) for word in words]


def references(manifests: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """(secret, key) of everything that a container reads from a secret."""
    for pod in pods(manifests):
        for container in of_pod(pod):
            for variable in container.get("env", []):
                if "valueFrom" in variable:
                    reference = variable["valueFrom"]["secretKeyRef"]
                    yield reference["name"], reference["key"]
        for volume in pod.get("volumes", []):
            for item in volume.get("secret", {}).get("items", []):
                yield volume["secret"]["secretName"], item["key"]


def in_bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(\w*)", quantity).groups()  # type: ignore[union-attr]
    return int(Decimal(number) * BYTES[unit])

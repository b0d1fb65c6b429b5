"""The manifests: valid by Kubernetes' own schemas, and as careful as they claim to be."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

OVERLAYS = Path(__file__).resolve().parents[2] / "infra" / "k8s" / "overlays"
VERSION = "1.32"  # of Kubernetes


@pytest.fixture(scope="module", params=["standalone", "profile"])
def manifests(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What ``kubectl apply -k`` would send."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed here; it renders the manifests")
    command = ["kubectl", "kustomize", str(OVERLAYS / request.param)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def pods(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [m["spec"]["template"]["spec"] for m in manifests if m["kind"] in ("Deployment", "StatefulSet")]


def containers(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [c for pod in pods(manifests) for c in [*pod.get("initContainers", []), *pod["containers"]]]


def of_kind(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def test_every_manifest_fits_its_schema(manifests: list[dict[str, Any]]) -> None:
    for manifest in manifests:
        kubernetes_validate.validate(manifest, VERSION, strict=True)


def test_everything_is_in_one_namespace(manifests: list[dict[str, Any]]) -> None:
    assert len({manifest["metadata"]["namespace"] for manifest in manifests}) == 1


def test_requests_equal_limits(manifests: list[dict[str, Any]]) -> None:
    for container in containers(manifests):
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        assert set(resources["limits"]) == {"cpu", "memory"}


def test_no_container_is_root_or_may_become_it(manifests: list[dict[str, Any]]) -> None:
    for pod in pods(manifests):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] > 0
        assert not pod["automountServiceAccountToken"]
    for container in containers(manifests):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]


def test_every_server_is_probed(manifests: list[dict[str, Any]]) -> None:
    for pod in pods(manifests):
        for container in pod["containers"]:
            assert {"readinessProbe", "livenessProbe"} <= set(container), container["name"]


def test_images_are_pinned(manifests: list[dict[str, Any]]) -> None:
    for container in containers(manifests):
        tag = container["image"].rpartition(":")[2]
        assert tag[:1].isdigit() or tag[:2] == "v3", container["image"]


def test_secrets_are_named_and_never_written(manifests: list[dict[str, Any]]) -> None:
    assert "Secret" not in {manifest["kind"] for manifest in manifests}
    for container in containers(manifests):
        for variable in container.get("env", []):
            if any(word in variable["name"] for word in ("PASSWORD", "KEY")):
                assert set(variable) == {"name", "valueFrom"}, variable["name"]


def test_services_find_their_pods(manifests: list[dict[str, Any]]) -> None:
    labels = [
        m["spec"]["template"]["metadata"]["labels"]
        for m in manifests
        if m["kind"] in ("Deployment", "StatefulSet")
    ]
    for service in (manifest for manifest in manifests if manifest["kind"] == "Service"):
        wanted = service["spec"]["selector"].items()
        assert [label for label in labels if wanted <= label.items()], service["metadata"]["name"]


def test_a_pipeline_may_use_ray_in_its_own_namespace(
    manifests: list[dict[str, Any]],
) -> None:
    kinds = {manifest["kind"] for manifest in manifests}
    assert not kinds & {"ClusterRole", "ClusterRoleBinding"}
    role = of_kind(manifests, "Role")
    written = {"create", "update", "patch", "delete", "*"}
    for rule in role["rules"]:
        assert "*" not in rule["resources"]
        if rule["apiGroups"] != ["ray.io"]:
            assert not set(rule["verbs"]) & written, rule
    (subject,) = of_kind(manifests, "RoleBinding")["subjects"]
    assert subject["namespace"] == role["metadata"]["namespace"]

"""The manifests: valid by Kubernetes' own schemas, and as careful as they claim to be."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from tests.infra.manifests import (
    K8S,
    OVERLAYS,
    containers,
    of_kind,
    of_pod,
    pods,
    references,
    rendered,
    secrets,
    workloads,
)

REPO_ROOT = Path(__file__).resolve().parents[2]
VERSION = "1.32"  # of Kubernetes
SERVERS = {"retort-mlflow", "retort-postgres", "retort-store"}
# volumes that the 'restricted' level of the Pod Security Standards admits, of those that a pod may have
ADMITTED = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}


@pytest.fixture(scope="module", params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return rendered(request.param)


def refused(pod: dict[str, Any]) -> list[str]:
    """Why a namespace that enforces 'restricted' would not admit a pod, control by control."""
    reasons = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    reasons += [str(volume) for volume in pod.get("volumes", []) if not set(volume) - {"name"} <= ADMITTED]
    for container in of_pod(pod):
        own, name = container.get("securityContext", {}), container["name"]
        both = pod.get("securityContext", {}) | own
        if both.get("runAsNonRoot") is not True or both.get("runAsUser", 1) == 0:
            reasons.append(f"{name}: root")
        if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
            reasons.append(f"{name}: privileges")
        if own.get("capabilities", {}) != {"drop": ["ALL"]}:
            reasons.append(f"{name}: capabilities")
        if both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            reasons.append(f"{name}: seccomp")
        reasons += [f"{name}: port of the host" for port in container.get("ports", []) if "hostPort" in port]
    return reasons


def test_every_manifest_fits_its_schema(manifests: list[dict[str, Any]]) -> None:
    for manifest in manifests:
        kubernetes_validate.validate(manifest, VERSION, strict=True)


def test_everything_is_in_one_namespace(manifests: list[dict[str, Any]]) -> None:
    assert len({manifest["metadata"]["namespace"] for manifest in manifests}) == 1


def test_a_restricted_namespace_admits_every_pod(manifests: list[dict[str, Any]]) -> None:
    assert len(pods(manifests)) == len(SERVERS) + 1
    for pod in pods(manifests):
        assert not refused(pod)
        assert pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("runAsNonRoot", False),
        ("seccompProfile", {"type": "Unconfined"}),
        ("allowPrivilegeEscalation", True),
        ("capabilities", {"drop": ["NET_RAW"]}),
        ("privileged", True),
    ],
)
def test_that_check_sees_what_a_restricted_namespace_refuses(part: str, value: Any) -> None:
    for pod in pods(rendered("local")):
        spoiled = json.loads(json.dumps(pod))
        spoiled["containers"][0].setdefault("securityContext", {})[part] = value
        assert refused(spoiled)


def test_every_root_file_system_is_read_only_and_tmp_can_be_written(manifests: list[dict[str, Any]]) -> None:
    for container in containers(manifests):
        assert container["securityContext"]["readOnlyRootFilesystem"] is True, container["name"]
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}, container["name"]


def test_no_volume_in_memory_or_on_the_nodes_disk_is_unbounded(manifests: list[dict[str, Any]]) -> None:
    volumes = [volume for pod in pods(manifests) for volume in pod["volumes"] if "emptyDir" in volume]
    assert all("sizeLimit" in volume["emptyDir"] for volume in volumes)


def test_memory_is_kept_free_up_to_the_limit(manifests: list[dict[str, Any]]) -> None:
    for container in containers(manifests):
        resources = container["resources"]
        assert set(resources["limits"]) == {"cpu", "memory"}
        assert resources["requests"]["memory"] == resources["limits"]["memory"]


def test_production_keeps_processors_free_too() -> None:
    for container in containers(rendered("production")):
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_every_server_is_probed_and_may_take_its_time_to_start(manifests: list[dict[str, Any]]) -> None:
    servers = [manifest for manifest in workloads(manifests) if manifest["kind"] != "Job"]
    assert {server["metadata"]["name"] for server in servers} == SERVERS
    for server in servers:
        for container in server["spec"]["template"]["spec"]["containers"]:
            probes = {"startupProbe", "readinessProbe", "livenessProbe"}
            assert probes <= set(container), container["name"]
            startup = container["startupProbe"]
            assert startup["periodSeconds"] * startup["failureThreshold"] >= 300


def test_images_are_pinned(manifests: list[dict[str, Any]]) -> None:
    for container in containers(manifests):
        tag = container["image"].rpartition(":")[2]
        assert re.fullmatch(r"v?\d+\.\d+(\.\d+)?(-\w+)?", tag), container["image"]


def test_secrets_are_named_and_never_written(manifests: list[dict[str, Any]]) -> None:
    assert not of_kind(manifests, "Secret")
    for container in containers(manifests):
        for variable in container.get("env", []):
            if any(word in variable["name"] for word in ("PASSWORD", "_KEY")):
                assert set(variable) == {"name", "valueFrom"}, variable["name"]
    text = json.dumps(manifests)
    assert not re.search(r"://[^/\s\"]+:[^/\s\"]+@", text), "a password in a URL"


def test_every_key_that_is_read_is_in_a_secret_that_the_script_makes(manifests: list[dict[str, Any]]) -> None:
    made = secrets()
    read = set(references(manifests))
    assert len(read) > 8
    assert not {f"{name}: {key}" for name, key in read if key not in made.get(name, {})}


def test_the_script_makes_no_key_twice() -> None:
    once = subprocess.run([K8S / "secrets.sh"], capture_output=True, text=True, check=True).stdout
    again = subprocess.run([K8S / "secrets.sh"], capture_output=True, text=True, check=True).stdout
    random = re.findall(r"\b[0-9a-f]{20,}\b", once)
    assert len(set(random)) >= 12
    assert not set(random) & set(re.findall(r"\b[0-9a-f]{20,}\b", again))


def test_a_user_of_the_store_has_only_its_buckets() -> None:
    made = secrets()
    identities = {who["name"]: who for who in json.loads(made["retort-store"]["s3.json"])["identities"]}
    for name in ("mlflow", "dvc", "pipeline"):
        (pair,) = identities[name]["credentials"]
        assert made[f"retort-store-{name}"] == {
            "AWS_ACCESS_KEY_ID": pair["accessKey"],
            "AWS_SECRET_ACCESS_KEY": pair["secretKey"],
        }
        assert all(":" in action and "Admin" not in action for action in identities[name]["actions"])
    buckets = {
        name: {action.partition(":")[2] for action in who["actions"]} - {""}
        for name, who in identities.items()
    }
    assert buckets == {
        "admin": set(),
        "mlflow": {"mlflow"},
        "dvc": {"dvc", "data"},
        "pipeline": {"pipeline", "data"},
    }
    assert "Write:data" not in identities["pipeline"]["actions"]


def test_no_file_of_the_repository_holds_a_secret() -> None:
    for path in (REPO_ROOT / "infra").rglob("*"):
        if path.is_file() and path.suffix not in (".lock", ".pyc"):
            text = path.read_text(encoding="utf-8")
            assert (
                not re.search(r"(?m)^kind: Secret$", text.replace(r"\n", "\n")) or path.name == "secrets.sh"
            )
            assert not re.search(r"\b[0-9a-f]{40,}\b", re.sub(r"sha256:[0-9a-f]{64}", "", text)), path


def test_services_policies_and_budgets_find_their_pods(manifests: list[dict[str, Any]]) -> None:
    labels = {
        manifest["metadata"]["name"]: manifest["spec"]["template"]["metadata"]["labels"]
        for manifest in workloads(manifests)
    }
    selectors = [(m, m["spec"]["selector"]) for m in of_kind(manifests, "Service")]
    selectors += [(m, m["spec"]["podSelector"]["matchLabels"]) for m in of_kind(manifests, "NetworkPolicy")]
    for kind in ("PodDisruptionBudget", "Deployment", "StatefulSet"):
        selectors += [(m, m["spec"]["selector"]["matchLabels"]) for m in of_kind(manifests, kind)]
    for manifest, selector in selectors:
        found = [name for name, has in labels.items() if selector.items() <= has.items()]
        assert found == [manifest["metadata"]["name"]], f"{manifest['kind']} {manifest['metadata']['name']}"


def test_services_lead_to_ports_that_containers_name(manifests: list[dict[str, Any]]) -> None:
    ports = {
        manifest["metadata"]["name"]: {
            port["name"] for c in of_pod(manifest["spec"]["template"]["spec"]) for port in c.get("ports", [])
        }
        for manifest in workloads(manifests)
    }
    for service in of_kind(manifests, "Service"):
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in ports[service["metadata"]["name"]]
    for policy in of_kind(manifests, "NetworkPolicy"):
        for rule in policy["spec"]["ingress"]:
            assert {port["port"] for port in rule["ports"]} <= ports[policy["metadata"]["name"]]


def test_every_server_is_reached_by_few_and_reaches_few(manifests: list[dict[str, Any]]) -> None:
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind(manifests, "NetworkPolicy")}
    assert set(policies) >= SERVERS
    for name in SERVERS:
        assert set(policies[name]["policyTypes"]) == {"Ingress", "Egress"}
        assert all(rule.get("from") for rule in policies[name]["ingress"]), name
    (database,) = policies["retort-postgres"]["ingress"]
    (only,) = database["from"]
    assert only["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "retort-mlflow"}
    assert "egress" not in policies["retort-store"]
    assert "egress" not in policies["retort-postgres"]


def test_mlflow_asks_for_a_login_and_runs_no_jobs(manifests: list[dict[str, Any]]) -> None:
    (mlflow,) = (c for c in containers(manifests) if c["name"] == "mlflow")
    assert "--app-name=basic-auth" in mlflow["args"]
    values = {variable["name"]: variable.get("value") for variable in mlflow["env"]}
    assert values["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    folder = Path(values["MLFLOW_AUTH_CONFIG_PATH"] or "")
    assert str(folder.parent) in {mount["mountPath"] for mount in mlflow["volumeMounts"]}
    (settings,) = of_kind(manifests, "ConfigMap")
    assert folder.name in settings["data"]
    (deployment,) = of_kind(manifests, "Deployment")
    volumes = deployment["spec"]["template"]["spec"]["volumes"]
    assert settings["metadata"]["name"] in {volume.get("configMap", {}).get("name") for volume in volumes}


def test_the_store_is_given_time_to_end_and_room_by_its_disk(manifests: list[dict[str, Any]]) -> None:
    (store,) = (m for m in workloads(manifests) if m["metadata"]["name"] == "retort-store")
    pod = store["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > 50  # twice the 25 s that it was seen to take
    assert "-volume.max=0" in pod["containers"][0]["args"]


def test_of_the_store_only_s3_listens_outside_its_pod(manifests: list[dict[str, Any]]) -> None:
    (store,) = (container for container in containers(manifests) if container["name"] == "seaweedfs")
    binds = [word for word in store["args"] if "bind=" in word]
    assert sorted(binds) == ["-ip.bind=127.0.0.1", "-s3.ip.bind=0.0.0.0"]
    assert [port["name"] for port in store["ports"]] == ["s3"]


def test_production_stops_no_server_by_draining_a_node() -> None:
    budgets = of_kind(rendered("production"), "PodDisruptionBudget")
    assert {budget["metadata"]["name"] for budget in budgets} == SERVERS
    assert all(budget["spec"]["minAvailable"] == 1 for budget in budgets)
    assert not of_kind(rendered("local"), "PodDisruptionBudget")


def test_the_set_up_can_be_run_again(manifests: list[dict[str, Any]]) -> None:
    (job,) = of_kind(manifests, "Job")
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "OnFailure"
    assert job["spec"]["activeDeadlineSeconds"] > 0


def test_a_pipeline_may_use_ray_in_its_own_namespace(
    manifests: list[dict[str, Any]],
) -> None:
    kinds = {manifest["kind"] for manifest in manifests}
    assert not kinds & {"ClusterRole", "ClusterRoleBinding"}
    (role,) = of_kind(manifests, "Role")
    written = {"create", "update", "patch", "delete", "*"}
    for rule in role["rules"]:
        assert "*" not in rule["resources"]
        if rule["apiGroups"] != ["ray.io"]:
            assert not set(rule["verbs"]) & written, rule
    (binding,) = of_kind(manifests, "RoleBinding")
    (subject,) = binding["subjects"]
    assert subject["namespace"] == role["metadata"]["namespace"]

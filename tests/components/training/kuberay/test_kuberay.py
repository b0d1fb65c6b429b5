"""A step by way of a RayJob: made, followed, judged, found again, and given up with the reason."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic import ValidationError

from components.common.errors import ConfigError, FindingsError, RetortError
from components.common.findings import read_report
from components.common.storage import write_json
from components.training import cluster as ray_cluster
from components.training import remote
from components.training.kuberay import Scheduling, Work, api, entry, life, parcel, run, template
from components.training.kuberay.template import Pod
from components.training.params import Ray
from tests.components.training.kuberay.api_server import Object
from tests.components.training.kuberay.cluster import Cluster
from tests.components.training.kuberay.pods import POD, RUN, connect, make_work

REPO_ROOT = Path(__file__).resolve().parents[4]
NAME = template.job_name(RUN, "finetune")


def in_background(cluster: Cluster, work: Work) -> tuple[threading.Thread, list[BaseException]]:
    failed: list[BaseException] = []

    def body() -> None:
        try:
            run(work, api=connect(cluster.url))
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            failed.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    return thread, failed


def until(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


@contextlib.contextmanager
def at_work(cluster: Cluster, work: Work) -> Iterator[list[BaseException]]:
    """Follow a job whose step works as long as the block lasts; the list gets what following it raised."""
    cluster.endless.add(NAME)
    thread, failed = in_background(cluster, work)
    try:
        until(lambda: cluster.running())
        yield failed
    finally:
        cluster.endless.discard(NAME)
        thread.join(60)


def ended_well(cluster: Cluster) -> bool:
    return all(life.succeeded(job) for job in cluster.jobs())


def owners(cluster: Cluster) -> list[str]:
    return [owner["name"] for job in cluster.jobs() for owner in job["metadata"].get("ownerReferences", [])]


# --- its life ---


def test_a_step_runs_there_and_what_it_leaves_comes_back(
    cluster: Cluster, work: Work, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "components")
    run(work, api=connect(cluster.url))
    assert json.loads((work.arguments["out"] / "report.json").read_text())["kind"] == "ok"
    said = capsys.readouterr().err
    assert [said.count(f"step {number}\n") for number in (1, 2, 20)] == [1, 1, 1]
    assert f"RayJob {NAME}: runs" in caplog.text
    until(lambda: cluster.jobs() == [])
    assert len(cluster.started) == 1


def test_the_findings_of_the_step_are_those_of_its_own_frame(cluster: Cluster, work: Work) -> None:
    cluster.outcome = "findings"
    with pytest.raises(FindingsError, match=r"train\.learns") as raised:
        run(work, api=connect(cluster.url))
    assert raised.value.status == 1
    assert json.loads((work.arguments["out"] / "report.json").read_text())["kind"] == "FindingsError"
    until(lambda: cluster.jobs() == [])
    assert len(cluster.started) == 1, "a gate that closes is not asked again in another cluster"


def test_a_step_that_breaks_is_tried_in_another_cluster_and_then_said(cluster: Cluster, work: Work) -> None:
    cluster.outcome = "crash"
    with pytest.raises(RetortError, match=rf"RayJob {NAME}: AppFailed: exit 1; its log above"):
        run(work, api=connect(cluster.url))
    assert len(cluster.started) == 2
    (finding,) = read_report(work.arguments["out"] / "report.json").errors()
    assert finding.rule == "finetune.failed"
    assert "AppFailed" in finding.message


def test_a_job_that_somebody_stops_is_a_failure_and_is_removed(cluster: Cluster, work: Work) -> None:
    cluster.outcome = "stopped"
    with pytest.raises(RetortError, match="somebody stopped it"):
        run(work, api=connect(cluster.url))
    until(lambda: cluster.jobs() == [])


def test_a_job_that_somebody_removes_is_a_failure(cluster: Cluster, work: Work) -> None:
    with at_work(cluster, work) as failed:
        cluster.delete_job(NAME)
        until(lambda: failed)
    assert "somebody removed it" in str(failed[0])


def test_a_queue_of_kueue_is_waited_for_without_a_deadline(cluster: Cluster, tmp_path: Path) -> None:
    work = make_work(tmp_path, queue="gpus", start_minutes=2 / 60)
    thread, failed = in_background(cluster, work)
    until(lambda: any(life.status_of(job)[0] == "Suspended" for job in cluster.jobs()))
    (job,) = cluster.jobs()
    assert job["metadata"]["labels"][template.QUEUE] == "gpus"
    time.sleep(3.0)  # beyond the deadline and its grace
    with cluster.lock:
        (job,) = cluster.jobs()
        job["spec"]["suspend"] = False
        cluster.put("rayjobs", job, "MODIFIED")
    thread.join(60)
    assert not failed
    assert len(cluster.started) == 1


# --- what goes wrong on the way ---


@pytest.mark.parametrize(
    ("pods_say", "message"),
    [
        ("image", "image registry/retort:wrong cannot be pulled .*kubeflow.image, and its pull secrets"),
        ("secret", 'secret "retort-store" not found.*kubeflow.s3_secret'),
        ("gpu", "3 Insufficient nvidia.com/gpu.*no node has them free"),
        ("quota", "exceeded quota: small.*raise the namespace's ResourceQuota"),
    ],
)
def test_pods_that_do_not_start_are_given_up_with_the_reason(
    cluster: Cluster, tmp_path: Path, pods_say: str, message: str
) -> None:
    cluster.pods_say = pods_say
    work = make_work(tmp_path, start_minutes=4 / 60)
    with pytest.raises(RetortError, match=rf"did not run within ray.start_minutes.*{message}"):
        run(work, api=connect(cluster.url))
    assert "ray.start_minutes" in read_report(work.arguments["out"] / "report.json").errors()[0].message
    until(lambda: cluster.jobs() == [])


def test_an_operator_that_is_not_there_is_said(cluster: Cluster, tmp_path: Path) -> None:
    cluster.operator = False
    work = make_work(tmp_path, start_minutes=1 / 60)
    with pytest.raises(RetortError, match="is the operator running, and for this namespace"):
        run(work, api=connect(cluster.url))
    assert cluster.jobs() == [], "what nobody looks at is removed"


def test_a_cluster_that_knows_no_rayjobs_is_said(cluster: Cluster, work: Work) -> None:
    cluster.crd = False
    with pytest.raises(RetortError, match=r"knows no RayJobs.*install the KubeRay operator, 1\.6 or later"):
        run(work, api=connect(cluster.url))


def test_a_quota_of_jobs_is_said(cluster: Cluster, work: Work) -> None:
    cluster.quota = 'rayjobs "x" is forbidden: exceeded quota: small, used: count/rayjobs.ray.io=1'
    with pytest.raises(RetortError, match="the quota has no room for another RayJob"):
        run(work, api=connect(cluster.url))


@pytest.mark.parametrize("verb", ["create", "get", "list"])
def test_a_right_that_lacks_is_named(cluster: Cluster, work: Work, verb: str) -> None:
    cluster.forbidden = {(verb, "rayjobs")}
    with pytest.raises(
        RetortError, match=rf"may not {'read' if verb == 'get' else verb} rayjobs.*ray-rights.yaml"
    ):
        run(work, api=connect(cluster.url))


def test_without_the_right_to_watch_it_is_looked_at_in_turns(cluster: Cluster, work: Work) -> None:
    cluster.forbidden = {("watch", "rayjobs"), ("get", "pods/log")}
    run(work, api=connect(cluster.url))
    assert len(cluster.started) == 1


@pytest.mark.parametrize("fault", ["drop_watches", "gone"])
def test_watches_may_break_or_be_too_old(cluster: Cluster, work: Work, fault: str) -> None:
    setattr(cluster, fault, True)
    run(work, api=connect(cluster.url))
    assert len(cluster.started) == 1


def test_each_line_of_a_log_that_ends_early_is_shown_once(
    cluster: Cluster, work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.cut_logs = True
    run(work, api=connect(cluster.url))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert lines == [f"step {number}" for number in range(1, 21)]
    assert cluster.cuts > 2


def test_an_api_that_is_away_for_a_while_costs_nothing(cluster: Cluster, work: Work) -> None:
    with at_work(cluster, work) as failed:
        cluster.away = True
        time.sleep(0.8)
        cluster.away = False
    assert not failed
    assert len(cluster.started) == 1


def test_an_api_that_stays_away_is_said_and_the_job_ends_itself(
    cluster: Cluster, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "AWAY_SECONDS", 0.3)
    with at_work(cluster, work) as failed:
        cluster.away = True
        until(lambda: failed)
        assert "did not answer for" in str(failed[0])
        until(lambda: not cluster.running())


@pytest.mark.parametrize("skew", [-7200.0, 7200.0])
def test_clocks_that_differ_by_hours_do_not_matter(
    cluster: Cluster, work: Work, skew: float, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.skew = skew
    run(work, api=connect(cluster.url))
    assert len(cluster.started) == 1
    assert "step 20\n" in capsys.readouterr().err


# --- found again, and swept ---


def test_a_second_try_goes_on_with_the_job_that_runs(
    cluster: Cluster, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    with at_work(cluster, work):
        cluster.add_pod("retried")
        monkeypatch.setenv("KFP_POD_NAME", "retried")
        second, failed = in_background(cluster, work)
        until(lambda: "retried" in owners(cluster))
    second.join(60)
    assert not failed
    assert len(cluster.started) == 1
    assert not cluster.lost


def test_a_job_that_ended_well_is_not_done_again(
    cluster: Cluster, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pod was killed just when the job ended: the next try takes what there is."""
    with monkeypatch.context() as patched:
        patched.setattr(life, "wait", lambda *_: until(lambda: ended_well(cluster)) or sys.exit(9))
        with pytest.raises(SystemExit):
            run(work, api=connect(cluster.url))
    cluster.add_pod("retried")
    monkeypatch.setenv("KFP_POD_NAME", "retried")
    run(work, api=connect(cluster.url))
    assert len(cluster.started) == 1
    assert json.loads((work.arguments["out"] / "report.json").read_text())["kind"] == "ok"


def test_a_job_of_other_inputs_is_replaced(cluster: Cluster, work: Work) -> None:
    with at_work(cluster, work) as failed:
        work.arguments["plan"].write_text("another plan")
        second, raised = in_background(cluster, work)
        until(lambda: failed)
        until(lambda: len(cluster.started) == 2)
    second.join(60)
    assert not raised
    assert "somebody removed it" in str(failed[0])


def test_the_sweep_takes_what_nobody_owns_and_nothing_else(cluster: Cluster) -> None:
    def job(name: str, run_id: str, owner: Object) -> None:
        reference = {"kind": "Pod", "name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"]}
        head = {"name": name, "labels": template.labels(run_id, "finetune"), "ownerReferences": [reference]}
        cluster.put(
            "rayjobs", {"metadata": head, "spec": {}, "status": {"jobDeploymentStatus": "Other"}}, "ADDED"
        )

    living, dead = cluster.add_pod("living"), cluster.add_pod("dead")
    cluster.end_pod("dead")
    job("owned", RUN, living)
    job("left", RUN, dead)
    job("other-run", "another", dead)
    gone = {"metadata": {"name": "living", "uid": "of an earlier pod of that name"}}
    job("older", RUN, gone)
    removed = life.sweep(connect(cluster.url), RUN, "finetune", keep="none")
    assert sorted(removed) == ["left", "older"]
    assert {one["metadata"]["name"] for one in cluster.jobs()} == {"owned", "other-run"}


# --- refused before anything is asked ---


def test_without_a_storage_it_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ray\.storage is empty.*shares no disk"):
        run(make_work(tmp_path, storage=""), api=connect(cluster.url))
    assert cluster.asked == set()


def test_the_prefix_of_all_runs_does_for_a_storage(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETORT_SHARED", "s3://")
    with pytest.raises(RetortError, match="s3://"):
        run(make_work(tmp_path, storage=""), api=connect(cluster.url))
    env = [{"name": "RETORT_SHARED", "value": "s3://bucket/runs"}]
    monkeypatch.setenv("RETORT_SHARED", "s3://bucket/runs")
    assert template.environment(env) == env
    monkeypatch.setenv("RETORT_SHARED", "/mnt/volume")
    assert template.environment(env) == [], "no other pod mounts that volume"


def test_a_remote_cluster_that_shares_nothing_is_refused_with_the_parameters() -> None:
    with pytest.raises(ValidationError, match="shares neither a disk nor a bucket"):
        Ray(address="ray://head:10001")
    assert Ray(address="ray://head:10001", storage="s3://bucket/runs").storage
    assert Ray(address="ray://127.0.0.1:10001").storage == ""


def test_outside_of_a_pod_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RetortError, match="runs in no pod of Kubernetes"):
        run(make_work(tmp_path))
    with (
        pytest.raises(RetortError, match="made for the pipeline's steps"),
        ray_cluster.running(Ray(address="kuberay")),
    ):
        pass


# --- what is sent ---


def rendered(monkeypatch: pytest.MonkeyPatch, **ray: Any) -> Object:
    monkeypatch.setenv("RETORT_RUN", RUN)
    env = [
        {"name": "RETORT_RUN", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['pipeline/runid']"}}},
        {"name": "RETORT_S3_ACCESS_KEY_ID", "valueFrom": {"secretKeyRef": {"name": "store", "key": "id"}}},
        {"name": "KFP_POD_NAME", "value": "x"},
        {"name": "RETORT_STATE", "value": "/work/.retort"},
    ]  # fmt: skip
    user = {"runAsUser": 1234, "runAsGroup": 0}
    pod = Pod(POD, "uid-1", "registry/retort@sha256:1", "pipeline-runner", [{"name": "pull"}], env, user)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://store:8333")
    scheduling = Scheduling(
        tolerations=[{"key": "gpu", "operator": "Exists"}], node_selector={"pool": "gpus"}, affinity={}
    )
    return template.render(
        Ray(address="kuberay", storage="s3://b/p", **ray), pod, scheduling,
        run=RUN, step="finetune", work="abc", attempt="1", arguments="s3://b/p job 1",
    )  # fmt: skip


def pods_of(job: Object) -> dict[str, Object]:
    spec = job["spec"]
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    return {
        "submitter": spec["submitterPodTemplate"],
        "head": spec["rayClusterSpec"]["headGroupSpec"]["template"],
        "worker": group["template"],
    }


def test_resources_tolerations_selectors_and_secrets_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    job = rendered(monkeypatch, workers=3, cpus_per_worker=4, gpus_per_worker=1, memory_per_worker="24Gi")
    pods = pods_of(job)
    (worker,) = pods["worker"]["spec"]["containers"]
    assert worker["resources"]["limits"] == {"cpu": "4", "memory": "24Gi", "nvidia.com/gpu": "1"}
    assert worker["resources"]["requests"] == worker["resources"]["limits"]
    assert pods["worker"]["spec"]["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert pods["worker"]["spec"]["nodeSelector"] == {"pool": "gpus"}
    assert "nvidia.com/gpu" not in pods["head"]["spec"]["containers"][0]["resources"]["limits"]
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 3
    for pod in pods.values():
        (container,) = pod["spec"]["containers"]
        env = {entry["name"]: entry for entry in container["env"]}
        assert container["image"] == "registry/retort@sha256:1"
        assert pod["spec"]["imagePullSecrets"] == [{"name": "pull"}]
        assert env["RETORT_RUN"] == {"name": "RETORT_RUN", "value": RUN}
        assert env["AWS_ACCESS_KEY_ID"]["valueFrom"]["secretKeyRef"]["name"] == "store"
        assert env["AWS_ENDPOINT_URL_S3"]["value"] == "http://store:8333"
        assert not {"KFP_POD_NAME", "RETORT_STATE"} & set(env)
        assert container["securityContext"]["runAsUser"] == 1234


def test_the_job_belongs_to_the_pod_without_holding_it(monkeypatch: pytest.MonkeyPatch) -> None:
    job = rendered(monkeypatch)
    (owner,) = job["metadata"]["ownerReferences"]
    assert (owner["uid"], owner["blockOwnerDeletion"], owner["controller"]) == ("uid-1", False, False)
    assert len(job["metadata"]["name"]) <= 47
    assert job["spec"]["preRunningDeadlineSeconds"] == 1800
    assert job["spec"]["activeDeadlineSeconds"] == 86400
    policies = [rule["policy"] for rule in job["spec"]["deletionStrategy"]["deletionRules"]]
    assert policies == ["DeleteCluster", "DeleteSelf", "DeleteCluster", "DeleteSelf"]


def test_in_a_queue_the_job_is_one_that_kueue_can_admit(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = rendered(monkeypatch, queue="gpus")["spec"]
    assert spec["suspend"]
    assert spec["shutdownAfterJobFinishes"], "KubeRay suspends no other"
    assert "deletionStrategy" not in spec, "KubeRay allows one or the other"


def test_a_restricted_namespace_takes_its_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    for part, pod in pods_of(rendered(monkeypatch)).items():
        spec = pod["spec"]
        manifest = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": part, **pod["metadata"]},
            "spec": spec,
        }
        kubernetes_validate.validate(manifest, "1.32", strict=True)
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_template_is_one_file_that_infra_shows() -> None:
    assert (REPO_ROOT / "infra" / "k8s" / "ray" / "rayjob.yaml").resolve() == template.TEMPLATE


def test_the_role_grants_what_is_asked_and_no_more(cluster: Cluster, work: Work) -> None:
    cluster.outcome = "findings"
    with pytest.raises(FindingsError):
        run(work, api=connect(cluster.url))
    cluster.outcome, cluster.pods_say = "ok", "nothing"
    second = make_work(work.arguments["out"].parent, restarts=0, start_minutes=2 / 60)
    with pytest.raises(RetortError):
        run(second, api=connect(cluster.url))
    cluster.pods_say = ""
    with at_work(cluster, work):
        cluster.add_pod("retried")
        mine = cluster.objects["pods", "retried"]
        (job,) = cluster.jobs()
        life.own(connect(cluster.url), job, Pod.of(mine))
    granted = {(verb, resource) for resource, verbs in api.VERBS.items() for verb in verbs}
    assert cluster.asked == granted
    role = next(yaml.safe_load_all((REPO_ROOT / "infra/k8s/base/ray-rights.yaml").read_text()))
    written = {
        (verb, resource) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]
    }
    assert written == granted


# --- the sign of life ---


def test_a_watch_ends_what_nobody_wants_by_its_own_clock(tmp_path: Path) -> None:
    ended = threading.Event()
    watch = entry.Watch(lambda: "the same", 0.3, ended.set)
    watch.start()
    assert ended.wait(60)
    assert watch.silent


def test_a_storage_that_is_away_is_no_silence() -> None:
    def read() -> str:
        raise RetortError("away")

    ended = threading.Event()
    entry.Watch(read, 0.2, ended.set).start()
    assert not ended.wait(1)


def test_signs_of_life_keep_a_watch_quiet(tmp_path: Path) -> None:
    storage, ended = remote.open_storage(str(tmp_path)), threading.Event()
    with parcel.beating(storage, "job", 2.0):
        entry.Watch(lambda: parcel.read_text(storage, "kuberay/job/beat"), 2.0, ended.set).start()
        assert not ended.wait(4)
    assert ended.wait(60)


# --- the entry point ---


@pytest.mark.parametrize(
    ("word", "kind", "status"), [("ok", "ok", 0), ("findings", "FindingsError", 1), ("break", "failed", 1)]
)
def test_the_entry_point_calls_the_function_and_leaves_what_it_left(
    tmp_path: Path, word: str, kind: str, status: int
) -> None:
    storage = sent(tmp_path, word, silence=60.0)
    done = enter(tmp_path)
    said = done.communicate(timeout=120)[0]
    assert done.returncode == status, said
    result = parcel.read_json(storage, "kuberay/job/1-result.json")
    assert (result["kind"], result["status"]) == (kind, status)
    parcel.bring(storage, result, tmp_path / "out")
    assert json.loads((tmp_path / "out/report.json").read_text()) == f"{word}, auto, data/clean.parquet"
    if word != "ok":
        assert str(parcel.error_of(result)) in said
        again = enter(tmp_path)  # the same job in another cluster
        assert again.communicate(timeout=120)[0].count("\n") == 1
        assert again.returncode == status


def test_the_entry_point_ends_itself_when_nobody_is_there(tmp_path: Path) -> None:
    storage = sent(tmp_path, "wait", silence=2.0)
    done = enter(tmp_path)
    said = done.communicate(timeout=120)[0]
    assert done.returncode == 143, said
    assert "gives no sign of life any more" in said
    assert parcel.read_json(storage, "kuberay/job/1-result.json")["kind"] == parcel.SILENT


def test_an_entry_point_that_is_stopped_leaves_no_result_so_that_another_goes_on(tmp_path: Path) -> None:
    storage = sent(tmp_path, "wait", silence=600.0)
    done = enter(tmp_path)
    until(lambda: (tmp_path / "home/retort/outputs/teacher/report.json").exists(), 60)
    done.terminate()
    done.communicate(timeout=60)
    assert done.returncode == 143
    assert parcel.read_json(storage, "kuberay/job/1-result.json") is None


def sent(folder: Path, word: str, silence: float) -> remote.Storage:
    storage = remote.open_storage(str(folder / "storage"))
    (folder / "manifest").write_text(word)
    reference = parcel.packed(remote.put(storage, folder / "manifest"))
    work = {
        "function": "tests.components.training.kuberay.pods:step_of_a_test",
        "parameters": "components.training.params:FinetuneParams",
        "params": {"ray": {"address": "auto", "storage": storage.uri}},
        "inputs": {"manifest": {"name": "data/clean.parquet", "ref": reference}},
        "images": None, "out": "outputs/teacher", "stores": {}, "silence": silence, "attempt": "1",
    }  # fmt: skip
    parcel.put_json(storage, "kuberay/job/1-work.json", work)
    return storage


def enter(folder: Path) -> subprocess.Popen[str]:
    """The entry point, as Ray's job server runs it."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "components.training.kuberay.entry", str(folder / "storage"), "job", "1"]
    return subprocess.Popen(
        command, cwd=home, env={**os.environ, "HOME": str(home), "PYTHONPATH": str(REPO_ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_images_of_the_pod_alone_go_there_as_one_file(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for name in ("a/1.png", "b/2.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    storage = remote.open_storage(str(tmp_path / "storage"))
    ref = parcel.put_images(storage, root)
    assert ref == parcel.put_images(storage, root)
    entry._unpack(remote.localize(storage, ref), tmp_path / "there")
    assert (tmp_path / "there/b/2.png").read_bytes() == b"b/2.png"


def test_a_work_file_of_another_folder_changes_nothing(tmp_path: Path) -> None:
    write_json(tmp_path / "one.json", {"a": 1})
    assert parcel.key({"a": 1, "b": 2}) == parcel.key({"b": 2, "a": 1})

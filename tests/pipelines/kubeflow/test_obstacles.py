"""What cannot work in pods: every key that names a place is asked, and each reason names its key."""

from __future__ import annotations

import re

import pytest

from components.common.params import Place
from pipelines.kubeflow.obstacles import obstacles, too_old
from pipelines.params import keys
from tests.pipelines.kubeflow.conftest import on


def reasons(*overrides: str) -> list[str]:
    return obstacles(on("http://kfp:8888", *overrides)[0])


def test_the_embedded_default_may_run() -> None:
    assert reasons() == []


@pytest.mark.parametrize(
    "override",
    [
        "data.source=s3://photos/flowers", "teacher.weights=timm:resnet50.a1_in1k", "student.weights=none",
        "teacher.weights=hf:owner/name", "teacher.weights=https://example.org/w.pth", "teacher.weights=s3://b/w.tar",
        "kubeflow.image=registry.example:5000/retort@sha256:" + "0" * 64, "registry.tracking_uri=https://mlflow.example",
        "data.s3.endpoint_url=http://store.example:9000",
    ],
)  # fmt: skip
def test_what_pods_reach_is_taken(override: str) -> None:
    assert reasons(override) == []


def test_a_gpu_with_its_resource_and_a_cluster_with_a_shared_prefix_are_taken() -> None:
    assert reasons("ray.gpus_per_worker=1", "kubeflow.gpu=nvidia.com/gpu") == []
    for address in ("ray://head:10001", "kuberay"):
        assert reasons(f"ray.address={address}", "ray.storage=s3://bucket/retort") == []
    kuberay = ("ray.address=kuberay", "ray.storage=s3://bucket/retort", "ray.gpus_per_worker=1")
    assert reasons(*kuberay) == [], "its pods ask for ray.gpu_resource"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("data.source=photos", "data.source"),
        ("data.source={train: a.txt, val: b.txt}", "data.source"),
        ("data.source=file:///photos", "data.source"),
        ("data.class_names=names.txt", "data.class_names"),
        ("data.corrections=verdicts.csv", "data.corrections"),
        ("data.corrections=s3://bucket/verdicts.csv", "data.corrections"),
        ("validate.baseline=old/manifest.parquet", "validate.baseline"),
        ("teacher.weights=ResNet50_vd_10w_pretrained.tar", "teacher.weights"),
        ("student.weights=/weights/student.pth", "student.weights"),
        ("distill.teachers=[outputs/other]", "distill.teachers"),
        ("registry.tracking_uri=sqlite:///mlflow.db", "registry.tracking_uri"),
        ("registry.tracking_uri=file:///mlruns", "registry.tracking_uri"),
        ("registry.tracking_uri=./mlruns", "registry.tracking_uri"),
        ("registry.tracking_uri=http://localhost:5000", "registry.tracking_uri"),
        ("data.s3.endpoint_url=http://127.0.0.1:9000", "data.s3.endpoint_url"),
        ("kubeflow.image=retort:latest", "kubeflow.image"),
        ("kubeflow.image=registry.example:5000/retort", "kubeflow.image"),
        ("kubeflow.light_image=retort-light", "kubeflow.light_image"),
        ("ray.gpus_per_worker=0.5", "ray.gpus_per_worker"),
        ("ray.address=auto", "ray.address"),
        ("ray.address=kuberay", "ray.storage"),
        ("ray={address: ray://head:10001, storage: /mnt/all}", "ray.storage"),
    ],
)
def test_what_pods_do_not_reach_is_told_by_its_key(override: str, key: str) -> None:
    found = reasons(override)
    assert found
    assert {line.split()[0] for line in found} == {key}
    assert all(": " in line and "\n" not in line for line in found)


@pytest.mark.parametrize(
    "override",
    [
        "data.source={}/photos", "data.corrections={}/verdicts.csv", "student.weights={}/student.pth",
        "distill.teachers=[{}/other]",
    ],
)  # fmt: skip
def test_what_lies_on_the_volume_of_all_pods_is_taken(override: str) -> None:
    claim = "kubeflow.state_volume=retort-state"
    assert reasons(claim, override.format("/retort-state")) == []
    assert reasons(override.format("/retort-state")), "nobody mounts it"
    assert reasons(claim, override.format("/retort-state/..")), "not on the volume"
    assert reasons(claim, override.format("/retort-state2"))


@pytest.mark.parametrize(
    ("version", "missing"),
    [
        ((2, 0), ["fieldPathAsEnv", "emptyDirMounts", "securityContext", "activeDeadlineSeconds"]),
        ((2, 2), ["emptyDirMounts", "securityContext", "activeDeadlineSeconds"]),
        ((2, 15), ["securityContext", "activeDeadlineSeconds"]),
        ((2, 16), ["activeDeadlineSeconds"]),
        ((2, 17), []),
        ((3, 0), []),
        (None, []),
    ],
)
def test_only_what_is_asked_for_needs_a_new_server(
    version: tuple[int, int] | None, missing: list[str]
) -> None:
    pods = {
        "exec-a": {"fieldPathAsEnv": [], "secretAsEnv": []},
        "exec-b": {"emptyDirMounts": [], "securityContext": {}},
    }
    kubernetes = {"deploymentSpec": {"executors": pods}, "pipelineConfig": {"activeDeadlineSeconds": 60}}
    told = too_old(version, [{"root": {}}, {"platforms": {"kubernetes": kubernetes}}])
    assert [line.split(" has no ")[1].split(",")[0] for line in told] == missing
    less = {"deploymentSpec": {"executors": {"exec-a": {"secretAsEnv": []}}}}
    assert too_old(version, [{"root": {}}, {"platforms": {"kubernetes": less}}]) == []


def test_a_password_is_not_told() -> None:
    (line,) = reasons("registry.tracking_uri=http://me:secret@localhost:5000")
    assert "secret" not in line


PATHS = re.compile(r"\b(file|folder|folders|CSV|manifest|package:NAME)\b")
NO_INPUT = {  # keys whose description speaks of files, and that name none which a step reads
    "data.root", "data.remap_labels", "ray.storage", "export.precisions", "export.formats",
    "export.tolerance", "registry.tracking_uri", "teacher.weights_sha256", "student.weights_sha256",
    "kubeflow.token_file",
    "kubeflow.ca_file", "data.synthetic", "data.semi_synthetic", "data.unlabeled",
}  # fmt: skip


def test_every_key_that_names_a_file_is_marked() -> None:
    speaks = {key for key, field in keys() if PATHS.search(field.description or "")}
    marked = {key for key, field in keys() if any(isinstance(mark, Place) for mark in field.metadata)}
    assert speaks - NO_INPUT == marked

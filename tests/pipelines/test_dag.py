"""The DAG as KFP compiles it: its order, its parameters, what each pod gets, and bodies without logic."""

from __future__ import annotations

import ast
import importlib
import inspect
import types
import typing
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.common.params import StepParams
from pipelines import dag
from pipelines.params import Params, keys, load

HOUSE = Path(__file__).resolve().parents[2]
DIGEST = "registry.example/retort@sha256:" + "0" * 64
ROOMS = {
    "dataset": ("ingest", "validate"),
    "weights": ("weights",),
    "audit": ("audit_imbalance", "audit_synthetic", "plan"),
    "training": ("finetune", "check", "distill"),
    "export": ("export",),
    "benchmark": ("benchmark",),
    "registry": ("register",),
}
STEPS = [(room, step) for room, steps in ROOMS.items() for step in steps]
TRAINING = ("finetune", "check", "distill")
ETCD_LIMIT = 1.5 * 2**20


def compiled(tmp_path: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The compiled pipeline and its settings for Kubernetes, by executor."""
    path = tmp_path / "pipeline.yaml"
    dag.compile(load(HOUSE / "params.yaml", overrides), path)
    pipeline, platform = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    return pipeline, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def containers(pipeline: dict[str, Any]) -> dict[str, dict[str, Any]]:
    executors = pipeline["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): executor["container"] for name, executor in executors.items()}


def test_the_same_parameters_compile_to_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    for path in (first, second):
        dag.compile(load(HOUSE / "params.yaml"), path)
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < ETCD_LIMIT / 4


def test_steps_follow_each_other_as_designed(tmp_path: Path) -> None:
    pipeline, _ = compiled(tmp_path)
    tasks = pipeline["root"]["dag"]["tasks"]
    before: dict[str, set[str]] = {}

    def upstream(task: str) -> set[str]:
        if task not in before:
            direct = set(tasks[task].get("dependentTasks", []))
            before[task] = direct.union(*(upstream(other) for other in direct))
        return before[task]

    assert upstream("weights") == set(), "nothing forces weights to wait for the data"
    assert upstream("audit-imbalance") == {"ingest", "validate"}
    assert upstream("audit-synthetic") == {"ingest", "validate", "weights"}
    assert upstream("finetune") >= {"plan", "audit-imbalance", "audit-synthetic"}
    assert "finetune" in upstream("check")
    assert "check" in upstream("distill")
    assert upstream("register") == set(tasks) - {"register"}


def test_every_section_is_a_parameter_of_the_run(tmp_path: Path) -> None:
    pipeline, _ = compiled(tmp_path, "student.train.epochs=9")
    inputs = pipeline["root"]["inputDefinitions"]["parameters"]
    assert set(inputs) == set(Params.model_fields) - dag.NO_STEP
    assert inputs["student"]["defaultValue"]["train"]["epochs"] == 9


@pytest.mark.parametrize(("room", "step"), STEPS)
def test_a_step_reads_its_parameters_back_as_they_were(room: str, step: str) -> None:
    """Through KFP numbers become floats and nulls are left out; the step's class sees no difference."""
    params = load(HOUSE / "params.yaml", ["benchmark.latency_budget_ms=10", "global.class_num=10"])
    kind = parameter_class(room, step)
    sections = {
        field.alias or name: floats(dag.arguments(params)[name]) for name, field in kind.model_fields.items()
    }
    assert kind.model_validate(sections) == params.of(kind)


def floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [floats(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def test_null_is_the_default_of_every_key_that_may_be_null() -> None:
    for key, field in keys():
        nullable = isinstance(field.annotation, types.UnionType) and type(None) in typing.get_args(
            field.annotation
        )
        if nullable:
            assert field.default is None, f"{key}: a null would be lost on its way through KFP"


def body(room: str, step: str) -> ast.FunctionDef:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        component = getattr(importlib.import_module(f"components.{room}.component"), step)
    (function,) = ast.parse(inspect.getsource(component.python_func)).body
    assert isinstance(function, ast.FunctionDef)
    return function


def parameter_class(room: str, step: str) -> type[StepParams]:
    (name,) = (
        node.value.id
        for node in ast.walk(body(room, step))
        if isinstance(node, ast.Attribute)
        and node.attr == "model_validate"
        and isinstance(node.value, ast.Name)
    )
    kind = getattr(importlib.import_module(f"components.{room}.params"), name)
    assert issubclass(kind, StepParams)
    return kind


@pytest.mark.parametrize(("room", "step"), STEPS)
def test_a_component_only_calls_its_step(room: str, step: str) -> None:
    function = body(room, step)
    statements = function.body[1:]  # after the docstring
    assert not [node for node in ast.walk(function) if isinstance(node, ast.If | ast.While | ast.Try)]
    assert len([node for node in statements if not isinstance(node, ast.ImportFrom)]) <= 4
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    assert len([c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "step"]) == 1


@pytest.mark.parametrize(("room", "step"), STEPS)
def test_a_component_hands_every_section_of_its_step_on(room: str, step: str) -> None:
    function = body(room, step)
    (sections,) = (node for node in ast.walk(function) if isinstance(node, ast.Dict) and len(node.keys) > 2)
    given = {key.value for key in sections.keys if isinstance(key, ast.Constant)}
    kind = parameter_class(room, step)
    assert given == {field.alias or name for name, field in kind.model_fields.items()}


def test_training_pods_get_workers_memory_and_a_large_shm(tmp_path: Path) -> None:
    pipeline, kubernetes = compiled(
        tmp_path, "ray.workers=4", "ray.cpus_per_worker=2", "ray.gpus_per_worker=1", "kubeflow.shm=4Gi",
        "kubeflow.memory=24Gi", "kubeflow.gpu=nvidia.com/gpu",
    )  # fmt: skip
    for step in TRAINING:
        resources = containers(pipeline)[step]["resources"]
        assert resources["resourceCpuLimit"] == resources["resourceCpuRequest"] == "9"
        assert resources["resourceMemoryLimit"] == resources["resourceMemoryRequest"] == "24Gi"
        accelerator = resources["accelerator"]
        assert (accelerator["resourceType"], accelerator["resourceCount"]) == ("nvidia.com/gpu", "4")
        (mount,) = kubernetes[f"exec-{step}"]["emptyDirMounts"]
        assert mount == {"medium": "Memory", "mountPath": "/dev/shm", "sizeLimit": "4Gi", "volumeName": "shm"}


def test_workers_elsewhere_are_not_asked_of_the_pod(tmp_path: Path) -> None:
    pipeline, _ = compiled(tmp_path, "ray.workers=64", "ray.address=ray://head:10001")
    assert containers(pipeline)["finetune"]["resources"]["resourceCpuLimit"] == "1"


def test_light_steps_use_the_light_image(tmp_path: Path) -> None:
    pipeline, _ = compiled(tmp_path, "kubeflow.image=full", "kubeflow.light_image=light")
    images = {step: container["image"] for step, container in containers(pipeline).items()}
    light = {step for step, image in images.items() if image == "light"}
    assert light == {"ingest", "validate", "audit-imbalance", "audit-synthetic", "plan"}
    assert set(images.values()) == {"full", "light"}


@pytest.mark.parametrize(
    ("overrides", "uncached"),
    [
        ((f"kubeflow.image={DIGEST}",), {"register"}),
        ((f"kubeflow.image={DIGEST}", "data.source=s3://bucket/images"), {"register", "ingest"}),
        ((f"kubeflow.image={DIGEST}", "kubeflow.light_image=light:latest"),
         {"register", "ingest", "validate", "audit-imbalance", "audit-synthetic", "plan"}),
    ],
)  # fmt: skip
def test_only_what_cannot_change_under_its_name_is_cached(
    tmp_path: Path, overrides: tuple[str, ...], uncached: set[str]
) -> None:
    pipeline, _ = compiled(tmp_path, *overrides)
    tasks = pipeline["root"]["dag"]["tasks"]
    assert {name for name, task in tasks.items() if not task["cachingOptions"].get("enableCache")} == uncached


def test_every_pod_knows_its_run_and_the_keys_of_the_store(tmp_path: Path) -> None:
    pipeline, kubernetes = compiled(tmp_path, "kubeflow.s3_secret=store-keys")
    assert set(kubernetes) == set(pipeline["deploymentSpec"]["executors"])
    for settings in kubernetes.values():
        (variable,) = settings["fieldPathAsEnv"]
        assert variable == {"name": "RETORT_RUN", "fieldPath": "metadata.labels['pipeline/runid']"}
        (secret,) = settings["secretAsEnv"]
        names = {pair["envVar"] for pair in secret["keyToEnv"]}
        assert names == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert "store-keys" not in yaml.safe_dump(pipeline), "the secret is named for Kubernetes alone"


@pytest.mark.parametrize(
    ("given", "name"), [("retort-digits", "retort-digits"), ("Mülls & Co_2", "m-lls-co-2"), ("花", "retort")]
)
def test_the_pipeline_has_a_name_that_kubernetes_takes(given: str, name: str) -> None:
    params = Params.model_validate({"registry": {"name": given}})
    assert dag.pipeline_name(params) == name


def test_every_task_has_a_name_a_person_can_read(tmp_path: Path) -> None:
    pipeline, _ = compiled(tmp_path)
    names = [task["taskInfo"]["name"] for task in pipeline["root"]["dag"]["tasks"].values()]
    assert len(set(names)) == len(names)
    assert {"Finetune the teacher", "Distil the student", "Export the student"} <= set(names)


def test_pods_know_the_store_that_data_s3_names(tmp_path: Path) -> None:
    pipeline, _ = compiled(tmp_path, "data.s3.endpoint_url=http://store.example:9000", "data.s3.region=here")
    for executor in pipeline["deploymentSpec"]["executors"].values():
        env = {item["name"]: item["value"] for item in executor["container"].get("env", [])}
        assert env["AWS_ENDPOINT_URL_S3"] == "http://store.example:9000"
        assert env["AWS_DEFAULT_REGION"] == "here"

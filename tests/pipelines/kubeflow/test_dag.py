"""The DAG as KFP compiles it: its order, its parameters, what each pod gets, and bodies without logic."""

from __future__ import annotations

import ast
import inspect
import types
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from pipelines.kubeflow import adapter, components, dag
from pipelines.params import Params, keys, load
from pipelines.steps import MAIN, PIPELINES, Stage, Step
from tests.pipelines import longer

REPO_ROOT = Path(__file__).resolve().parents[3]
DIGEST = "registry.example/retort@sha256:" + "0" * 64
STEPS = {stage.step.name: stage.step for line in PIPELINES for stage in line.stages}
TRAINING = ("finetune", "check", "distill")
ETCD_LIMIT = 1.5 * 2**20


def compiled(tmp_path: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The compiled pipeline and its settings for Kubernetes, by executor."""
    path = tmp_path / "pipeline.yaml"
    dag.compile(load(REPO_ROOT / "params.yaml", overrides), path)
    pipeline, platform = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    return pipeline, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def containers(pipeline: dict[str, Any]) -> dict[str, dict[str, Any]]:
    executors = pipeline["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): executor["container"] for name, executor in executors.items()}


def test_the_same_parameters_compile_to_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    for path in (first, second):
        dag.compile(load(REPO_ROOT / "params.yaml"), path)
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
    assert set(inputs) == set(Params.model_fields) - {"kubeflow", "expand", "compare_weights", "tune"}
    assert inputs["student"]["defaultValue"]["train"]["epochs"] == 9


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_step_reads_its_parameters_back_as_they_were(step: Step) -> None:
    """Through KFP numbers become floats and nulls are left out; the step's class sees no difference."""
    params = load(REPO_ROOT / "params.yaml", ["benchmark.latency_budget_ms=10", "global.class_num=10"])
    kind = step.kind()
    sections = {name: floats(dag.arguments(params)[field]) for field, name in step.sections().items()}
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


@pytest.mark.parametrize("name", STEPS)
def test_a_component_only_calls_its_step(name: str) -> None:
    (function,) = ast.parse(inspect.getsource(components.__dict__[name.replace("-", "_")].python_func)).body
    assert isinstance(function, ast.FunctionDef)
    _, needed, call = function.body  # after the docstring
    assert isinstance(needed, ast.ImportFrom), "KFP writes the body into the pipeline, without its module"
    assert ast.unparse(call) == f"run('{name}', locals())"


@pytest.mark.parametrize("stage", MAIN.stages, ids=[stage.name for stage in MAIN.stages])
def test_a_component_takes_what_its_row_says(stage: Stage) -> None:
    spec = components.__dict__[stage.step.name.replace("-", "_")].component_spec
    options = [stage.step.option] if stage.step.option else []
    assert set(spec.inputs) == {*options, *stage.step.sections(), *stage.inputs}
    assert {name for name in spec.inputs if spec.inputs[name].type == "Dict"} == set(stage.step.sections())
    assert set(spec.outputs) - {"metrics"} == {*stage.outputs, "page"}


def test_every_component_is_a_step() -> None:
    found = {name for name, value in vars(components).items() if hasattr(value, "component_spec")}
    assert found == {name.replace("-", "_") for name in STEPS}


def test_a_row_is_a_task_with_the_parameters_that_its_class_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(components, "count", longer.count, raising=False)
    path = tmp_path / "pipeline.yaml"
    dag.compile(load(REPO_ROOT / "params.yaml"), path, longer.LONGER)
    pipeline, _ = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    assert pipeline["pipelineInfo"]["name"] == "retort-digits-longer"
    tasks = pipeline["root"]["dag"]["tasks"]
    assert set(tasks["count"]["dependentTasks"]) == {"ingest", "validate"}
    assert tasks["count"]["taskInfo"]["name"] == "Count"
    assert set(tasks["count"]["inputs"]["parameters"]) == {"checks", "general", "of", "registry", "report"}
    assert tasks["again"]["inputs"]["parameters"]["of"]["runtimeValue"] == {"constant": "twice"}


def test_a_body_hands_sections_places_page_and_metrics_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "find", lambda name, option: (longer.DRAWING, longer.DRAWING[name]))
    logged: dict[str, float] = {}
    given = {
        "general": {"seed": 3.0}, "checks": {}, "report": {}, "registry": {"name": "photos"},
        "data": {"source": "digits", "root": "nowhere"},
        **{name: SimpleNamespace(path=str(tmp_path / name)) for name in ("images", "drawn", "page")},
        "metrics": SimpleNamespace(path=str(tmp_path / "metrics"), log_metric=logged.__setitem__),
    }  # fmt: skip
    adapter.run("drawn", given)
    assert (
        tmp_path / "drawn/seen.txt"
    ).read_text() == f"3 photos {tmp_path / 'images'} outputs/drawn/seen.txt"
    assert (tmp_path / "images").is_dir()
    assert (tmp_path / "page").read_text() == (tmp_path / "drawn/report.html").read_text()
    assert logged == {"val.top1": 0.5}
    given["data"] = {"source": "photos", "root": "photos"}
    adapter.run("drawn", given)
    assert (tmp_path / "drawn/seen.txt").read_text() == "3 photos photos outputs/drawn/seen.txt"
    del given["data"]
    with pytest.raises(KeyError, match="data"):
        adapter.run("drawn", given)


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
    pipeline, _ = compiled(tmp_path, "ray.workers=64", "ray.address=ray://127.0.0.1:10001")
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

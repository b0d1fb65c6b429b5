"""The DAG as KFP compiles it: its order, its parameters, what each pod gets, and bodies without logic."""

from __future__ import annotations

import ast
import csv
import inspect
import json
import os
import tempfile
import types
import typing
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from kfp import dsl, local

from components.common.errors import RetortError
from components.common.storage import write_json
from components.dataset import digits
from components.dataset.params import Splits
from components.tracking.client import connect
from pipelines.catalogue import PIPELINES
from pipelines.kubeflow import adapter, components, dag
from pipelines.params import Params, keys, load
from pipelines.retraining import RETRAIN
from pipelines.steps import MAIN, Stage, Step
from tests.pipelines import longer

REPO_ROOT = Path(__file__).resolve().parents[3]
DIGEST = "registry.example/retort@sha256:" + "0" * 64
EACH = list({stage.name: stage for line in PIPELINES for stage in line.stages}.values())
STEPS = {stage.step.name: stage.step for line in PIPELINES for stage in line.stages}
TRAINING = ("finetune", "check", "distill")
CLOSING = "close-run"
LARGEST = 512 * 2**10  # bytes of IR; the server keeps it in etcd, whose limit is 1.5 MiB


@cache
def documents(*overrides: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The compiled pipeline and its settings for Kubernetes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        dag.compile(load(REPO_ROOT / "params.yaml", overrides), path)
        return parsed(path)


def parsed(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    pipeline, platform = yaml.load_all(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
    return pipeline, platform["platforms"]["kubernetes"]


def compiled(*overrides: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The compiled pipeline, and its pods' settings for Kubernetes, by executor."""
    pipeline, kubernetes = documents(*overrides)
    return pipeline, kubernetes["deploymentSpec"]["executors"]


def tasks(pipeline: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tasks of all steps; the exit handler closes them in."""
    found: dict[str, dict[str, Any]] = pipeline["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    return found


def containers(pipeline: dict[str, Any]) -> dict[str, dict[str, Any]]:
    executors = pipeline["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): executor["container"] for name, executor in executors.items()}


def test_the_same_parameters_compile_to_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    for path in (first, second):
        dag.compile(load(REPO_ROOT / "params.yaml"), path)
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < LARGEST


def test_steps_follow_each_other_as_designed() -> None:
    pipeline, _ = compiled()
    edges = tasks(pipeline)
    before: dict[str, set[str]] = {}

    def upstream(task: str) -> set[str]:
        if task not in before:
            direct = set(edges[task].get("dependentTasks", []))
            before[task] = direct.union(*(upstream(other) for other in direct))
        return before[task]

    assert upstream("weights") == set(), "nothing forces weights to wait for the data"
    assert upstream("audit-imbalance") == {"ingest", "validate"}
    assert upstream("audit-synthetic") == {"ingest", "validate", "weights"}
    assert upstream("finetune") >= {"plan", "audit-imbalance", "audit-synthetic"}
    assert "finetune" in upstream("check")
    assert "check" in upstream("distill")
    assert upstream("register") == set(edges) - {"register"}


def test_a_section_that_can_change_products_is_a_parameter_of_the_run() -> None:
    pipeline, _ = compiled("student.train.epochs=9")
    inputs = pipeline["root"]["inputDefinitions"]["parameters"]
    others = {"kubeflow", "expand", "compare_weights", "tune", "retrain", "registry", "report"}
    assert set(inputs) == set(Params.model_fields) - others
    assert inputs["student"]["defaultValue"]["train"]["epochs"] == 9
    assert inputs["ray"]["defaultValue"] == {"workers": 2.0}


def test_pods_are_those_of_the_overrides_while_defaults_are_those_of_the_file(tmp_path: Path) -> None:
    in_file = load(REPO_ROOT / "params.yaml")
    wanted = load(REPO_ROOT / "params.yaml", ["student.train.epochs=9", "ray.workers=4"])
    path = tmp_path / "pipeline.yaml"
    dag.compile(wanted, path, in_file=in_file)
    pipeline, _ = parsed(path)
    inputs = pipeline["root"]["inputDefinitions"]["parameters"]
    assert inputs["student"]["defaultValue"]["train"]["epochs"] == in_file.student.train.epochs
    assert containers(pipeline)["finetune"]["resources"]["resourceCpuLimit"] == "5"


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_step_reads_its_parameters_back_as_they_were(step: Step) -> None:
    """Through KFP numbers become floats and nulls are left out; the step's class sees no difference."""
    params = load(REPO_ROOT / "params.yaml", ["benchmark.latency_budget_ms=10", "global.class_num=10"])
    kind = step.kind()
    pipeline = next(each for each in PIPELINES if step in [stage.step for stage in each.stages])
    run, settings = floats(dag.arguments(params, pipeline)), json.loads(dag.settings(params, pipeline))
    sections = {
        name: {**settings.get(field, {}), **run[field]} if field in step.given() else settings[field]
        for field, name in step.sections().items()
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


@pytest.mark.parametrize("name", STEPS)
def test_a_component_only_calls_its_step(name: str) -> None:
    (function,) = ast.parse(inspect.getsource(components.__dict__[name.replace("-", "_")].python_func)).body
    assert isinstance(function, ast.FunctionDef)
    _, needed, call = function.body  # after the docstring
    assert isinstance(needed, ast.ImportFrom), "KFP writes the body into the pipeline, without its module"
    assert ast.unparse(call) == f"run('{name}', locals())"


@pytest.mark.parametrize("stage", EACH, ids=[stage.name for stage in EACH])
def test_a_component_takes_what_its_row_says(stage: Stage) -> None:
    spec = components.__dict__[stage.step.name.replace("-", "_")].component_spec
    options = [stage.step.option] if stage.step.option else []
    more = ["task_config"] if stage.step.pod == "training" else []
    assert set(spec.inputs) == {*options, *stage.step.given(), *stage.inputs, *more}
    assert {name for name in spec.inputs if spec.inputs[name].type == "Dict"} == stage.step.given()
    decides = ["go_on"] if stage.step.decides else []
    assert set(spec.outputs) - {"metrics", "confusion"} == {*stage.outputs, *decides, "page"}


def test_every_component_is_a_step() -> None:
    found = {name for name, value in vars(components).items() if hasattr(value, "component_spec")}
    assert found == {*(name.replace("-", "_") for name in STEPS), "close_run"}


def test_artifacts_have_types() -> None:
    pipeline, _ = compiled()
    kinds = {
        f"{component.removeprefix('comp-')}.{name}": each["artifactType"]["schemaTitle"]
        for component, spec in pipeline["components"].items()
        if component != "comp-exit-handler-1"
        for name, each in spec.get("outputDefinitions", {}).get("artifacts", {}).items()
    }
    for name in ("ingest.manifest", "validate.clean", "validate.quarantine"):
        assert kinds[name] == "system.Dataset"
    for name in ("weights.weights", "finetune.trained", "distill.trained", "export.exported"):
        assert kinds[name] == "system.Model"
    for step in ("finetune", "distill"):
        assert kinds[f"{step}.metrics"] == "system.Metrics"
        assert kinds[f"{step}.confusion"] == "system.ClassificationMetrics"
    pages = [kind for name, kind in kinds.items() if name.endswith(".page")]
    assert pages == ["system.HTML"] * len(MAIN.stages)


def test_the_ui_has_words_for_every_component_and_artifact() -> None:
    for name in (*STEPS, CLOSING):
        component = components.__dict__[name.replace("-", "_")]
        words = component.component_spec.description
        assert words.endswith("."), name
        taken = set(inspect.signature(component.python_func).parameters)
        artifacts = taken - set(Params.model_fields) | taken.intersection(("weights", "plan"))
        for argument in artifacts:
            assert f"        {argument}: " in inspect.getsource(component.python_func), f"{name}: {argument}"
    pipeline, _ = compiled()
    assert pipeline["pipelineInfo"]["description"] == MAIN.description


def test_the_last_task_closes_the_run_however_the_steps_end() -> None:
    pipeline, _ = compiled(f"kubeflow.image={DIGEST}")
    root = pipeline["root"]["dag"]["tasks"]
    assert set(root) == {"exit-handler-1", CLOSING}
    assert root[CLOSING]["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert root[CLOSING]["dependentTasks"] == ["exit-handler-1"]
    assert root[CLOSING]["inputs"]["parameters"] == {
        "status": {"taskFinalStatus": {"producerTask": "exit-handler-1"}}
    }
    assert not root[CLOSING]["cachingOptions"].get("enableCache")
    (function,) = ast.parse(inspect.getsource(components.close_run.python_func)).body
    assert isinstance(function, ast.FunctionDef)
    _, _, call = function.body
    assert ast.unparse(call) == "close(status.state)"


@pytest.mark.filterwarnings("ignore:You may be attemping to run a task")
def test_a_run_whose_step_was_killed_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the component itself, as an exit handler of KFP's local runner."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    settings = {"registry": {"tracking_uri": uri, "name": "doomed"}}
    for name, value in (
        ("RETORT_SETTINGS", json.dumps(settings)),
        ("RETORT_STATE", os.fspath(tmp_path / "state")),
        ("RETORT_RUN", "doomed"),
        ("PYTHONPATH", os.fspath(REPO_ROOT)),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=os.fspath(tmp_path / "runs"))
    with pytest.raises(RuntimeError, match="dying"):
        longer.doomed()
    client = connect(uri)
    experiment = client.get_experiment_by_name("doomed")
    states = {run.info.run_name: run.info.status for run in client.search_runs([experiment.experiment_id])}
    assert states.pop("dying") == "KILLED"
    assert list(states.values()) == ["FAILED"]


def test_only_what_talks_to_other_servers_is_tried_again() -> None:
    pipeline, _ = compiled("kubeflow.deadline_hours=2")
    found = {name: task["retryPolicy"] for name, task in tasks(pipeline).items() if "retryPolicy" in task}
    assert set(found) == {"ingest", "weights", "register"}
    for policy in found.values():
        assert policy["maxRetryCount"] == 2
        assert policy["backoffDuration"] == "60s"
        assert policy["backoffFactor"] == 2.0
        assert policy["backoffMaxDuration"] == "7200s", "an hour, else, and the server ends what takes longer"


def test_a_run_and_each_of_its_pods_have_a_deadline() -> None:
    _, kubernetes = documents("kubeflow.deadline_hours=1.5")
    assert kubernetes["pipelineConfig"]["activeDeadlineSeconds"] == 5400
    executors = kubernetes["deploymentSpec"]["executors"]
    seconds = {
        name.removeprefix("exec-"): int(pod["activeDeadlineSeconds"]) for name, pod in executors.items()
    }
    assert seconds.pop(CLOSING) == 600
    assert set(seconds.values()) == {5400}


@pytest.mark.parametrize("overrides", [(), ("benchmark.threads=[1, 8]", "kubeflow.small_memory=2Gi")])
def test_a_quota_takes_every_pod(overrides: tuple[str, ...]) -> None:
    """A namespace with a ResourceQuota refuses what says no request and no limit."""
    pipeline, _ = compiled(*overrides)
    sizes = {name: container["resources"] for name, container in containers(pipeline).items()}
    assert set(sizes) == {*(stage.name for stage in MAIN.stages), CLOSING}
    for size in sizes.values():
        assert size["resourceCpuRequest"] == size["resourceCpuLimit"] != ""
        assert size["resourceMemoryRequest"] == size["resourceMemoryLimit"] != ""
    assert sizes["benchmark"]["resourceCpuLimit"] == ("8" if overrides else "2")
    assert sizes["validate"]["resourceMemoryLimit"] == ("2Gi" if overrides else "8Gi")


def test_a_restricted_namespace_takes_every_pod() -> None:
    pipeline, kubernetes = compiled()
    assert set(kubernetes) == set(pipeline["deploymentSpec"]["executors"])
    for pod in kubernetes.values():
        assert pod["securityContext"] == {"runAsNonRoot": True, "runAsUser": "10001", "runAsGroup": "0"}
    _, kubernetes = compiled("kubeflow.run_as_user=namespace")
    for pod in kubernetes.values():
        assert pod["securityContext"] == {"runAsNonRoot": True}, "the namespace gives a user of its own"


def test_every_pod_writes_to_volumes_of_a_bounded_size() -> None:
    _, kubernetes = compiled("kubeflow.scratch=3Gi")
    for pod in kubernetes.values():
        mounts = {mount["mountPath"]: mount for mount in pod["emptyDirMounts"]}
        assert mounts["/tmp"]["sizeLimit"] == mounts["/work"]["sizeLimit"] == "3Gi"
        assert "medium" not in mounts["/work"]
        assert len({mount["volumeName"] for mount in mounts.values()}) == len(mounts)


def test_images_are_pulled_with_the_secrets_that_are_named() -> None:
    _, kubernetes = compiled("kubeflow.pull_secrets=[registry-key, other]")
    for pod in kubernetes.values():
        assert [secret["secretName"] for secret in pod["imagePullSecret"]] == ["registry-key", "other"]


def test_a_row_is_a_task_with_the_parameters_that_its_class_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(components, "count", longer.count, raising=False)
    path = tmp_path / "pipeline.yaml"
    dag.compile(load(REPO_ROOT / "params.yaml"), path, longer.LONGER)
    pipeline, _ = parsed(path)
    assert pipeline["pipelineInfo"]["name"] == "retort-digits-longer"
    made = tasks(pipeline)
    assert made["count"]["dependentTasks"] == ["validate"]
    assert made["count"]["taskInfo"]["name"] == "Count"
    assert set(made["count"]["inputs"]["parameters"]) == {"checks", "general", "of"}
    assert made["again"]["inputs"]["parameters"]["of"]["runtimeValue"] == {"constant": "twice"}


@pytest.fixture
def body(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of a body that draws, in a pod whose settings say where images lie, and who tracks."""
    monkeypatch.setattr(adapter, "find", lambda name, option: (longer.DRAWING, longer.DRAWING[name]))
    monkeypatch.setenv("RETORT_STATE", os.fspath(tmp_path / "state"))
    tell(monkeypatch, {"source": "digits", "root": "nowhere"})
    return {
        "general": {"seed": 3.0}, "checks": {},
        **{name: SimpleNamespace(path=str(tmp_path / name)) for name in ("drawn", "page")},
    }  # fmt: skip


def tell(monkeypatch: pytest.MonkeyPatch, data: dict[str, Any]) -> None:
    settings = {"data": data, "report": {}, "registry": {"name": "photos"}, "checks": {"waive": []}}
    monkeypatch.setenv("RETORT_SETTINGS", json.dumps(settings))


def test_a_body_hands_sections_places_page_and_metrics_on(
    body: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: dict[str, float] = {}
    body["metrics"] = SimpleNamespace(path=str(tmp_path / "metrics"), log_metric=logged.__setitem__)
    adapter.run("drawn", body)
    seen = tmp_path / "drawn/seen.txt"
    assert seen.read_text() == f"3 photos {tmp_path / 'state/digits'} outputs/drawn/seen.txt"
    assert (tmp_path / "page").read_text() == (tmp_path / "drawn/report.html").read_text()
    assert logged == {"val.top1": 0.5}
    tell(monkeypatch, {"source": "photos", "root": "photos"})
    adapter.run("drawn", body)
    assert seen.read_text() == "3 photos photos outputs/drawn/seen.txt"
    del body["general"]
    with pytest.raises(KeyError, match="general"):
        adapter.run("drawn", body)


def test_a_parameter_that_contradicts_what_was_compiled_in_is_refused(body: dict[str, Any]) -> None:
    body["checks"] = {"waive": ["ingest.images"]}
    with pytest.raises(RetortError, match=r"'checks' is not what this version was compiled for.*-o KEY"):
        adapter.run("drawn", body)


def test_a_pod_without_settings_says_so(body: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RETORT_SETTINGS")
    with pytest.raises(RetortError, match="RETORT_SETTINGS: missing"):
        adapter.run("drawn", body)


def test_the_confusion_matrix_is_that_of_the_steps_own_file(tmp_path: Path) -> None:
    names = ["cat", "dog", "hen"]
    write_json(tmp_path / "model.json", {"class_names": names})
    with (tmp_path / "confusion.csv").open("w", newline="") as file:
        rows = [("cat", "cat"), ("cat", "dog"), ("dog", "dog"), ("cat", "dog")]
        csv.writer(file).writerows([("actual", "predicted"), *rows])
    artifact = dsl.ClassificationMetrics()
    adapter._confusion(tmp_path, artifact)
    matrix = artifact.metadata["confusionMatrix"]
    assert [each["displayName"] for each in matrix["annotationSpecs"]] == names
    assert [row["row"] for row in matrix["rows"]] == [[1, 2, 0], [0, 1, 0], [0, 0, 0]]
    write_json(tmp_path / "model.json", {"class_names": [str(number) for number in range(31)]})
    many = dsl.ClassificationMetrics()
    adapter._confusion(tmp_path, many)
    assert many.metadata == {}


def test_a_pod_draws_the_embedded_digits_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETORT_STATE", os.fspath(tmp_path))
    params = load(REPO_ROOT / "params.yaml")
    monkeypatch.setenv("RETORT_SETTINGS", dag.settings(params))
    stage = MAIN["audit-imbalance"]
    run = dag.arguments(params)
    given = {field: run[field] for field in stage.step.given()}
    told = adapter._params(stage, given)
    root = tmp_path / "digits"
    assert told.data.root == os.fspath(root)
    wanted = dict(digits.files(Splits(), params.general.seed))
    assert {name: (root / name).read_bytes() for name in wanted} == wanted
    (root / next(iter(wanted))).unlink()
    adapter._params(stage, given)
    assert not (root / next(iter(wanted))).exists(), "they were there: another step drew them"


def test_keys_have_names_of_our_own_until_the_step_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in adapter.KEYS.values():
        monkeypatch.setenv(variable, "another's")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    for own in adapter.KEYS:
        monkeypatch.setenv(own, own.lower())
    adapter.take_keys()
    assert os.environ["AWS_ACCESS_KEY_ID"] == "retort_s3_access_key_id"
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == "retort_s3_secret_access_key"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "retort_mlflow_password"
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "the plugin's")
    monkeypatch.setenv("MLFLOW_RUN_ID", "abc")
    adapter.take_keys()
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "the plugin's"


def test_training_pods_get_workers_memory_and_a_large_shm() -> None:
    pipeline, kubernetes = compiled(
        "ray.workers=4", "ray.cpus_per_worker=2", "ray.gpus_per_worker=1", "kubeflow.shm=4Gi",
        "kubeflow.memory=24Gi", "kubeflow.gpu=nvidia.com/gpu",
    )  # fmt: skip
    for step in TRAINING:
        resources = containers(pipeline)[step]["resources"]
        assert resources["resourceCpuLimit"] == resources["resourceCpuRequest"] == "9"
        assert resources["resourceMemoryLimit"] == resources["resourceMemoryRequest"] == "24Gi"
        accelerator = resources["accelerator"]
        assert (accelerator["resourceType"], accelerator["resourceCount"]) == ("nvidia.com/gpu", "4")
        mounts = {mount["volumeName"]: mount for mount in kubernetes[f"exec-{step}"]["emptyDirMounts"]}
        assert mounts["shm"] == {
            "medium": "Memory",
            "mountPath": "/dev/shm",
            "sizeLimit": "4Gi",
            "volumeName": "shm",
        }


def test_training_pods_run_on_the_nodes_that_are_named() -> None:
    _, kubernetes = compiled("kubeflow.node_selector={pool: gpu}",
        "kubeflow.tolerations=[{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]",
    )  # fmt: skip
    for name, pod in kubernetes.items():
        if name.removeprefix("exec-") in TRAINING:
            assert pod["nodeSelector"] == {"labels": {"pool": "gpu"}}
            (toleration,) = pod["tolerations"]
            assert toleration == {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        else:
            assert not {"nodeSelector", "tolerations"} & set(pod)


@pytest.mark.parametrize("control", [True, False])
def test_check_reserves_gpus_when_it_trains(control: bool) -> None:
    pipeline, _ = compiled("ray.gpus_per_worker=1", "kubeflow.gpu=nvidia.com/gpu",
        f"distill.control={str(control).lower()}",
    )  # fmt: skip
    reserved = {step for step, each in containers(pipeline).items() if "accelerator" in each["resources"]}
    assert reserved == {"finetune", "distill", *(["check"] if control else [])}


def test_workers_elsewhere_are_not_asked_of_the_pod() -> None:
    pipeline, _ = compiled("ray.workers=64", "ray.address=ray://127.0.0.1:10001")
    assert containers(pipeline)["finetune"]["resources"]["resourceCpuLimit"] == "1"


def test_where_workers_have_pods_of_their_own_selectors_and_tolerations_are_theirs() -> None:
    pipeline, kubernetes = compiled(
        "ray.address=kuberay", "ray.workers=64", "ray.gpus_per_worker=1", "kubeflow.gpu=nvidia.com/gpu",
        "kubeflow.node_selector={pool: gpus}", "kubeflow.tolerations=[{key: gpu, operator: Exists}]",
    )  # fmt: skip
    for step in ("finetune", "check", "distill"):
        component = pipeline["components"][f"comp-{step}"]
        passthroughs = component["taskConfigPassthroughs"]
        passed = {each["field"]: each.get("applyToTask", False) for each in passthroughs}
        assert passed == {
            "RESOURCES": True, "ENV": True, "KUBERNETES_VOLUMES": True,
            "KUBERNETES_TOLERATIONS": False, "KUBERNETES_NODE_SELECTOR": False, "KUBERNETES_AFFINITY": False,
        }  # fmt: skip
        assert component["inputDefinitions"]["parameters"]["task_config"]["parameterType"] == "TASK_CONFIG"
        assert "task_config" not in tasks(pipeline)[step]["inputs"]["parameters"], "the server fills it in"
        resources = containers(pipeline)[step]["resources"]
        assert (resources["resourceCpuLimit"], resources["resourceMemoryLimit"]) == ("1", "2Gi")
        assert "accelerator" not in resources
        assert kubernetes[f"exec-{step}"]["nodeSelector"]["labels"] == {"pool": "gpus"}
    pipeline, _ = compiled()
    assert "taskConfigPassthroughs" not in pipeline["components"]["comp-finetune"], "all is the pod's"


def test_light_steps_use_the_light_image() -> None:
    pipeline, _ = compiled("kubeflow.image=full", "kubeflow.light_image=light")
    images = {step: container["image"] for step, container in containers(pipeline).items()}
    light = {step for step, image in images.items() if image == "light"}
    assert light == {"ingest", "validate", "audit-imbalance", "audit-synthetic", "plan", CLOSING}
    assert set(images.values()) == {"full", "light"}


@pytest.mark.parametrize(
    ("overrides", "uncached"),
    [
        ((f"kubeflow.image={DIGEST}",), set()),
        ((f"kubeflow.image={DIGEST}", "data.source=s3://bucket/images"), {"ingest", "validate"}),
        ((f"kubeflow.image={DIGEST}", "teacher.weights=https://weights.example/teacher.pth"), {"weights"}),
        ((f"kubeflow.image={DIGEST}", "teacher.weights=https://weights.example/teacher.pth",
          f"teacher.weights_sha256={'ab' * 32}"), set()),
        ((f"kubeflow.image={DIGEST}", "kubeflow.light_image=light:latest"),
         {"ingest", "validate", "audit-imbalance", "audit-synthetic", "plan"}),
        ((f"kubeflow.image={DIGEST}", "data.corrections=/retort-state/verdicts.csv"), {"ingest", "validate"}),
        ((f"kubeflow.image={DIGEST}", "distill.teachers=[/retort-state/other]"), {"check", "distill"}),
    ],
)  # fmt: skip
def test_only_what_cannot_change_under_its_name_is_cached(
    overrides: tuple[str, ...], uncached: set[str]
) -> None:
    pipeline, _ = compiled(*overrides)
    found = {name for name, task in tasks(pipeline).items() if not task["cachingOptions"].get("enableCache")}
    assert found == {*uncached, "benchmark", "register"}


def test_what_cannot_change_products_is_no_part_of_a_caches_key() -> None:
    """KFP's key is made of parameters, image, command and variables: none of them may say who tracks."""
    one, pods_of_one = compiled()
    other, pods_of_other = compiled(
        "registry.tracking_uri=http://elsewhere:5000", "report.thumbnails=false", "data.root=elsewhere",
        "data.s3.endpoint_url=http://store.example:9000", "checks.waive=[ingest.images]",
        "ray.stall_minutes=30",
    )  # fmt: skip
    assert one["deploymentSpec"] == other["deploymentSpec"]
    assert one["components"] == other["components"]
    assert pods_of_one != pods_of_other, "they are in the pods' annotations"
    for name, task in tasks(one).items():
        free = {
            "ingest": set(),
            "validate": set(),
            "finetune": {"data", "checks"},
            "distill": {"data", "checks"},
        }
        taken = set(task["inputs"].get("parameters", {}))
        assert not taken & {"registry", "report", *free.get(name, {"data"})}, name


def test_settings_are_in_every_pod() -> None:
    _, kubernetes = compiled("registry.tracking_uri=http://mlflow:5000")
    for pod in kubernetes.values():
        settings = json.loads(pod["podMetadata"]["annotations"]["retort-settings"])
        assert set(settings) == {"data", "checks", "ray", "registry", "report", "shared"}
        assert settings["registry"]["tracking_uri"] == "http://mlflow:5000"
        paths = {each["name"]: each["fieldPath"] for each in pod["fieldPathAsEnv"]}
        assert paths["RETORT_SETTINGS"] == "metadata.annotations['retort-settings']"


def test_every_pod_knows_its_run_and_the_keys_of_store_and_tracker() -> None:
    """Under names of our own: KFP's launcher takes AWS_... for the keys of its own store."""
    pipeline, kubernetes = compiled("kubeflow.s3_secret=store-keys", "kubeflow.mlflow_secret=tracker-login")
    assert set(kubernetes) == set(pipeline["deploymentSpec"]["executors"])
    for name, pod in kubernetes.items():
        paths = {each["name"]: each["fieldPath"] for each in pod["fieldPathAsEnv"]}
        assert paths["RETORT_RUN"] == "metadata.labels['pipeline/runid']"
        given = {
            pair["envVar"]: (secret["secretName"], pair["secretKey"])
            for secret in pod["secretAsEnv"]
            for pair in secret["keyToEnv"]
        }
        login = {
            "RETORT_MLFLOW_USERNAME": ("tracker-login", "MLFLOW_TRACKING_USERNAME"),
            "RETORT_MLFLOW_PASSWORD": ("tracker-login", "MLFLOW_TRACKING_PASSWORD"),
        }
        store = {
            "RETORT_S3_ACCESS_KEY_ID": ("store-keys", "AWS_ACCESS_KEY_ID"),
            "RETORT_S3_SECRET_ACCESS_KEY": ("store-keys", "AWS_SECRET_ACCESS_KEY"),
        }
        assert given == (login if name == f"exec-{CLOSING}" else {**store, **login})
        assert set(given) <= set(adapter.KEYS), "a step gives them back the names that its libraries know"
    assert "store-keys" not in yaml.safe_dump(pipeline), "the secret is named for Kubernetes alone"


def test_only_the_pod_that_registers_has_the_key_that_signs() -> None:
    pipeline, kubernetes = compiled("kubeflow.sign_secret=release-key")
    having = {
        name: [(one["secretName"], one["mountPath"]) for one in pod["secretAsVolume"]]
        for name, pod in kubernetes.items()
        if pod.get("secretAsVolume")
    }
    assert having == {"exec-register": [("release-key", "/retort-keys")]}
    executors = pipeline["deploymentSpec"]["executors"]
    given = {one["name"]: one["value"] for one in executors["exec-register"]["container"]["env"]}
    assert given["RETORT_SIGN_KEY"] == "/retort-keys/key.pem"
    assert given["RETORT_IMAGE"] == executors["exec-register"]["container"]["image"]


@pytest.mark.parametrize(
    ("given", "name"), [("retort-digits", "retort-digits"), ("Mülls & Co_2", "m-lls-co-2"), ("花", "retort")]
)
def test_the_pipeline_has_a_name_that_kubernetes_takes(given: str, name: str) -> None:
    params = Params.model_validate({"registry": {"name": given}})
    assert dag.pipeline_name(params) == name


def test_every_task_has_a_name_a_person_can_read() -> None:
    pipeline, _ = compiled()
    names = [task["taskInfo"]["name"] for task in tasks(pipeline).values()]
    names += [task["taskInfo"]["name"] for task in pipeline["root"]["dag"]["tasks"].values()]
    assert len(set(names)) == len(names)
    shown = {"Finetune the teacher", "Distil the student", "Export the student", "Close the run in MLflow"}
    assert shown <= set(names)


def test_a_step_knows_the_store_that_data_s3_names(
    body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(variable, "the cluster's")
    store = {"endpoint_url": "http://store.example:9000", "region": "here"}
    tell(monkeypatch, {"source": "s3://bucket/images", "s3": store})
    adapter.run("drawn", body)
    assert os.environ["AWS_ENDPOINT_URL_S3"] == "http://store.example:9000"
    assert os.environ["AWS_DEFAULT_REGION"] == "here"


def retraining(tmp_path: Path, *overrides: str) -> dict[str, Any]:
    """The second pipeline, compiled."""
    path = tmp_path / "retrain.yaml"
    dag.compile(load(REPO_ROOT / "params.yaml", overrides), path, RETRAIN)
    return parsed(path)[0]


def inside(pipeline: dict[str, Any], component: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = pipeline["components"][component]["dag"]["tasks"]
    return found


def test_a_quiet_week_takes_two_small_pods(tmp_path: Path) -> None:
    """All else waits for a condition: first that anything changed, then that it is worth a training."""
    pipeline = retraining(tmp_path)
    outer = tasks(pipeline)
    (condition,) = (name for name in outer if name.startswith("condition"))
    assert set(outer) - {condition} == {"ingest", "retrain-changes"}
    asked = "inputs.parameter_values['pipelinechannel--retrain-changes-go_on'] == 'yes'"
    assert outer[condition]["triggerPolicy"]["condition"] == asked
    middle = inside(pipeline, f"comp-{condition}")
    (condition,) = (name for name in middle if name.startswith("condition"))
    assert set(middle) - {condition} == {"validate", "retrain-decide"}
    assert "retrain-decide-go_on" in middle[condition]["triggerPolicy"]["condition"]
    rest = inside(pipeline, f"comp-{condition}")
    assert set(rest) == {stage.name for stage in RETRAIN.stages if stage.when == "retrain-decide"}
    assert pipeline["pipelineInfo"]["name"].endswith("-retrain")
    for name in ("ingest", "retrain-changes"):
        assert containers(pipeline)[name]["resources"]["resourceCpuLimit"] == "2"


def test_only_the_champion_learns_on_where_that_is_asked_for(tmp_path: Path) -> None:
    pipeline = retraining(tmp_path, "retrain.from_original=never")
    assert not {"finetune", "check", "distill"} & set(containers(pipeline))
    wired = pipeline["components"]["comp-retrain-choose"]["inputDefinitions"]["artifacts"]
    assert {name for name, each in wired.items() if each.get("isOptional")} == {"distilled", "passed"}


@pytest.mark.parametrize("decided", [True, False])
def test_a_pod_tells_kubeflow_what_its_step_decided(
    decided: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stage = RETRAIN["retrain-changes"]

    def decide(params: Any, *, manifest: Path, out: Path) -> None:
        out.mkdir()
        write_json(out / "decision.json", {"go_on": decided})
        (out / "report.html").write_text("page")

    monkeypatch.setattr("components.retraining.changes.changes", decide)
    params = load(REPO_ROOT / "params.yaml")
    monkeypatch.setenv("RETORT_SETTINGS", dag.settings(params, RETRAIN))
    given: dict[str, Any] = {
        name: value for name, value in dag.arguments(params, RETRAIN).items() if name in stage.step.given()
    }
    places = {name: SimpleNamespace(path=os.fspath(tmp_path / name)) for name in ("manifest", "out", "page")}
    adapter.run(stage.step.name, {**given, **places, "go_on": os.fspath(tmp_path / "told/go_on")})
    assert (tmp_path / "told/go_on").read_text() == ("yes" if decided else "no")

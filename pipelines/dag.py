"""The DAG in Kubeflow Pipelines: which step reads what of which, and what each pod gets."""

# no 'from __future__ import annotations' here: kfp reads the types of a pipeline's parameters themselves

import copy
import math
import re
import tempfile
from pathlib import Path
from typing import Any

from kfp import dsl, kubernetes
from kfp.compiler import Compiler

from components.audit.component import audit_imbalance, audit_synthetic
from components.audit.component import plan as make_plan
from components.benchmark.component import benchmark as measure
from components.common.storage import write_text
from components.dataset.component import ingest, validate
from components.export.component import export as to_onnx
from components.registry.component import register
from components.training.component import check, finetune
from components.training.component import distill as train_student
from components.weights.component import weights as start_weights
from pipelines.params import Params

NO_STEP = {
    "kubeflow",
    "expand",
    "compare_weights",
    "tune",
}  # compiled in, or read by commands outside the DAG
S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def arguments(params: Params) -> dict[str, dict[str, Any]]:
    """The run's parameters: one dict a section that a step reads.

    kfp takes no nulls: a key that is null is left out. Null is the default of every key that may be null.
    """
    return params.model_dump(mode="json", exclude=NO_STEP, exclude_none=True)


def pipeline_name(params: Params) -> str:
    """``registry.name`` in the letters that Kubernetes allows; pods are named after it (63 characters)."""
    name = re.sub(r"[^a-z0-9]+", "-", params.registry.name.lower())
    return name[:40].strip("-") or "retort"


def build(params: Params) -> Any:
    """The pipeline: ``params`` are the defaults of its run's parameters, and size its pods."""
    default = arguments(params)
    pod = _Pods(params)

    @dsl.pipeline(name=pipeline_name(params), description="From labelled images to a small classifier.")
    def retort(
        general: dict = default["general"],
        data: dict = default["data"],
        validation: dict = default["validation"],
        audit: dict = default["audit"],
        teacher: dict = default["teacher"],
        student: dict = default["student"],
        distill: dict = default["distill"],
        export: dict = default["export"],
        benchmark: dict = default["benchmark"],
        registry: dict = default["registry"],
        ray: dict = default["ray"],
        report: dict = default["report"],
        checks: dict = default["checks"],
    ) -> dsl.Model:
        every = {"general": general, "data": data, "checks": checks, "report": report, "registry": registry}
        nets = {"teacher": teacher, "student": student}

        ingested = ingest(**every)
        pod.light(ingested, "Ingest", cached=params.data.source == "digits")
        images = {"images": ingested.outputs["images"]}

        validated = validate(manifest=ingested.outputs["manifest"], validation=validation, **images, **every)
        pod.light(validated, "Validate")
        rows = {"manifest": validated.outputs["clean"], **images, **every}

        start = start_weights(**nets, **every)
        pod.full(start, "Weights")
        weights = {"weights": start.outputs["weights"]}

        imbalance = audit_imbalance(audit=audit, **rows)
        pod.light(imbalance, "Audit: imbalance")

        synthetic = audit_synthetic(audit=audit, **weights, **rows)
        pod.light(synthetic, "Audit: synthetic images")

        parts = {"imbalance": imbalance.outputs["part"], "synthetic": synthetic.outputs["part"]}
        planned = make_plan(audit=audit, **parts, **every)
        pod.light(planned, "Plan")
        plan = {"plan": planned.outputs["plan"]}

        finetuned = finetune(teacher=teacher, ray=ray, **plan, **weights, **rows)
        pod.training(finetuned, "Finetune the teacher")
        model = {"teacher_model": finetuned.outputs["trained"]}

        checked = check(distill=distill, ray=ray, **nets, **model, **plan, **weights, **rows)
        pod.training(checked, "Check before distillation")
        passed = {"passed": checked.outputs["passed"]}

        distilled = train_student(
            distill=distill, ray=ray, **nets, **model, **passed, **plan, **weights, **rows
        )
        pod.training(distilled, "Distil the student")

        small = to_onnx(of="student", export=export, model=distilled.outputs["trained"], **rows)
        pod.full(small, "Export the student")
        large = _called(to_onnx, "export-teacher")(
            of="teacher", export=export, model=finetuned.outputs["trained"], **rows
        )
        pod.full(large, "Export the teacher")

        exports = {"student": small.outputs["exported"], "teacher": large.outputs["exported"]}
        measured = measure(benchmark=benchmark, **exports, **rows)
        pod.full(measured, "Benchmark", cpus=max(params.benchmark.threads, default=1))

        registered = register(
            student=distilled.outputs["trained"],
            exported=small.outputs["exported"],
            measured=measured.outputs["measured"],
            **passed,
            **plan,
            **rows,
        )
        pod.full(registered, "Register", cached=False)  # champion or challenger depends on the registry
        return distilled.outputs["trained"]

    return retort


def compile(params: Params, out: Path) -> None:
    """Write the pipeline as IR YAML, whole or not at all: the same parameters give the same bytes."""
    pipeline = build(params)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        Compiler().compile(pipeline, str(path))
        write_text(out, path.read_text(encoding="utf-8"))


def _called(component: Any, name: str) -> Any:
    """The same component by another name: kfp names a task after it, and a second one 'export-2'."""
    twin = copy.copy(component)
    twin.component_spec = copy.deepcopy(component.component_spec)
    twin.component_spec.name = name
    return twin


class _Pods:
    """What a task's pod gets on a cluster; a local run ignores it.

    The server's cache knows an image by its name, not by its content, and a source by its name too: a task
    is cached only when its image is pinned by a digest and what it reads cannot change under its name.
    """

    def __init__(self, params: Params) -> None:
        self.kubeflow = params.kubeflow
        self.ray = params.ray
        self.s3 = params.data.s3

    def full(self, task: dsl.PipelineTask, name: str, cached: bool = True, cpus: int = 0) -> None:
        """A pod of the image with everything in it."""
        self._pod(task, name, self.kubeflow.image, cached)
        if cpus:
            task.set_cpu_request(str(cpus)).set_cpu_limit(str(cpus))

    def light(self, task: dsl.PipelineTask, name: str, cached: bool = True) -> None:
        """A pod of the image without torch, where there is one."""
        self._pod(task, name, self.kubeflow.light_image or self.kubeflow.image, cached)

    def training(self, task: dsl.PipelineTask, name: str) -> None:
        """A pod with room for Ray's workers, unless they live elsewhere, and a /dev/shm for their loaders."""
        workers = self.ray.workers if self.ray.address == "" else 0
        self.full(task, name, cpus=1 + math.ceil(workers * self.ray.cpus_per_worker))
        # requests = limits; pages of a memory-backed volume count against the limit
        task.set_memory_request(self.kubeflow.memory).set_memory_limit(self.kubeflow.memory)
        shm = {"mount_path": "/dev/shm", "medium": "Memory", "size_limit": self.kubeflow.shm}  # noqa: S108
        kubernetes.empty_dir_mount(task, volume_name="shm", **shm)
        gpus = math.ceil(workers * self.ray.gpus_per_worker)
        if self.kubeflow.gpu and gpus:
            task.set_accelerator_type(self.kubeflow.gpu).set_accelerator_limit(gpus)

    def _pod(self, task: dsl.PipelineTask, name: str, image: str, cached: bool) -> None:
        task.set_display_name(name)
        task.set_container_image(image)
        task.set_caching_options(cached and "@sha256:" in image)
        # the run's key for the tracker; as an argument it would be part of the cache's key
        kubernetes.use_field_path_as_env(task, "RETORT_RUN", "metadata.labels['pipeline/runid']")
        # every pod reads images; none finds what another one noted about stores
        if self.s3.endpoint_url:
            task.set_env_variable("AWS_ENDPOINT_URL_S3", self.s3.endpoint_url)
        if self.s3.region:
            task.set_env_variable("AWS_DEFAULT_REGION", self.s3.region)
        if self.kubeflow.s3_secret:
            kubernetes.use_secret_as_env(task, self.kubeflow.s3_secret, {key: key for key in S3_KEYS})

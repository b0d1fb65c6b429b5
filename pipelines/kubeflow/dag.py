"""A pipeline of the table in Kubeflow: tasks, edges and parameters of the run follow from its rows."""

from __future__ import annotations

import copy
import inspect
import json
import re
import tempfile
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import yaml
from kfp import dsl
from kfp.compiler import Compiler

from components.common.storage import write_text
from pipelines.kubeflow import components
from pipelines.kubeflow.pods import equip, equip_closing, passthroughs, shared
from pipelines.params import Params
from pipelines.steps import GO_ON, MAIN, WORK, Pipeline, Stage

STEPS = "Steps"  # what the UI calls them together, beside the task that closes the run


def arguments(params: Params, pipeline: Pipeline = MAIN) -> dict[str, dict[str, Any]]:
    """The run's parameters: one dict a section that can change products, by its field's name in ``Params``.

    Of a section of which one key alone can change them (``WORK``), that key is all that it holds. kfp takes
    no nulls: a key that is null is left out. Null is the default of every key that may be null.
    """
    read = set().union(*(stage.step.given() for stage in pipeline.stages))
    keys = {section: {key.removeprefix(f"{section}.")} for section, key in WORK.items()}
    return params.model_dump(
        mode="json", include={field: keys.get(field, True) for field in read}, exclude_none=True
    )


def settings(params: Params, pipeline: Pipeline = MAIN) -> str:
    """The sections that are no parameter of the run, or not whole, to one step at least, as JSON.

    Where images lie, where Ray runs, who tracks, whether pages show images, what is waived: none of it
    changes what such a step leaves. A parameter is part of the cache's key (``GenerateCacheKey`` in KFP's
    ``cacheutils``: parameters, ids of input artifacts, image, command, and of late the container's
    variables): with another tracker everything would be trained again. So pods have these as an annotation,
    compiled in, which the variable ``RETORT_SETTINGS`` shows; where there are no pods, as in a local run, the
    variable alone holds them.
    """
    free = set(WORK).union(*(set(stage.step.sections()) - stage.step.given() for stage in pipeline.stages))
    sections = params.model_dump(mode="json", include=free, exclude_none=True)
    return json.dumps({**sections, "shared": shared(params.kubeflow)}, sort_keys=True)


def pipeline_name(params: Params, pipeline: Pipeline = MAIN) -> str:
    """``registry.name`` in the letters that Kubernetes allows; pods are named after it (63 characters)."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{params.registry.name} {pipeline.name}".lower().strip())
    return name[:40].strip("-") or "retort"


def build(
    params: Params, pipeline: Pipeline = MAIN, in_file: Params | None = None, local: bool = False
) -> Any:
    """The pipeline: its pods as ``params`` ask for them, and one that ends the MLflow run after them.

    Args:
        in_file: the defaults of the run's parameters; None: ``params``, too.
        local: for KFP's local runner: a failure ends it at once, without that last one, and without a retry.
    """
    pipeline = pipeline.of(params)
    given = arguments(in_file or params, pipeline)
    compiled = settings(params, pipeline)

    def body(*values: Any) -> None:
        sections = dict(zip(given, values, strict=True))
        tasks: dict[str, dsl.PipelineTask] = {}

        def output(source: str) -> Any:
            stage, _, name = source.partition(".")
            return tasks[stage].outputs[name]

        closed: AbstractContextManager[Any] = nullcontext()
        if not local:
            closing = components.close_run()
            equip_closing(closing, params, compiled)
            closed = dsl.ExitHandler(closing, name=STEPS)
        with closed, ExitStack() as conditions:
            decided: set[str] = set()
            for stage in pipeline.stages:
                if stage.when and stage.when not in decided:
                    # each stage needs what those before it needed, so conditions lie in one another
                    decided.add(stage.when)
                    conditions.enter_context(dsl.If(tasks[stage.when].outputs["go_on"] == GO_ON))
                read = stage.step.given()
                inputs = {field: value for field, value in sections.items() if field in read}
                inputs |= {name: output(source) for name, source in stage.inputs.items()}
                inputs |= {stage.step.option: stage.option} if stage.step.option else {}
                tasks[stage.name] = _component(stage, params)(**inputs)
                equip(tasks[stage.name], stage, params, compiled, retried=not local)

    # kfp reads the run's parameters off the function's signature
    body.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=value, annotation=dict)
            for name, value in given.items()
        ]
    )
    # a pod that waits for what no node has is ended by this alone: its own time counts from its start
    config = dsl.PipelineConfig(active_deadline_seconds=params.kubeflow.deadline_seconds)
    name = pipeline_name(params, pipeline)
    return dsl.pipeline(name=name, description=pipeline.description, pipeline_config=config)(body)


def compile(
    params: Params, out: Path, pipeline: Pipeline = MAIN, in_file: Params | None = None
) -> list[dict[str, Any]]:
    """Write the pipeline as IR YAML, whole or not at all: the same parameters give the same bytes.

    Args:
        in_file: see ``build``.

    Returns:
        What was written: the pipeline, and its settings for Kubernetes.
    """
    built = build(params, pipeline, in_file)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        Compiler().compile(built, str(path))
        text = path.read_text(encoding="utf-8")
    documents = list(yaml.load_all(text, yaml.CSafeLoader))
    write_text(out, _in_order(text, documents[0]))
    return documents


def _in_order(text: str, pipeline: dict[str, Any]) -> str:
    """The IR with a head that is the same in every process.

    kfp's comments at its head show each default as protobuf's map has it, in an order that no seed fixes.
    """
    inputs = pipeline["root"].get("inputDefinitions", {}).get("parameters", {})

    def sorted_default(match: re.Match[str]) -> str:
        default = json.dumps(inputs[match["name"]]["defaultValue"], sort_keys=True, ensure_ascii=False)
        return f"{match['input']} [Default: {default}]"

    head = re.match(r"(?:#.*\n)*", text)
    comments = head[0] if head else ""
    ordered = re.sub(r"(?m)^(?P<input>#    (?P<name>\w+): \w+) \[Default: .*\]$", sorted_default, comments)
    return ordered + text[len(comments) :]


def _component(stage: Stage, params: Params) -> Any:
    """The step's component, by the stage's name: kfp names a task after it, and a second one 'export-2'."""
    component = getattr(components, stage.step.name.replace("-", "_"))
    passed_on = passthroughs(stage, params)
    if stage.name == stage.step.name and not passed_on:
        return component
    twin = copy.copy(component)
    twin.component_spec = copy.deepcopy(component.component_spec)
    twin.component_spec.name = stage.name
    twin.component_spec.task_config_passthroughs = passed_on
    return twin

"""A pipeline of the table in Kubeflow: tasks, edges and parameters of the run follow from its rows."""

from __future__ import annotations

import copy
import inspect
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import yaml
from kfp import dsl
from kfp.compiler import Compiler

from components.common.storage import write_text
from pipelines.kubeflow import components
from pipelines.kubeflow.pods import equip
from pipelines.params import Params
from pipelines.steps import MAIN, Pipeline, Stage


def arguments(params: Params, pipeline: Pipeline = MAIN) -> dict[str, dict[str, Any]]:
    """The run's parameters: one dict a section that a step reads, by the name of its field in ``Params``.

    kfp takes no nulls: a key that is null is left out. Null is the default of every key that may be null.
    """
    read = {field for stage in pipeline.stages for field in stage.step.sections()}
    return params.model_dump(mode="json", include=read, exclude_none=True)


def pipeline_name(params: Params, pipeline: Pipeline = MAIN) -> str:
    """``registry.name`` in the letters that Kubernetes allows; pods are named after it (63 characters)."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{params.registry.name} {pipeline.name}".lower().strip())
    return name[:40].strip("-") or "retort"


def build(params: Params, pipeline: Pipeline = MAIN, in_file: Params | None = None) -> Any:
    """The pipeline: ``params`` size its pods.

    Args:
        in_file: the defaults of its run's parameters; None: ``params``, too.
    """
    defaults = arguments(in_file or params, pipeline)

    def body(*values: Any) -> dsl.Model:
        sections = dict(zip(defaults, values, strict=True))
        tasks: dict[str, dsl.PipelineTask] = {}

        def output(source: str) -> Any:
            stage, _, name = source.partition(".")
            return tasks[stage].outputs[name]

        for stage in pipeline.stages:
            given = {field: sections[field] for field in stage.step.sections()}
            given |= {name: output(source) for name, source in stage.inputs.items()}
            given |= {stage.step.option: stage.option} if stage.step.option else {}
            tasks[stage.name] = _component(stage)(**given)
            equip(tasks[stage.name], stage, params)
        return output(pipeline.result)

    # kfp reads the run's parameters and the result off the function's signature
    body.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=value, annotation=dict)
            for name, value in defaults.items()
        ],
        return_annotation=dsl.Model,
    )
    return dsl.pipeline(name=pipeline_name(params, pipeline), description=pipeline.description)(body)


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


def _component(stage: Stage) -> Any:
    """The step's component, by the stage's name: kfp names a task after it, and a second one 'export-2'."""
    component = getattr(components, stage.step.name.replace("-", "_"))
    if stage.name == stage.step.name:
        return component
    twin = copy.copy(component)
    twin.component_spec = copy.deepcopy(component.component_spec)
    twin.component_spec.name = stage.name
    return twin

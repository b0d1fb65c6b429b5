"""All pipelines, the main one first, and whose stage a step is."""

from __future__ import annotations

from components.common.errors import ConfigError
from pipelines.retraining import RETRAIN
from pipelines.steps import MAIN, Pipeline, Stage

PIPELINES = (MAIN, RETRAIN)
MAIN_NAME = "main"  # on the command line: in Kubeflow it is called as registry.name alone


def named(name: str) -> Pipeline:
    """A pipeline by what the command line calls it.

    Raises:
        ConfigError: when there is none of that name.
    """
    called = {pipeline.name or MAIN_NAME: pipeline for pipeline in PIPELINES}
    if name not in called:
        raise ConfigError(f"--pipeline {name}: expected {' or '.join(called)}")
    return called[name]


def find(step: str, option: str = "") -> tuple[Pipeline, Stage]:
    """The stage that uses a step with that value of its option, and the first pipeline that has it."""
    return next(
        (pipeline, stage)
        for pipeline in PIPELINES
        for stage in pipeline.stages
        if (stage.step.name, stage.option) == (step, option)
    )

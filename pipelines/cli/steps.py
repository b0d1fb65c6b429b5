"""A command for each step of the pipelines, made from its row in the table."""

# no 'from __future__ import annotations' here: Typer reads the annotations of functions made at run time

from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from components.common.errors import ConfigError
from pipelines.cli.options import Options
from pipelines.steps import Pipeline, Stage


def add(pipelines: Sequence[Pipeline], app: typer.Typer, groups: dict[str, typer.Typer]) -> None:
    """Add a command for each step to ``app``, or to the group that the step belongs to.

    A step of several pipelines is run as the first of them has it.
    """
    added: set[str] = set()
    for pipeline in pipelines:
        for name, stages in pipeline.uses().items():
            if name in added:
                continue
            added.add(name)
            step = stages[0].step
            place = groups[step.group] if step.group else app
            command = _choosing(pipeline, stages) if step.option else _plain(pipeline, stages[0])
            place.command(step.command.split()[-1], help=step.help)(command)


def _plain(pipeline: Pipeline, stage: Stage) -> Callable[..., None]:
    def command(context: typer.Context) -> None:
        run(context.obj, stage.step.command, pipeline, [stage.name])

    return command


def _choosing(pipeline: Pipeline, stages: Sequence[Stage]) -> Callable[..., None]:
    """The command of a step with several uses: an option says which, the first by default."""
    step = stages[0].step
    option = typer.Option(f"--{step.option}", help=step.option_help)

    def command(context: typer.Context, value: Annotated[str, option] = stages[0].option) -> None:
        named = {stage.option: stage.name for stage in stages}
        if value not in named:
            raise ConfigError(f"--{step.option} {value}: expected {' or '.join(named)}")
        run(context.obj, step.command, pipeline, [named[value]])

    return command


def run(options: Options, command: str, pipeline: Pipeline, stages: Sequence[str]) -> None:
    """Run stages one after the other, in this folder and under its lock."""
    with options.working(command) as params:
        for name in stages:
            pipeline.run(name, params)

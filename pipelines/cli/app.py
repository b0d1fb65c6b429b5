"""The command ``retort``: its help, its global options, and all of its commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.catalogue import PIPELINES
from pipelines.cli import project, proofs, steps, tools, tracking
from pipelines.cli.options import Context
from pipelines.steps import AUDIT, MAIN

app = typer.Typer(
    name="retort",
    help="""From a folder of labelled images to the smallest, fastest classifier that is accurate enough,
with proof at every step.

\b
  retort init mydata --images ~/photos     start with own images
  dvc repro                                run every step that is not up to date
  retort -o student.train.epochs=8 distill one step, one value changed
  retort submit --local                    the same DAG through Kubeflow Pipelines' local runner
  retort report                            the whole run on one page: outputs/index.html

Global options may stand before or after the command. Exit status: 0 done; 1 a finding of level error, or
failed work; 2 the command or its configuration cannot be understood; 130, 143 after SIGINT, SIGTERM.""",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
audit_app = typer.Typer(
    help="Audit the clean data: imbalance, synthetic images, and the plan for training (all three in turn).",
    invoke_without_command=True,
    rich_markup_mode=None,
)

retrain_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


@app.callback()
def root(
    context: typer.Context,
    # declared for --help: ``run`` has taken these options off the command line already
    file: Annotated[Path, typer.Option("--params", help="The parameters' file.")] = Path("params.yaml"),
    override: Annotated[
        list[str] | None,
        typer.Option("-o", metavar="KEY=VALUE", help="Change one value, such as -o student.train.epochs=8."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    log_level: Annotated[
        str | None,
        typer.Option(help="The least that is said: debug, info, warning or error; beats RETORT_LOG_LEVEL."),
    ] = None,
) -> None:
    """Print the help when no command is given."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@audit_app.callback()
def audit(context: Context) -> None:
    """Audit the clean data: imbalance, synthetic images, and the plan for training (all three in turn)."""
    if context.invoked_subcommand is None:
        steps.run(context.obj, "audit", MAIN, AUDIT)


@retrain_app.callback()
def retrain(context: Context) -> None:
    """Train again when data or code have changed, from the champion, and promote what is better.

    One line at the end and a page, outputs/retrain/report.html, say what came of it. Exit status 0: nothing
    to do, or done (champion or challenger); 1: it stopped, and a person has to look.

    \b
    Examples:
      retort retrain
      retort retrain -o retrain.from_original=never      only the champion learns on
      retort retrain -o retrain.budget_minutes=120
      retort retrain changes                             one of its steps
    """
    if context.invoked_subcommand is None:
        from pipelines.again import run

        run(context.obj)


steps.add(PIPELINES, app, {"audit": audit_app, "retrain": retrain_app})
for commands in (tools.commands, tracking.commands, proofs.commands, project.commands):
    app.add_typer(commands)
app.add_typer(audit_app, name="audit")
app.add_typer(retrain_app, name="retrain")

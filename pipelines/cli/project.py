"""Commands on a project as a whole: start it, run it through Kubeflow, put it on a page, clean it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from components.common.errors import ConfigError
from pipelines.catalogue import named
from pipelines.cli.options import Context
from pipelines.steps import MAIN, OUTPUTS

commands = typer.Typer(rich_markup_mode=None)


Which = Annotated[str, typer.Option("--pipeline", help="Which one: main or retrain.")]


@commands.command("compile")
def compile_(context: Context, pipeline: Which = "main") -> None:
    """Write the Kubeflow pipeline as IR: pipeline.yaml. The same parameters always give the same bytes.

    Example: retort compile -o kubeflow.image=registry.example/retort@sha256:...
    """
    from pipelines.kubeflow.dag import compile as write

    write(context.obj.params(), Path("pipeline.yaml"), named(pipeline))
    print("pipeline.yaml: upload it to a KFP server, or 'retort submit'")


@commands.command()
def submit(
    context: Context,
    local: Annotated[bool, typer.Option("--local", help="Run here, without Kubernetes.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not follow the run.")] = False,
    again: Annotated[
        str | None, typer.Option("--follow", metavar="RUN", help="Follow a run that was started before.")
    ] = None,
    pipeline: Which = "main",
) -> None:
    """Run the DAG on the KFP server at kubeflow.host, or here with --local (under .retort/kfp/).

    The pipeline is compiled from the file and uploaded once, as a version called COMMIT-DIGEST. Overrides are
    values of the run; those that change pods (kubeflow.image, kubeflow.memory, ray.workers, ...) make another
    version. What cannot work in pods, such as a local folder, is refused before any starts, all at once.

    \b
    A token stands in the file kubeflow.token_file, or in RETORT_KFP_TOKEN; inside a cluster, the pod's own is
    taken. Ctrl-C ends the following, not the run.

    \b
    Examples:
      retort submit --local
      retort submit -o kubeflow.host=http://localhost:8888 -o kubeflow.image=registry.example/retort:1.2
      retort submit -o kubeflow.host=https://kubeflow.example/pipeline -o kubeflow.namespace=ada --no-wait
      retort submit -o student.train.epochs=8        another value, the same version
      retort submit --follow RUN                     its states again, until it ends
      retort submit --pipeline retrain               train again, if there is something new
    """
    which = named(pipeline)
    if sum([local, no_wait, bool(again)]) > 1:
        raise ConfigError("--local, --no-wait and --follow: give one of them")
    if local and which is not MAIN:
        raise ConfigError(f"--local runs the main pipeline; 'retort {pipeline}' runs this one here")
    if local:
        from pipelines.kubeflow.local import submit_local

        with context.obj.working("submit --local") as p:
            submit_local(p)
    elif again:
        from pipelines.kubeflow.client import Server
        from pipelines.kubeflow.follow import follow

        follow(Server(context.obj.params().kubeflow), again)
    else:
        from pipelines.kubeflow.submit import submit as to_server

        to_server(context.obj.params(), context.obj.in_file(), wait=not no_wait, pipeline=which)


@commands.command()
def schedule(
    context: Context,
    cron: Annotated[
        str | None,
        typer.Option(
            metavar="TIMES",
            help="Minute, hour, day, month, day of the week (0 is Sunday); or six fields, seconds first.",
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the schedules of kubeflow.experiment.")] = False,
    pause: Annotated[bool, typer.Option("--pause", help="Let no more runs start.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Let runs start again.")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Take the schedule away; its runs stay.")] = False,
    pipeline: Which = "main",
) -> None:
    """Run a pipeline again and again on the KFP server at kubeflow.host: create or change its one schedule.

    With --pipeline retrain a run ends after two small pods while data and code are as the last one saw them;
    else it trains, and promotes only what is better.

    Times are UTC, unless the server was set up otherwise. Runs that were missed are not made up for, and none
    starts while the one before still runs. Version, overrides and refusals are as with 'retort submit'.

    \b
    Examples:
      retort schedule --cron "30 3 * * 1"                       Mondays at 3:30
      retort schedule --pipeline retrain --cron "30 3 * * 1"    only where there is something new
      retort schedule --cron "0 0 */6 * * *"                    every six hours
      retort schedule --cron "0 4 1 * *" -o global.seed=8       with another value from now on
      retort schedule --list
      retort schedule --pause
    """
    if sum([cron is not None, list_, pause, resume, delete]) != 1:
        raise ConfigError("retort schedule: give one of --cron, --list, --pause, --resume, --delete")
    from pipelines.kubeflow import schedule as schedules

    params, which = context.obj.params(), named(pipeline)
    if cron is not None:
        lines = schedules.schedule(params, context.obj.in_file(), cron, which)
    elif list_:
        lines = schedules.listed(params)
    elif pause:
        lines = schedules.pause(params, which)
    elif resume:
        lines = schedules.resume(params, which)
    else:
        lines = schedules.delete(params, which)
    print("\n".join(lines))


@commands.command()
def report(context: Context) -> None:
    """Put the whole run on one page, outputs/index.html, and its summary on the terminal."""
    from pipelines.report import report as write

    write(context.obj.params(), OUTPUTS)


@commands.command()
def init(
    context: Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")],
    images: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Your images: a folder (class/** or train/class/**), a list file, a manifest.parquet or "
            "s3://bucket/prefix. DIR/images when left out.",
        ),
    ] = None,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            help="A first answer: small images, few epochs, no control; ten minutes for 5,000 images.",
        ),
    ] = False,
    propose: Annotated[
        bool,
        typer.Option("--propose", help="Print values for the images that the project DIR has now, no more."),
    ] = False,
    measure: Annotated[
        bool,
        typer.Option("--measure/--no-measure", help="Measure the networks here; else minutes are a guess."),
    ] = True,
    git: Annotated[
        bool,
        typer.Option(
            "--git/--no-git", help="Make a git repository of DIR, if it is in none: DVC's diffs need one."
        ),
    ] = True,
) -> None:
    """Start with own data: DIR gets a params.yaml that fits the images and this machine, with its reasons.

    \b
    Examples:
      retort init flowers --images ~/photos/flowers           then: cd flowers && dvc repro
      retort init flowers --images ~/photos/flowers --fast    a first answer
      retort init flowers --images train.txt -o data.root=/data/photos
      retort init flowers --images s3://photos/flowers -o data.s3.endpoint_url=http://store.example:9000
      retort init flowers                                     images go into flowers/images, then:
      retort init flowers --propose                           values for them
    """
    from pipelines import init as make

    if propose:
        make.propose_again(folder, fast, measure, context.obj.overrides)
    else:
        make.init(folder, images, fast=fast, measure=measure, git=git, overrides=context.obj.overrides)


@commands.command()
def clean(
    context: Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove what can be remade: outputs, manifests, caches, checkpoints. Tracking and the spool stay."""
    from pipelines.clean import clean as remove

    with context.obj.working("clean") as p:
        remove(p, dry_run=dry_run)

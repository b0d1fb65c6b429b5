"""Commands on a project as a whole: start it, run it through Kubeflow, put it on a page, clean it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.options import Context
from pipelines.steps import OUTPUTS

commands = typer.Typer(rich_markup_mode=None)


@commands.command("compile")
def compile_(context: Context) -> None:
    """Write the Kubeflow pipeline as IR: pipeline.yaml.

    Example: retort compile -o kubeflow.image=registry.example/retort@sha256:...
    """
    from pipelines.kubeflow.dag import compile as write

    write(context.obj.params(), Path("pipeline.yaml"))
    print("pipeline.yaml: upload it to a KFP server, or 'retort submit'")


@commands.command()
def submit(
    context: Context,
    local: Annotated[bool, typer.Option("--local", help="Run here, without Kubernetes.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not follow the run.")] = False,
) -> None:
    """Run the DAG on the KFP server at kubeflow.host, or here with --local (under .retort/kfp/).

    Examples: retort submit --local
              retort submit --no-wait -o kubeflow.host=http://kfp.example
    """
    from pipelines.kubeflow.local import submit_local
    from pipelines.kubeflow.submit import submit as to_server

    if local:
        with context.obj.working("submit --local") as p:
            submit_local(p)
    else:
        to_server(context.obj.params(), wait=not no_wait)


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

"""Commands on what MLflow keeps: runs and registered models."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pipelines.cli.options import Context

commands = typer.Typer(rich_markup_mode=None)


@commands.command()
def promote(
    context: Context, version: Annotated[int, typer.Argument(help="Version of the registered model.")]
) -> None:
    """Make a version of the registered model champion, by a person's decision.

    Example: retort promote 7
    """
    from components.registry.params import RegisterParams
    from components.tools.promote import promote as set_champion

    set_champion(context.obj.params().of(RegisterParams), version)


@commands.command()
def rollback(context: Context) -> None:
    """Make that version champion again which the present champion replaced."""
    from components.registry.params import RegisterParams
    from components.tools.promote import rollback as back

    back(context.obj.params().of(RegisterParams))


@commands.command()
def sync(context: Context) -> None:
    """Send to MLflow what was spooled while it was away; may be repeated."""
    from components.tracking.replay import sync as send

    params = context.obj.params()
    if params.kubeflow.state:  # where pods left what they could not send
        os.environ.setdefault("RETORT_SHARED", params.kubeflow.state)
    if params.data.s3.endpoint_url:
        os.environ.setdefault("AWS_ENDPOINT_URL_S3", params.data.s3.endpoint_url)
    counts = send(params.registry)
    running = f"; {counts['running']} belong to steps that still run" if counts["running"] else ""
    print(f"{counts['sent']} steps sent{running}")


@commands.command()
def ui(
    context: Context,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Where to serve it; the next free one if taken.")
    ] = 5000,
    browser: Annotated[
        bool, typer.Option("--open/--no-browser", help="Open a browser too, or only say the address.")
    ] = False,
) -> None:
    """Open MLflow on this folder's runs and models (registry.tracking_uri), until Ctrl-C.

    A server's address is only said.
    """
    from pipelines.ui import ui as serve

    serve(context.obj.params().registry, port, browser)

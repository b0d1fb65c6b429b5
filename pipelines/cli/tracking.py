"""Commands on what MLflow keeps: runs and registered models."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pipelines.cli.options import Context

commands = typer.Typer(rich_markup_mode=None)


WHY = typer.Option("--why", metavar="TEXT", help="The reason, for the record.")


@commands.command()
def promote(
    context: Context,
    version: Annotated[int, typer.Argument(help="Version of the registered model.")],
    why: Annotated[str, WHY] = "",
) -> None:
    """Make a version of the registered model champion, by a person's decision.

    Example: retort promote 7 --why "asked for by the laboratory"
    """
    from components.registry.params import RegisterParams
    from components.tools.promote import promote as set_champion

    set_champion(context.obj.params().of(RegisterParams), version, why)


@commands.command()
def rollback(context: Context, why: Annotated[str, WHY] = "") -> None:
    """Make that version champion again which the present champion replaced.

    Example: retort rollback --why "blind to the new camera"
    """
    from components.registry.params import RegisterParams
    from components.tools.promote import rollback as back

    back(context.obj.params().of(RegisterParams), why)


@commands.command()
def promotions(
    context: Context,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")] = False,
) -> None:
    """Show the record of promotions: which version was champion from when on, who made it so, and why.

    Example: retort promotions --json
    """
    import json

    from components.registry.params import RegisterParams
    from components.tools.promote import promotions as recorded
    from components.tools.promote import show

    records = recorded(context.obj.params().of(RegisterParams))
    if as_json:
        for record in records:
            print(json.dumps(record))
    else:
        show(records)


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

"""Commands on the chain of proofs: is a model what it says, and can it be made again?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.options import Context, Options

if TYPE_CHECKING:
    from components.common.params import Registry

commands = typer.Typer(rich_markup_mode=None)

Keys = Annotated[
    list[Path] | None,
    typer.Option("--key", help="PEM of a key, or a certificate, that is trusted; may be repeated."),
]


def registry_of(options: Options) -> Registry:
    """The section ``registry`` where there is a params file, or something is said of it; else its defaults.

    Read by itself: nothing else of params.yaml matters to who may be trusted.
    """
    from pipelines.params import build

    if not options.file.exists():
        return build({}, options.overrides, options.file).registry
    return options.params().registry


@commands.command()
def verify(
    context: Context,
    what: Annotated[
        str,
        typer.Argument(metavar="MODEL|VERSION|FOLDER", help="outputs/, a bundle, or a registered version."),
    ] = "outputs",
    key: Keys = None,
) -> None:
    """Check the chain of proofs behind a model, offline: every file, link by link, and the signature.

    From the data's manifest over plan, start weights, teacher, gate, student and ONNX to the benchmark and
    the promotion. Names the first file or link at fault, with exit status 1. With --key, or
    registry.trusted_keys, a bundle must be signed by one of them.

    \b
    Examples: retort verify
              retort verify 7 --key keys/release.pub
              retort verify downloads/model --key keys/ca.pem
    """
    import time

    from components.provenance import bundle, signing
    from components.tools.verify import verify as check

    started = time.perf_counter()
    keys, required, place = list(key or []), bool(key), Path(what)
    if not keys and (bundle.is_bundle(place if place.is_dir() else place.parent) or not place.exists()):
        registry = registry_of(context.obj)
        keys, required = signing.places(registry.trusted_keys), registry.require_signature
        required = required or bool(keys)
    answer = check(what, keys=keys, required=required, registry=lambda: registry_of(context.obj))
    for line in answer.lines:
        print(line)
    for note in answer.notes:
        print(f"note: {note}")
    took = time.perf_counter() - started
    print(f"verified: {answer.what}; {answer.files} files, {len(answer.lines)} links, {took:.1f} s")


@commands.command()
def rebuild(
    context: Context,
    version: Annotated[
        str, typer.Argument(metavar="VERSION", help="Of the registered model: a number, or champion.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where to work, emptied first; .retort/rebuild/VERSION if left out.")
    ] = None,
    root: Annotated[str, typer.Option(help="Where its images lie now; where they lay if left out.")] = "",
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Although other versions of what computes are installed.")
    ] = False,
) -> None:
    """Train a registered version again from itself alone, and compare the student bit by bit.

    Its own code, parameters, plan, manifest and start weights, by their hashes; images are read again where
    they lay, and named where they are not what they were. Nothing is registered. Exit status 1: not the same.

    \b
    Examples: retort rebuild champion
              retort rebuild 7 --root photos
    """
    from components.common.progress import doing
    from components.tools.rebuild import rebuild as again

    registry = registry_of(context.obj)
    with doing("rebuild"):
        result = again(version, registry, out, root=root, anyway=anyway)
    for line in result.same:
        print(f"the same: {line}")
    for note in result.notes:
        print(f"note: {note}")
    print(f"rebuilt: version {version} is what its parts make, bit for bit; {result.folder}")

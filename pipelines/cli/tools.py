"""Commands on networks and images that are no step of a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from components.common.errors import ConfigError, RetortError
from pipelines.cli.options import Context
from pipelines.cli.proofs import Keys, registry_of
from pipelines.steps import MAIN, OUTPUTS

commands = typer.Typer(rich_markup_mode=None)

CLEAN, PLAN = MAIN.path("validate.clean"), MAIN.path("plan.plan/plan.json")
WEIGHTS, TEACHER, STUDENT = (
    MAIN.path(source) for source in ("weights.weights", "finetune.trained", "distill.trained")
)
EXPORT = MAIN.path("export.exported")


@commands.command()
def cost(
    context: Context,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="An architecture, or a trained network's folder.")
    ],
    size: Annotated[int | None, typer.Option(min=1, max=100_000, help="Height and width in pixels.")] = None,
    classes: Annotated[
        int | None, typer.Option(min=1, max=2**31 - 1, help="Outputs; 1000 when left out.")
    ] = None,
    bottleneck: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="Width of a bottleneck head.")
    ] = None,
    acb: Annotated[bool, typer.Option("--acb", help="With ACB blocks, as it trains.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Print every layer, in order.")] = False,
) -> None:
    """Count a network by layer: parameters, FLOPs, memory access, activations, parallel work.

    \b
    Examples: retort cost resnet50d
              retort cost vit_tiny_patch16_224 --size 64 --classes 10 --all
              retort cost resnet50d --classes 100000 --bottleneck 128
              retort cost outputs/student
    """
    from components.tools.cost import report as step

    if context.obj.overrides:  # none is read here, but an unknown key is refused everywhere
        context.obj.params()
    step(
        name,
        size=size,
        classes=classes,
        bottleneck=bottleneck,
        acb=acb,
        everything=everything,
        out=OUTPUTS / "cost",
    )


@commands.command()
def features(
    context: Context,
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="IMAGES...", help="Files, folders, or a manifest.parquet.")
    ] = None,
    model: Annotated[Path, typer.Option(help="Folder of a trained network.")] = STUDENT,
    kind: Annotated[
        str, typer.Option("--from", help="pooled, last, stages (multi-scale), cls or patches.")
    ] = "pooled",
    form: Annotated[
        str, typer.Option("--format", help="parquet, or onnx: the backbone, proved equal to torch.")
    ] = "parquet",
) -> None:
    """Use a trained classifier as a backbone: without its FC layer, as features or as an ONNX file.

    \b
    Examples: retort features data/clean.parquet
              retort features photos --from stages
              retort features photos --model outputs/teacher --from cls
              retort features --from stages --format onnx
    """
    from components.dataset import named
    from components.tools.features import extract as step

    with context.obj.working("features") as p:
        found = named.find(images or [], p.data.root)
        made = step(model, found.read, found.count, kind=kind, form=form, out=OUTPUTS / "features")
    shapes = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in made.shapes.items())
    what = f"{made.rows:,} rows of {shapes}" if form == "parquet" else f"images -> {shapes}"
    print(f"{made.file}: {what}")


@commands.command()
def expand(
    context: Context,
    of: Annotated[
        str, typer.Option(help="Which network, and whose training settings: student or teacher.")
    ] = "student",
    model: Annotated[Path | None, typer.Option(help="Folder of another trained classifier.")] = None,
) -> None:
    """Add the data's new classes to a trained classifier; old ones keep their rows.

    Says and runs what is missing of ingest, validate, weights and audit, or was made for an older manifest;
    new images are read by 'retort ingest'.

    \b
    Examples: retort expand
              retort expand --of teacher -o expand.epochs=4
              retort expand --model champion -o 'expand.old_classes=[cat, dog]'
    """
    from components.tools.expand.expand import expand as step
    from components.tools.params import ExpandParams
    from components.training.params import refuse_kuberay
    from pipelines.upstream import make_plan_up_to_date

    models = {"student": STUDENT, "teacher": TEACHER}
    if of not in models:
        raise ConfigError(f"--of {of}: expected student or teacher")
    with context.obj.working("expand") as p:
        refuse_kuberay(p.ray)
        make_plan_up_to_date(p, "expand")
        step(
            p.of(ExpandParams),
            manifest=CLEAN,
            plan=PLAN,
            model=model or models[of],
            out=OUTPUTS / "expand",
            of=of,
        )


@commands.command("compare-weights")
def compare_weights(
    context: Context,
    seeds: Annotated[
        int | None, typer.Option(help="Finetunes of each; compare_weights.seeds if left out.")
    ] = None,
) -> None:
    """Finetune from several start weights with several seeds: what are they worth on this data?

    \b
    Examples: retort compare-weights
              retort compare-weights --seeds 5 -o compare_weights.epochs=4
              retort compare-weights -o 'compare_weights.candidates={100k: ResNet50_vd_10w_pretrained.tar}'
    """
    from components.common.storage import state_dir
    from components.tools.champion import fetch_champion
    from components.tools.compare_weights.compare_weights import compare_weights as step
    from components.tools.params import CompareWeightsParams
    from components.training.params import refuse_kuberay

    given = [] if seeds is None else [f"compare_weights.seeds={seeds}"]
    with context.obj.overridden(*given).working("compare-weights") as p:
        refuse_kuberay(p.ray)
        champion = fetch_champion(p.registry, state_dir("compare-weights", "champion"))
        step(
            p.of(CompareWeightsParams),
            manifest=CLEAN,
            plan=PLAN,
            champion=champion,
            out=OUTPUTS / "compare-weights",
        )


@commands.command()
def tune(
    context: Context,
    of: Annotated[
        str | None, typer.Option(help="Which network, student or teacher; tune.of if left out.")
    ] = None,
) -> None:
    """Search for a better recipe (rate, decay, smoothing, MixUp, augmentation); seeds decide if it is one.

    Trials are stopped early where they have no promise. Then the best recipe and the fixed one of params.yaml
    are trained with several seeds. Writes outputs/tune/, with best.yaml to copy from.

    \b
    Examples: retort tune
              retort tune --of teacher -o tune.trials=32 -o tune.epochs=8
              retort tune -o 'tune.augment=[standard, strong]' -o tune.weight_decay=[]
    """
    from components.tools.params import TuneParams
    from components.tools.tune.tune import tune as step
    from components.training.params import refuse_kuberay
    from pipelines.upstream import make_plan_up_to_date

    given = [] if of is None else [f"tune.of={of}"]
    with context.obj.overridden(*given).working("tune") as p:
        refuse_kuberay(p.ray)
        make_plan_up_to_date(p, "tune")
        step(p.of(TuneParams), manifest=CLEAN, plan=PLAN, weights=WEIGHTS, out=OUTPUTS / "tune")


@commands.command()
def predict(
    context: Context,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGES...", help="Files, folders, or a manifest.parquet.")
    ],
    model: Annotated[Path, typer.Option(help="A model.onnx, or the folder it lies in.")] = EXPORT,
    threads: Annotated[int, typer.Option(help="Of ONNX Runtime; 0: one a processor.")] = 0,
    key: Keys = None,
) -> None:
    """Classify images by an exported model; needs no params.yaml, but for a manifest's data.root.

    With --key, or registry.require_signature, only by a bundle that a trusted key signed.

    Writes outputs/predict/predictions.csv and .parquet. Images that cannot be read are named, and listed
    there with the reason; the exit status is 1 only when none can be read. Paths are written as in a
    manifest: a name that is no UTF-8 percent-encoded. In the CSV, text that a spreadsheet would compute has
    an ' in front.

    \b
    Examples: retort predict photos/new
              retort predict cat.jpg --model outputs/export/teacher
              retort predict data/clean.parquet
              retort predict cat.jpg --model downloads/model --key keys/release.pub
    """
    from components.common.progress import counted
    from components.tools.predict import predict as classify

    registry = registry_of(context.obj)
    if key or registry.require_signature:
        from components.tools.verify import require

        require(model, registry, key or [])
    listed = OUTPUTS / "predict" / "predictions.csv"
    root = context.obj.params().data.root if any(place.suffix == ".parquet" for place in images) else ""
    found = classify(model, images, root=root, out=OUTPUTS / "predict", threads=threads)
    for prediction in found[:20]:
        said = prediction.error or f"{prediction.class_name}  {prediction.score:.3f}"
        print(f"{prediction.path}  {said}")
    if all(prediction.error for prediction in found):
        raise RetortError(f"{counted(len(found), 'image')}, and none can be read; {listed} says why")
    more = f", of which {len(found) - 20:,} are not shown" if len(found) > 20 else ""
    print(f"{counted(len(found), 'image')}{more}: {listed}")


@commands.command()
def shadow(
    context: Context,
    requests: Annotated[
        list[str],
        typer.Argument(metavar="REQUESTS...", help="A folder, a Parquet of bytes, s3://bucket/prefix."),
    ],
    champion: Annotated[str, typer.Option(help="An alias, a version, or an exported folder.")] = "champion",
    challenger: Annotated[str, typer.Option(help="The same, of what may follow.")] = "challenger",
    column: Annotated[str, typer.Option(help="Of Parquet, that holds the bytes; the only one.")] = "",
    threads: Annotated[int, typer.Option(min=0, help="Of ONNX Runtime; 0: one a processor.")] = 0,
) -> None:
    """Replay recorded requests through champion and challenger: which answers would change?

    Writes outputs/shadow/: a page with every kind of change and pictures, answers.parquet with a row a
    request, changed.csv. Also compares what serving feeds a model with what training did, and the latency.
    An interrupted run goes on where it was.

    \b
    Examples: retort shadow recorded
              retort shadow s3://bucket/requests/2026-11-20 --challenger 7
              retort shadow requests.parquet --champion outputs/export --challenger outputs/export/teacher
    """
    from components.tools.params import ShadowParams
    from components.tools.shadow.shadow import shadow as replay

    with context.obj.working("shadow") as p:
        found = replay(
            p.of(ShadowParams), requests, champion=champion, challenger=challenger, column=column,
            threads=threads, out=OUTPUTS / "shadow",
        )  # fmt: skip
    malformed = f", {found['malformed']:,} malformed" if found["malformed"] else ""
    print(
        f"{found['requests']:,} requests{malformed}: {found['agreement']:.2%} agree, {found['changed']:,} "
        f"answers change: {OUTPUTS / 'shadow' / 'report.html'}"
    )


@commands.command()
def shard(context: Context) -> None:
    """Put the images of clean.parquet into shards of 256 MB below ray.storage, for several machines.

    Training reads them there when they are complete. Tar archives as WebDataset keeps them, images as they
    are; a second call goes on from where the first was interrupted.

    Example: retort shard -o ray.storage=s3://bucket/retort
    """
    from components.training.inputs.shards import shard as write
    from components.training.params import ShardParams

    with context.obj.working("shard") as p:
        write(p.of(ShardParams), manifest=CLEAN)

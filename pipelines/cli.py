"""The command line: every word a person can say, each a call of one step function.

Imports stand inside the commands: ``retort --help`` answers at once, and a step loads only what it needs.
"""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from components.common import signals
from components.common.environment import collect_less_often
from components.common.errors import ConfigError, RetortError, Terminated
from components.common.progress import doing
from components.common.storage import disk_full

if TYPE_CHECKING:
    from pipelines.params import Params

# Where each step leaves its files: the contract's paths, relative to the project's folder.
DATA = Path("data")
MANIFEST, CLEAN, QUARANTINE = DATA / "manifest.parquet", DATA / "clean.parquet", DATA / "quarantine.parquet"
OUTPUTS = Path("outputs")
WEIGHTS, AUDIT, PLAN = OUTPUTS / "weights", OUTPUTS / "audit", OUTPUTS / "audit" / "plan.json"
TEACHER, CHECK, STUDENT = OUTPUTS / "teacher", OUTPUTS / "check", OUTPUTS / "student"
NEXT_TO_NOTHING = 1 << 20  # bytes free on a disk that work failed on
EXPORT, BENCHMARK = OUTPUTS / "export", OUTPUTS / "benchmark"

# commands that take long before their step begins: what they load is named, from so many seconds on
LONG = {
    "ingest", "validate", "weights", "audit", "plan", "finetune", "check", "distill", "export", "benchmark",
    "register", "expand", "shard", "predict", "features", "compare-weights", "tune", "cost",
}  # fmt: skip
IMPORT_SECONDS = 4.0

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
app.add_typer(audit_app, name="audit")


class Options:
    """The global options, taken off the command line before the command is parsed."""

    params = Path("params.yaml")
    overrides: list[str] = []  # noqa: RUF012 - set once, by main
    debug = False


def params() -> Params:
    """The parameters of this call: the file, with the overrides applied."""
    from pipelines.params import load

    return load(Options.params, Options.overrides)


@contextmanager
def working(command: str) -> Iterator[Params]:
    """Parameters first (exit status 2 comes before any work), then the lock of this folder."""
    from components.common.storage import project_lock

    loaded = params()
    with project_lock(command):
        yield loaded


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
) -> None:
    """Print the help when no command is given."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def ingest() -> None:
    """Read data.source into data/manifest.parquet.

    Example: retort ingest -o data.source=photos -o data.root=photos
    """
    with working("ingest") as p:
        _ingest(p)


@app.command()
def validate() -> None:
    """Check every image and row; write clean.parquet, quarantine.parquet and Data Docs."""
    with working("validate") as p:
        _validate(p)


@app.command()
def weights() -> None:
    """Fetch, convert and prove the weights that teacher and student start from."""
    with working("weights") as p:
        _weights(p)


@audit_app.callback()
def audit(context: typer.Context) -> None:
    """Audit the clean data: imbalance, synthetic images, and the plan for training (all three in turn)."""
    if context.invoked_subcommand is None:
        with working("audit") as p:
            _audit_imbalance(p)
            _audit_synthetic(p)
            _plan(p)


@audit_app.command("imbalance")
def audit_imbalance() -> None:
    """Measure the imbalance of classes; propose sampling and loss."""
    with working("audit imbalance") as p:
        _audit_imbalance(p)


@audit_app.command("synthetic")
def audit_synthetic() -> None:
    """Measure whether synthetic images help, harm or flood; list suspect labels by file."""
    with working("audit synthetic") as p:
        _audit_synthetic(p)


@app.command()
def plan() -> None:
    """Merge what the audits found into outputs/audit/plan.json, which training carries out."""
    with working("plan") as p:
        _plan(p)


def _ingest(p: Params) -> None:
    from components.dataset.ingest import ingest as step
    from components.dataset.params import IngestParams

    step(p.of(IngestParams), manifest=MANIFEST, out=OUTPUTS / "ingest")


def _validate(p: Params) -> None:
    from components.dataset.params import ValidateParams
    from components.dataset.validate import validate as step

    out = OUTPUTS / "validate"
    step(p.of(ValidateParams), manifest=MANIFEST, clean=CLEAN, quarantine=QUARANTINE, out=out)


def _weights(p: Params) -> None:
    from components.weights.params import WeightsParams
    from components.weights.weights import weights as step

    step(p.of(WeightsParams), out=WEIGHTS)


def _audit_imbalance(p: Params) -> None:
    from components.audit.imbalance import audit_imbalance as step
    from components.audit.params import AuditParams

    step(p.of(AuditParams), manifest=CLEAN, out=AUDIT / "imbalance")


def _audit_synthetic(p: Params) -> None:
    from components.audit.params import AuditParams
    from components.audit.synthetic import audit_synthetic as step

    step(p.of(AuditParams), manifest=CLEAN, features=WEIGHTS / "features.onnx", out=AUDIT / "synthetic")


def _plan(p: Params) -> None:
    from components.audit.params import AuditParams
    from components.audit.plan import plan as step

    step(p.of(AuditParams), imbalance=AUDIT / "imbalance", synthetic=AUDIT / "synthetic", out=AUDIT)


def _up_to_date(p: Params, command: str) -> None:
    """Run what stands before the plan and is missing, or was made for another manifest than there is now.

    Whether the source itself has changed is not looked at: that takes reading it.
    """
    from components.audit.plan_schema import read_plan
    from components.common.findings import read_report
    from components.common.progress import say
    from components.common.storage import sha256_file

    def run(name: str, why: str, *steps: Callable[[Params], None]) -> None:
        say(f"{command}: {why}: 'retort {name}' runs first")
        for each in steps:
            each(p)

    if not CLEAN.exists() and not MANIFEST.exists():
        run("ingest", f"{MANIFEST} is missing", _ingest)
    report = OUTPUTS / "validate" / "report.json"
    if not CLEAN.exists():
        run("validate", f"{CLEAN} is missing", _validate)
    elif (
        MANIFEST.exists()
        and report.exists()
        and read_report(report).inputs.get(str(MANIFEST)) != sha256_file(MANIFEST)
    ):
        run("validate", f"{MANIFEST} is newer than {CLEAN}", _validate)
    why = ""
    if not PLAN.exists():
        why = "is missing"
    elif read_plan(PLAN).manifest not in ("", sha256_file(CLEAN)):  # empty: a person wrote it for this data
        why = "was made for other data"
    if why:
        if not (WEIGHTS / "features.onnx").exists():
            run("weights", f"{WEIGHTS / 'features.onnx'} is missing", _weights)
        run("audit", f"{PLAN} {why}", _audit_imbalance, _audit_synthetic, _plan)


@app.command()
def finetune() -> None:
    """Finetune the teacher on Ray Train, following the plan."""
    from components.training.finetune import finetune as step
    from components.training.params import FinetuneParams

    with working("finetune") as p:
        step(p.of(FinetuneParams), manifest=CLEAN, plan=PLAN, weights=WEIGHTS, out=TEACHER)


@app.command()
def check() -> None:
    """The gate before distillation: teacher, start weights, rate; then the student without a teacher."""
    from components.training.check import check as step
    from components.training.params import CheckParams

    with working("check") as p:
        step(p.of(CheckParams), manifest=CLEAN, plan=PLAN, teacher=TEACHER, weights=WEIGHTS, out=CHECK)


@app.command()
def distill() -> None:
    """Distil the teacher into the student on Ray Train, and keep the better network; needs a passed check."""
    from components.training.distill import distill as step
    from components.training.params import DistillParams

    with working("distill") as p:
        step(
            p.of(DistillParams),
            manifest=CLEAN,
            plan=PLAN,
            teacher=TEACHER,
            weights=WEIGHTS,
            check=CHECK,
            out=STUDENT,
        )


@app.command()
def export(
    of: Annotated[str, typer.Option(help="Which model: student or teacher.")] = "student",
) -> None:
    """Export to ONNX and prove that the file equals the trained network.

    Example: retort export --of teacher
    """
    from components.export.export import export as step
    from components.export.params import ExportParams

    models = {"student": (STUDENT, EXPORT), "teacher": (TEACHER, EXPORT / "teacher")}
    if of not in models:
        raise ConfigError(f"--of {of}: expected student or teacher")
    model, out = models[of]
    with working("export") as p:
        step(p.of(ExportParams), manifest=CLEAN, model=model, out=out)


@app.command()
def benchmark() -> None:
    """Measure the exported models on this machine and recommend one configuration."""
    from components.benchmark.benchmark import benchmark as step
    from components.benchmark.params import BenchmarkParams

    with working("benchmark") as p:
        exports = {"student": EXPORT, "teacher": EXPORT / "teacher"}
        step(p.of(BenchmarkParams), manifest=CLEAN, exports=exports, out=BENCHMARK)


@app.command()
def register() -> None:
    """Register the student in MLflow, as champion when it is better, else as challenger."""
    from components.registry.params import RegisterParams
    from components.registry.register import register as step

    with working("register") as p:
        step(
            p.of(RegisterParams),
            manifest=CLEAN,
            student=STUDENT,
            exported=EXPORT,
            benchmark=BENCHMARK,
            check=CHECK,
            plan=PLAN,
            out=OUTPUTS / "register",
        )


@app.command()
def cost(
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

    if Options.overrides:  # none is read here, but an unknown key is refused everywhere
        params()
    step(
        name,
        size=size,
        classes=classes,
        bottleneck=bottleneck,
        acb=acb,
        everything=everything,
        out=OUTPUTS / "cost",
    )


@app.command()
def features(
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

    with working("features") as p:
        found = named.find(images or [], p.data.root)
        made = step(model, found.read, found.count, kind=kind, form=form, out=OUTPUTS / "features")
    shapes = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in made.shapes.items())
    what = f"{made.rows:,} rows of {shapes}" if form == "parquet" else f"images -> {shapes}"
    print(f"{made.file}: {what}")


@app.command()
def expand(
    of: Annotated[
        str, typer.Option(help="Which network, and whose training settings: student or teacher.")
    ] = ("student"),
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
    from components.tools.expand import expand as step
    from components.tools.params import ExpandParams

    models = {"student": STUDENT, "teacher": TEACHER}
    if of not in models:
        raise ConfigError(f"--of {of}: expected student or teacher")
    with working("expand") as p:
        _up_to_date(p, "expand")
        step(
            p.of(ExpandParams),
            manifest=CLEAN,
            plan=PLAN,
            model=model or models[of],
            out=OUTPUTS / "expand",
            of=of,
        )


@app.command("compare-weights")
def compare_weights(
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
    from components.tools.compare_weights import compare_weights as step
    from components.tools.params import CompareWeightsParams

    if seeds is not None:
        Options.overrides = [*Options.overrides, f"compare_weights.seeds={seeds}"]
    with working("compare-weights") as p:
        champion = fetch_champion(p.registry, state_dir("compare-weights", "champion"))
        step(
            p.of(CompareWeightsParams),
            manifest=CLEAN,
            plan=PLAN,
            champion=champion,
            out=OUTPUTS / "compare-weights",
        )


@app.command()
def tune(
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
    from components.tools.tune import tune as step

    if of is not None:
        Options.overrides = [*Options.overrides, f"tune.of={of}"]
    with working("tune") as p:
        _up_to_date(p, "tune")
        step(p.of(TuneParams), manifest=CLEAN, plan=PLAN, weights=WEIGHTS, out=OUTPUTS / "tune")


@app.command()
def predict(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGES...", help="Files, folders, or a manifest.parquet.")
    ],
    model: Annotated[Path, typer.Option(help="A model.onnx, or the folder it lies in.")] = EXPORT,
    threads: Annotated[int, typer.Option(help="Of ONNX Runtime; 0: one a processor.")] = 0,
) -> None:
    """Classify images by an exported model; needs no params.yaml, but for a manifest's data.root.

    Writes outputs/predict/predictions.csv and .parquet. Images that cannot be read are named, and listed
    there with the reason; the exit status is 1 only when none can be read. Paths are written as in a
    manifest: a name that is no UTF-8 percent-encoded. In the CSV, text that a spreadsheet would compute has
    an ' in front.

    \b
    Examples: retort predict photos/new
              retort predict cat.jpg --model outputs/export/teacher
              retort predict data/clean.parquet
    """
    from components.common.progress import counted
    from components.tools.predict import predict as classify

    listed = OUTPUTS / "predict" / "predictions.csv"
    root = params().data.root if any(place.suffix == ".parquet" for place in images) else ""
    found = classify(model, images, root=root, out=OUTPUTS / "predict", threads=threads)
    for prediction in found[:20]:
        said = prediction.error or f"{prediction.class_name}  {prediction.score:.3f}"
        print(f"{prediction.path}  {said}")
    if all(prediction.error for prediction in found):
        raise RetortError(f"{counted(len(found), 'image')}, and none can be read; {listed} says why")
    more = f", of which {len(found) - 20:,} are not shown" if len(found) > 20 else ""
    print(f"{counted(len(found), 'image')}{more}: {listed}")


@app.command()
def shard() -> None:
    """Put the images of clean.parquet into shards of 256 MB below ray.storage, for several machines.

    Training reads them there when they are complete. Tar archives as WebDataset keeps them, images as they
    are; a second call goes on from where the first was interrupted.

    Example: retort shard -o ray.storage=s3://bucket/retort
    """
    from components.training.inputs.shards import shard as write
    from components.training.params import ShardParams

    with working("shard") as p:
        write(p.of(ShardParams), manifest=CLEAN)


@app.command()
def promote(version: Annotated[int, typer.Argument(help="Version of the registered model.")]) -> None:
    """Make a version of the registered model champion, by a person's decision.

    Example: retort promote 7
    """
    from components.registry.params import RegisterParams
    from components.tools.promote import promote as crown

    crown(params().of(RegisterParams), version)


@app.command()
def rollback() -> None:
    """Make that version champion again which the present champion replaced."""
    from components.registry.params import RegisterParams
    from components.tools.promote import rollback as back

    back(params().of(RegisterParams))


@app.command()
def sync() -> None:
    """Send to MLflow what was spooled while it was away; may be repeated."""
    from components.tracking.replay import sync as send

    counts = send(params().registry)
    running = f"; {counts['running']} belong to steps that still run" if counts["running"] else ""
    print(f"{counts['sent']} steps sent{running}")


@app.command()
def ui(
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

    serve(params().registry, port, browser)


@app.command("compile")
def compile_() -> None:
    """Write the Kubeflow pipeline as IR: pipeline.yaml.

    Example: retort compile -o kubeflow.image=registry.example/retort@sha256:...
    """
    from pipelines.dag import compile as write

    write(params(), Path("pipeline.yaml"))
    print("pipeline.yaml: upload it to a KFP server, or 'retort submit'")


@app.command()
def submit(
    local: Annotated[bool, typer.Option("--local", help="Run here, without Kubernetes.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not follow the run.")] = False,
) -> None:
    """Run the DAG on the KFP server at kubeflow.host, or here with --local (under .retort/kfp/).

    Examples: retort submit --local
              retort submit --no-wait -o kubeflow.host=http://kfp.example
    """
    from pipelines.submit import submit as to_server
    from pipelines.submit import submit_local

    if local:
        with working("submit --local") as p:
            submit_local(p)
    else:
        to_server(params(), wait=not no_wait)


@app.command()
def report() -> None:
    """Put the whole run on one page, outputs/index.html, and its summary on the terminal."""
    from pipelines.report import report as write

    write(params(), OUTPUTS)


@app.command()
def init(
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
        make.propose_again(folder, fast, measure, Options.overrides)
    else:
        make.init(folder, images, fast=fast, measure=measure, git=git, overrides=Options.overrides)


@app.command()
def clean(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove what can be remade: outputs, manifests, caches, checkpoints. Tracking and the spool stay."""
    from pipelines.clean import clean as remove

    with working("clean") as p:
        remove(p, dry_run=dry_run)


def _take_global_options(arguments: list[str]) -> list[str]:
    """Set ``Options`` from --params, -o and --debug wherever they stand; return the rest."""
    rest: list[str] = []
    overrides: list[str] = []
    items = iter(arguments)
    for item in items:
        if item == "--":
            rest += [item, *items]
        elif item in ("-o", "--params"):
            value = next(items, None)
            if value is None:
                raise ConfigError(f"{item}: a value is missing, such as -o global.seed=1")
            if item == "-o":
                overrides.append(value)
            else:
                Options.params = Path(value)
        elif item.startswith("--params="):
            Options.params = Path(item.removeprefix("--params="))
        elif item.startswith("-o") and "=" in item and not item.startswith("--"):
            overrides.append(item.removeprefix("-o"))
        elif item == "--debug":
            Options.debug = True
        else:
            rest.append(item)
    Options.overrides = overrides
    return rest


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``retort``: runs one command and exits with the contract's status."""
    collect_less_often()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a name that the terminal's encoding lacks must stop no work
            stream.reconfigure(errors="backslashreplace")
    status = run(sys.argv[1:] if arguments is None else arguments)
    # the process ends: what is left need not be looked through once more (DuckDB calls that a leak, aloud)
    if "duckdb" not in sys.modules:
        gc.freeze()
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Run one command; returns the exit status, after one or two lines on standard error if it failed."""
    signals.catch()
    try:
        rest = _take_global_options(arguments)
        with doing(rest[0], "loading", IMPORT_SECONDS) if rest and rest[0] in LONG else nullcontext():
            result: Any = app(args=rest, prog_name="retort", standalone_mode=False)
        if result == 130:  # what Typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, Terminated, typer.Abort) as error:
        return _stopped(error)
    except TyperException as error:  # an unknown command or option, or a wrong value
        command = getattr(getattr(error, "ctx", None), "command_path", "retort")
        return _failed(f"{error.format_message()} (see '{command} --help')", 2)
    except RetortError as error:
        return _failed(str(error), error.status)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _failed(_explain(error), 1)
    except Exception as error:  # noqa: BLE001 - the last resort: an error of ours, without a traceback
        stopped = signals.stopped_by(error)
        if stopped is not None:  # a library made something else of what the handler raised
            return _stopped(stopped)
        if disk_full(error) or _full_folder() is not None:  # torch's writer, for one, gives no reason
            return _failed(_full(""), 1)
        said = next(iter(str(error).splitlines()), "")
        return _failed(f"internal error: {type(error).__name__}: {said} (--debug shows where)", 1)


def _stopped(error: BaseException) -> int:
    word, status = ("terminated", 143) if isinstance(error, Terminated) else ("interrupted", 130)
    return _failed(f"{word}; the next run goes on from what was finished", status)


def _full(where: str) -> str:
    full = _full_folder()
    named = f" ({full.absolute()} lies on it)" if full is not None and not where else ""
    return (
        f"{where}the disk is full{named}; nothing half-written was left. Free some space "
        "('retort clean' removes what can be remade) and run again"
    )


def _full_folder() -> Path | None:
    """The folder that commands write to whose disk has next to nothing left, if there is one."""
    import shutil
    import tempfile

    state = Path(os.environ.get("RETORT_STATE", ".retort"))
    folders = [
        place for place in (state, OUTPUTS, DATA, Path(), Path(tempfile.gettempdir())) if place.is_dir()
    ]
    return next((place for place in folders if shutil.disk_usage(place).free < NEXT_TO_NOTHING), None)


def _explain(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if disk_full(error):
        return _full(where)
    return f"{where}{(error.strerror or str(error)).lower()}"


def _failed(message: str, status: int) -> int:
    if Options.debug and sys.exc_info()[0] is not None:
        import traceback

        traceback.print_exc()
    lines = message.strip().splitlines() or ["failed"]
    print("\n".join([f"retort: {lines[0]}", *(f"  {line}" for line in lines[1:])]), file=sys.stderr)
    return status


if __name__ == "__main__":
    main()

"""A pipeline with a step more, of no use, which is used twice; a step that draws, and one that is killed."""

from dataclasses import replace
from pathlib import Path

from kfp import dsl

from components.common.params import StepParams
from components.common.storage import write_json
from components.dataset.params import IngestParams
from components.step import name_of
from components.step import step as framed
from pipelines.kubeflow import components
from pipelines.steps import MAIN, Pipeline, Stage, Step


def count_bytes(params: StepParams, *, manifest: Path, out: Path, of: str) -> None:
    """A step of no use: how long the manifest is."""
    with framed("count", params, out, [manifest]) as run:
        run.add_finding("validate.rows", "info", "rows", f"{of}: {len(manifest.read_bytes())} bytes")


COUNT = Step(
    name="count",
    function=f"{__name__}:count_bytes",
    parameters="components.common.params:StepParams",
    takes={"manifest": "manifest", "out": "counted"},
    option="of",
    option_help="What is counted.",
    help="Count the bytes of the clean manifest.",
)
LONGER = replace(
    MAIN,
    name="longer",
    stages=(
        *MAIN.stages,
        Stage(
            COUNT,
            "Count",
            inputs={"manifest": "validate.clean"},
            outputs={"counted": "outputs/count"},
            option="all",
        ),
        Stage(
            COUNT,
            "Count again",
            inputs={"manifest": "validate.clean"},
            outputs={"counted": "outputs/again"},
            option="twice",
            own_name="again",
        ),
    ),
)


@dsl.component(base_image="retort", install_kfp_package=False)
def count(
    of: str,
    general: dict,
    checks: dict,
    manifest: dsl.Input[dsl.Dataset],
    counted: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Count the bytes of the clean manifest."""
    from pipelines.kubeflow.adapter import run

    run("count", locals())


def draw(params: IngestParams, *, out: Path) -> None:
    """Leaves what it was told, as a trained network leaves its metrics."""
    out.mkdir(exist_ok=True)
    seen = (params.general.seed, params.registry.name, params.data.root, name_of(out / "seen.txt"))
    (out / "seen.txt").write_text(" ".join(map(str, seen)))
    (out / "report.html").write_text("page")
    write_json(out / "metrics.json", {"val": {"top1": 0.5, "confusion": []}, "seconds": 3})


DRAWN = Step(
    name="drawn",
    function=f"{__name__}:draw",
    parameters="components.dataset.params:IngestParams",
    takes={"out": "drawn"},
    help="Draw.",
)
DRAWING = Pipeline(
    name="drawing",
    description="Images.",
    result="drawn.drawn",
    stages=(Stage(DRAWN, "Draw", inputs={}, outputs={"drawn": "outputs/drawn"}),),
)


@dsl.component(base_image="retort", install_kfp_package=False)
def dying() -> None:
    """Be killed."""
    from tests.pipelines.killed import die

    die()


@dsl.pipeline
def doomed():
    """A step that is killed, and after it the task that closes the run."""
    with dsl.ExitHandler(components.close_run()):
        dying()

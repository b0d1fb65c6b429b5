"""The second pipeline of the table: training again when there is something new, from the champion.

It shares the steps of the main one up to the plan, and from the export on. Its first stages decide: where the
last retraining saw the same, or validation leaves nothing new, the rest does not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from pipelines.steps import MAIN, Pipeline, Stage, Step

if TYPE_CHECKING:
    from pipelines.params import Params

PLACE = "outputs/retrain"  # what is not the main pipeline's own lies below it
BESIDE = (
    "finetune",
    "check",
    "distill",
)  # the run from the start weights, beside the champion that learns on
CHANGES, DECIDE, UPDATE = "retrain-changes", "retrain-decide", "retrain-update"  # the first two may end it


def _shared(name: str, when: str = "", inputs: Mapping[str, str] | None = None, place: str = "") -> Stage:
    """A stage as the main pipeline has it, of other inputs, or kept elsewhere."""
    stage = MAIN[name]
    outputs = stage.outputs if not place else dict.fromkeys(stage.outputs, place)
    return replace(stage, when=when, inputs=stage.inputs if inputs is None else inputs, outputs=outputs)


def _never(params: Params) -> bool:
    return params.retrain.from_original == "never"


def _beside(name: str) -> Stage:
    """A stage of the run from the start weights, beside the champion that learns on."""
    return replace(_shared(name, DECIDE), left_out=_never)


RETRAIN = Pipeline(
    name="retrain",
    description="Train again when data or code have changed, from the champion; promote what is better.",
    result="retrain-choose.chosen",
    stages=(
        _shared("ingest"),
        Stage(
            Step(
                name=CHANGES,
                group="retrain",
                function="components.retraining.changes:changes",
                parameters="components.retraining.params:ChangesParams",
                takes={"manifest": "manifest", "out": "out"},
                free=("registry", "report"),
                pod="light",
                decides=True,
                cached=lambda params: False,  # the registry says what was seen
                help="Is there anything that the last retraining did not see? Reads no image.",
            ),
            title="Anything new?",
            inputs={"manifest": "ingest.manifest"},
            outputs={"out": f"{PLACE}/changes"},
        ),
        _shared("validate", CHANGES),
        Stage(
            Step(
                name=DECIDE,
                group="retrain",
                function="components.retraining.decide:decide",
                parameters="components.retraining.params:DecideParams",
                takes={"manifest": "manifest", "changes": "changes", "champion": "champion", "out": "out"},
                free=("registry", "report"),
                decides=True,
                cached=lambda params: False,
                help="Compare the clean data with the champion's: classes, counts, looks and labels.",
            ),
            title="Worth a training?",
            when=CHANGES,
            inputs={"manifest": "validate.clean", "changes": f"{CHANGES}.out"},
            outputs={"out": f"{PLACE}/decide", "champion": f"{PLACE}/champion"},
        ),
        _shared("weights", DECIDE),
        _shared("audit-imbalance", DECIDE),
        _shared("audit-synthetic", DECIDE),
        _shared("plan", DECIDE),
        Stage(
            Step(
                name=UPDATE,
                group="retrain",
                function="components.retraining.update:update",
                parameters="components.retraining.params:UpdateParams",
                takes={
                    "manifest": "manifest",
                    "plan": "plan/plan.json",
                    "decided": "decided",
                    "champion": "champion",
                    "out": "trained",
                },
                pod="training",
                help="Train the champion on, on old and new images; its head grows for new classes.",
            ),
            title="The champion learns on",
            when=DECIDE,
            inputs={
                "manifest": "validate.clean",
                "plan": "plan.plan",
                "decided": f"{DECIDE}.out",
                "champion": f"{DECIDE}.champion",
            },
            outputs={"trained": f"{PLACE}/updated"},
        ),
        *map(_beside, BESIDE),
        Stage(
            Step(
                name="retrain-choose",
                group="retrain",
                function="components.retraining.choose:choose",
                parameters="components.common.params:StepParams",
                takes={
                    "manifest": "manifest",
                    "plan": "plan/plan.json",
                    "updated": "updated",
                    "distilled": "distilled",
                    "passed": "passed",
                    "clean": "clean",
                    "out": "chosen",
                },
                optional=("distilled", "passed"),
                help="Of what was trained, keep the better network by validation.",
            ),
            title="The better of them",
            when=DECIDE,
            inputs={
                "manifest": "validate.clean",
                "plan": "plan.plan",
                "updated": f"{UPDATE}.trained",
                "distilled": "distill.trained",
                "passed": "check.passed",
            },
            outputs={"chosen": f"{PLACE}/chosen", "clean": "data/retrained.parquet"},
        ),
        _shared(
            "export",
            DECIDE,
            inputs={"manifest": "retrain-choose.clean", "model": "retrain-choose.chosen"},
            place=f"{PLACE}/export",
        ),
        Stage(
            replace(
                MAIN["benchmark"].step,
                name="retrain-benchmark",
                group="retrain",
                takes={"manifest": "manifest", "exports": {"student": "student"}, "out": "measured"},
                help="Measure the exported network on this machine, without a teacher beside it.",
            ),
            title="Benchmark",
            when=DECIDE,
            inputs={"manifest": "retrain-choose.clean", "student": "export.exported"},
            outputs={"measured": f"{PLACE}/benchmark"},
        ),
        _shared(
            "register",
            DECIDE,
            inputs={
                "manifest": "retrain-choose.clean",
                "student": "retrain-choose.chosen",
                "exported": "export.exported",
                "measured": "retrain-benchmark.measured",
                "passed": "retrain-choose.chosen",
                "plan": "retrain-choose.chosen",
                "listed": "audit-synthetic.part",
            },
            place=f"{PLACE}/register",
        ),
        Stage(
            Step(
                name="retrain-record",
                group="retrain",
                function="components.retraining.record:record",
                parameters="components.common.params:StepParams",
                takes={
                    "decided": "decided",
                    "chosen": "chosen",
                    "registered": "registered",
                    "out": "out",
                },
                pod="light",
                cached=lambda params: False,
                help="Remember what was seen, and put what came of it on one page.",
            ),
            title="What came of it",
            when=DECIDE,
            inputs={
                "decided": f"{DECIDE}.out",
                "chosen": "retrain-choose.chosen",
                "registered": "register.registered",
            },
            outputs={"out": f"{PLACE}/record"},
        ),
    ),
)

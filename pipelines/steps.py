"""The table of steps: what each is called, which function does it, what it reads, and what it leaves where.

A *step* is a function and how it is called. A *stage* is one use of it in a pipeline: it says from which
stages the inputs come, and where DVC keeps the outputs. The command line, the report, the Kubeflow pipeline
and the tests of ``dvc.yaml`` read this table; components know none of these paths.

Functions and parameter classes stand here by their import paths: ``retort --help`` loads none of them.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from components.common.params import StepParams
    from pipelines.params import Params

DATA, OUTPUTS = Path("data"), Path("outputs")  # what steps leave lies in these two
DECISION = "decision.json"  # of a step that decides: whether stages that wait for it run ('go_on')
GO_ON = "yes"  # as Kubeflow is told it
RETRIES = 2  # of steps that fetch from other servers, or write to them
ELSEWHERE = ("data", "registry", "report")  # where images lie, who tracks, whether pages show images
WORK = {"ray": "ray.workers"}  # the only key of that section that can change a product

Takes = str | Mapping[str, str]


@dataclass(frozen=True)
class Step:
    """A function, and how it is called.

    Attributes:
        name: of the Kubeflow component; of the command, too, but for the group in front.
        function: import path of the function.
        parameters: import path of its parameter class, whose fields are the sections that it reads.
        takes: the function's arguments that are paths, each with the name of the input or output that it
            gets. 'plan/plan.json' is a file in the folder ``plan``; a mapping is handed over as a mapping.
        help: what the command line says about it.
        free: sections that it reads and that cannot change what it leaves: DVC does not track them.
        files: keys of params.yaml that may name files of a person's own (``pipelines.named``).
        group: of commands, to which this one belongs: ``retort audit imbalance``.
        option: the argument by which its uses differ ('of'), or none.
        option_help: what the command line says about that argument.
        pod: what it needs on a cluster: 'light' is an image without torch, 'training' has Ray's workers.
        cached: whether the same inputs give the same outputs tomorrow.
        decides: whether it leaves decision.json in its folder, by which later stages run or do not.
        optional: inputs that may be missing: what would make them may be left out of the pipeline.
        cpus: that its pod needs in any case. A training pod's follow from its workers.
        workers: whether a training pod starts them, and so needs their processors and GPUs.
        retries: how often Kubeflow tries again; only what talks to another server can go better then.
    """

    name: str
    function: str
    parameters: str
    takes: Mapping[str, Takes]
    help: str
    free: tuple[str, ...] = ELSEWHERE
    files: tuple[str, ...] = ()
    group: str = ""
    option: str = ""
    option_help: str = ""
    pod: Literal["light", "full", "training"] = "full"
    cached: Callable[[Params], bool] = lambda params: True
    decides: bool = False
    optional: tuple[str, ...] = ()
    cpus: Callable[[Params], int] = lambda params: 1
    workers: Callable[[Params], bool] = lambda params: True
    retries: int = 0

    @property
    def command(self) -> str:
        """What a person says after ``retort``."""
        return f"{self.group} {self.name.removeprefix(f'{self.group}-')}" if self.group else self.name

    def kind(self) -> type[StepParams]:
        """The parameter class."""
        kind: type[StepParams] = pkgutil.resolve_name(self.parameters)
        return kind

    def sections(self) -> dict[str, str]:
        """Name in params.yaml of each section that the step reads, by the field's name."""
        return {name: field.alias or name for name, field in self.kind().model_fields.items()}

    def tracked(self) -> set[str]:
        """The keys of params.yaml that can change what the step leaves."""
        return {WORK.get(name, name) for name in self.sections().values() if name not in self.free}

    def given(self) -> set[str]:
        """The sections, by field, that a task on Kubeflow gets as parameters of the run, or one key of them.

        They are part of its cache's key. The others cannot change what it leaves, or are the registry's: the
        settings of its pod hold them (``pipelines.kubeflow.dag.settings``).
        """
        return {field for field, name in self.sections().items() if name not in (*self.free, "registry")}

    def call(self, params: StepParams, places: Mapping[str, Path], option: str = "") -> None:
        """Call the function on inputs and outputs that lie at ``places``, by their names."""
        options = {self.option: option} if self.option else {}
        pkgutil.resolve_name(self.function)(params, **self.arguments(places), **options)

    def arguments(self, places: Mapping[str, Path]) -> dict[str, Any]:
        """The function's arguments that are paths, of inputs and outputs that lie at ``places``.

        An optional one that has no place is None.
        """
        return {
            name: None if taken in self.optional and taken not in places else _placed(taken, places)
            for name, taken in self.takes.items()
        }

    def folder(self, places: Mapping[str, Path]) -> Path:
        """The step's own folder, with its report, of outputs that lie at ``places``."""
        return places[str(self.takes["out"])]


def _placed(taken: Takes, places: Mapping[str, Path]) -> Path | dict[str, Path]:
    if isinstance(taken, str):
        name, _, file = taken.partition("/")
        return places[name] / file
    return {key: places[name] for key, name in taken.items()}


@dataclass(frozen=True)
class Stage:
    """One use of a step in a pipeline.

    Attributes:
        title: what a person calls it.
        inputs: where each comes from: 'validate.clean' is the output ``clean`` of the stage ``validate``.
        outputs: where DVC keeps each.
        option: the value of the step's option.
        own_name: where it differs from the step's.
        when: the stage before it that decides whether it runs; later stages need that, too, or more.
        left_out: for which parameters the pipeline goes without it.
    """

    step: Step
    title: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    option: str = ""
    own_name: str = ""
    when: str = ""
    left_out: Callable[[Params], bool] = lambda params: False

    @property
    def name(self) -> str:
        """The stage in dvc.yaml, and the task in Kubeflow."""
        return self.own_name or self.step.name

    @property
    def folder(self) -> Path:
        """The step's own folder, as DVC keeps it."""
        return self.step.folder({name: Path(place) for name, place in self.outputs.items()})


@dataclass(frozen=True)
class Pipeline:
    """Stages in an order in which they can run; ``result`` is the output that a run is started for.

    Attributes:
        name: what is added to ``registry.name`` to call it in Kubeflow; '' for the main one.
        description: one line for Kubeflow.
    """

    name: str
    description: str
    result: str
    stages: tuple[Stage, ...] = field(default=())

    def of(self, params: Params) -> Pipeline:
        """The pipeline that these parameters ask for: without stages that they leave out."""
        return self.without({stage.name for stage in self.stages if stage.left_out(params)})

    def without(self, names: Collection[str]) -> Pipeline:
        """The pipeline without some stages, and without what others would read of them if they could."""

        def fitted(stage: Stage) -> Stage:
            inputs = {
                name: source
                for name, source in stage.inputs.items()
                if name not in stage.step.optional or source.partition(".")[0] not in names
            }
            return replace(stage, inputs=inputs)

        return replace(self, stages=tuple(fitted(stage) for stage in self.stages if stage.name not in names))

    def __getitem__(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def uses(self) -> dict[str, list[Stage]]:
        """The stages of each step, by the step's name, in order."""
        found: dict[str, list[Stage]] = {}
        for stage in self.stages:
            found.setdefault(stage.step.name, []).append(stage)
        return found

    def path(self, source: str) -> Path:
        """Where DVC keeps an output: 'validate.clean', or with '/features.onnx' a file in it."""
        stage, _, rest = source.partition(".")
        name, _, file = rest.partition("/")
        return Path(self[stage].outputs[name]) / file

    def places(self, stage: Stage) -> dict[str, Path]:
        """Where DVC keeps what a stage reads and leaves, by the names of its inputs and outputs."""
        read = {name: self.path(source) for name, source in stage.inputs.items()}
        return read | {name: Path(place) for name, place in stage.outputs.items()}

    def run(self, name: str, params: Params) -> None:
        """Run a stage here, on files as DVC keeps them.

        Raises:
            ConfigError: before it begins and empties its folder, where it can train only in a pod.
        """
        from components.training.params import refuse_kuberay
        from pipelines import named

        stage = self[name]
        if stage.step.pod == "training":
            refuse_kuberay(params.ray)
        named.link(stage, params)
        stage.step.call(params.of(stage.step.kind()), self.places(stage), stage.option)


def _embedded(params: Params) -> bool:
    """Whether the images and all that is said of them are the package's; own files change behind names."""
    said = (params.data.class_names, params.data.corrections, params.validation.baseline)
    return params.data.source == "digits" and not any(said)


def _installed(params: Params) -> bool:
    """Whether start weights cannot change under their names: the image's own, those of a known hash, none."""
    nets = (params.teacher, params.student)
    return all(
        net.weights == "none" or net.weights.startswith("package:") or net.weights_sha256 for net in nets
    )


def _one_teacher(params: Params) -> bool:
    """Whether only the run's own teacher teaches; further ones are folders, which may change."""
    return not params.distill.teachers


_EXPORT = Step(
    name="export",
    function="components.export.export:export",
    parameters="components.export.params:ExportParams",
    takes={"manifest": "manifest", "model": "model", "out": "exported"},
    option="of",
    option_help="Which model: student or teacher.",
    help="""Export to ONNX and prove that the file equals the trained network.

    Example: retort export --of teacher""",
)

MAIN = Pipeline(
    name="",
    description="From labelled images to a small classifier.",
    result="distill.trained",
    stages=(
        Stage(
            Step(
                name="ingest",
                function="components.dataset.ingest:ingest",
                parameters="components.dataset.params:IngestParams",
                takes={"manifest": "manifest", "out": "out"},
                free=("registry", "report"),
                files=("data.source", "data.class_names", "data.corrections"),
                pod="light",
                cached=_embedded,
                retries=RETRIES,
                help="""Read data.source into data/manifest.parquet.

                Example: retort ingest -o data.source=photos -o data.root=photos""",
            ),
            title="Ingest",
            inputs={},
            outputs={"manifest": "data/manifest.parquet", "out": "outputs/ingest"},
        ),
        Stage(
            Step(
                name="validate",
                function="components.dataset.validate:validate",
                parameters="components.dataset.params:ValidateParams",
                takes={"manifest": "manifest", "clean": "clean", "quarantine": "quarantine", "out": "out"},
                free=("registry", "report"),
                files=("validate.baseline",),
                pod="light",
                cached=_embedded,
                help="Check every image and row; write clean.parquet, quarantine.parquet and Data Docs.",
            ),
            title="Validate",
            inputs={"manifest": "ingest.manifest"},
            outputs={
                "clean": "data/clean.parquet",
                "quarantine": "data/quarantine.parquet",
                "out": "outputs/validate",
            },
        ),
        Stage(
            Step(
                name="weights",
                function="components.weights.weights:weights",
                parameters="components.weights.params:WeightsParams",
                takes={"out": "weights"},
                files=("teacher.weights", "student.weights"),
                cached=_installed,
                retries=RETRIES,
                help="Fetch, convert and prove the weights that teacher and student start from.",
            ),
            title="Weights",
            inputs={},
            outputs={"weights": "outputs/weights"},
        ),
        Stage(
            Step(
                name="audit-imbalance",
                group="audit",
                function="components.audit.imbalance:audit_imbalance",
                parameters="components.audit.params:AuditParams",
                takes={"manifest": "manifest", "out": "part"},
                pod="light",
                help="Measure the imbalance of classes; propose sampling and loss.",
            ),
            title="Audit: imbalance",
            inputs={"manifest": "validate.clean"},
            outputs={"part": "outputs/audit/imbalance"},
        ),
        Stage(
            Step(
                name="audit-synthetic",
                group="audit",
                function="components.audit.synthetic:audit_synthetic",
                parameters="components.audit.params:AuditParams",
                takes={"manifest": "manifest", "features": "weights/features.onnx", "out": "part"},
                pod="light",
                help="Measure whether synthetic images help, harm or flood; list suspect labels by file.",
            ),
            title="Audit: synthetic images",
            inputs={
                "manifest": "validate.clean",
                "weights": "weights.weights",
            },
            outputs={"part": "outputs/audit/synthetic"},
        ),
        Stage(
            Step(
                name="plan",
                function="components.audit.plan:plan",
                parameters="components.audit.params:AuditParams",
                takes={"imbalance": "imbalance", "synthetic": "synthetic", "out": "plan"},
                pod="light",
                help="Merge what the audits found into outputs/audit/plan.json, which training carries out.",
            ),
            title="Plan",
            inputs={"imbalance": "audit-imbalance.part", "synthetic": "audit-synthetic.part"},
            outputs={"plan": "outputs/audit"},
        ),
        Stage(
            Step(
                name="finetune",
                function="components.training.finetune:finetune",
                parameters="components.training.params:FinetuneParams",
                takes={
                    "manifest": "manifest",
                    "plan": "plan/plan.json",
                    "weights": "weights",
                    "out": "trained",
                },
                free=(*ELSEWHERE, "checks"),  # waiving a finding must not train again
                pod="training",
                help="Finetune the teacher on Ray Train, following the plan.",
            ),
            title="Finetune the teacher",
            inputs={
                "manifest": "validate.clean",
                "plan": "plan.plan",
                "weights": "weights.weights",
            },
            outputs={"trained": "outputs/teacher"},
        ),
        Stage(
            Step(
                name="check",
                function="components.training.check:check",
                parameters="components.training.params:CheckParams",
                takes={
                    "manifest": "manifest",
                    "plan": "plan/plan.json",
                    "teacher": "teacher_model",
                    "weights": "weights",
                    "out": "passed",
                },
                pod="training",
                cached=_one_teacher,
                workers=lambda params: params.distill.control,
                help="The gate before distillation: teacher, start weights, rate; then the student without a "
                "teacher.",
            ),
            title="Check before distillation",
            inputs={
                "manifest": "validate.clean",
                "plan": "plan.plan",
                "teacher_model": "finetune.trained",
                "weights": "weights.weights",
            },
            outputs={"passed": "outputs/check"},
        ),
        Stage(
            Step(
                name="distill",
                function="components.training.distill:distill",
                parameters="components.training.params:DistillParams",
                takes={
                    "manifest": "manifest",
                    "plan": "plan/plan.json",
                    "teacher": "teacher_model",
                    "weights": "weights",
                    "check": "passed",
                    "out": "trained",
                },
                free=(*ELSEWHERE, "checks"),
                pod="training",
                cached=_one_teacher,
                help="Distil the teacher into the student on Ray Train, and keep the better network; needs a "
                "passed check.",
            ),
            title="Distil the student",
            inputs={
                "manifest": "validate.clean",
                "plan": "plan.plan",
                "teacher_model": "finetune.trained",
                "weights": "weights.weights",
                "passed": "check.passed",
            },
            outputs={"trained": "outputs/student"},
        ),
        Stage(
            _EXPORT,
            title="Export the student",
            option="student",
            inputs={"manifest": "validate.clean", "model": "distill.trained"},
            outputs={"exported": "outputs/export"},
        ),
        Stage(
            _EXPORT,
            own_name="export-teacher",
            title="Export the teacher",
            option="teacher",
            inputs={"manifest": "validate.clean", "model": "finetune.trained"},
            outputs={"exported": "outputs/export/teacher"},
        ),
        Stage(
            Step(
                name="benchmark",
                function="components.benchmark.benchmark:benchmark",
                parameters="components.benchmark.params:BenchmarkParams",
                takes={
                    "manifest": "manifest",
                    "exports": {"student": "student", "teacher": "teacher"},
                    "out": "measured",
                },
                cpus=lambda params: max(params.benchmark.threads, default=1),
                cached=lambda params: False,  # the same files are not equally fast on every node
                help="Measure the exported models on this machine and recommend one configuration.",
            ),
            title="Benchmark",
            inputs={
                "manifest": "validate.clean",
                "student": "export.exported",
                "teacher": "export-teacher.exported",
            },
            outputs={"measured": "outputs/benchmark"},
        ),
        Stage(
            Step(
                name="register",
                function="components.registry.register:register",
                parameters="components.registry.params:RegisterParams",
                takes={
                    "manifest": "manifest",
                    "student": "student",
                    "exported": "exported",
                    "benchmark": "measured",
                    "check": "passed",
                    "plan": "plan/plan.json",
                    "samples": "listed/samples.parquet",
                    "out": "registered",
                },
                free=("data", "report"),
                cached=lambda params: False,  # champion or challenger depends on the registry
                retries=RETRIES,
                help="Register the student in MLflow, as champion when it is better, else as challenger.",
            ),
            title="Register",
            inputs={
                "manifest": "validate.clean",
                "student": "distill.trained",
                "exported": "export.exported",
                "measured": "benchmark.measured",
                "passed": "check.passed",
                "plan": "plan.plan",
                "listed": "audit-synthetic.part",
            },
            outputs={"registered": "outputs/register"},
        ),
    ),
)

AUDIT = ("audit-imbalance", "audit-synthetic", "plan")  # what 'retort audit' runs, in turn

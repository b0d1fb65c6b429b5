"""dvc.yaml says the same as the code: which parameters and files each step reads, and in which order."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import grimp
import pytest
import yaml
from typer.testing import CliRunner

from components.audit.params import AuditParams
from components.benchmark.params import BenchmarkParams
from components.common.params import StepParams
from components.dataset.params import IngestParams, ValidateParams
from components.export.params import ExportParams
from components.registry.params import RegisterParams
from components.training.params import CheckParams, DistillParams, FinetuneParams
from components.weights.params import WeightsParams
from pipelines import dag
from pipelines.cli import app
from pipelines.params import Params, load
from pipelines.report import STEPS
from tests.conftest import Checkout

HOUSE = Path(__file__).resolve().parents[2]
DVC: dict[str, Any] = yaml.safe_load((HOUSE / "dvc.yaml").read_text(encoding="utf-8"))
STAGES: dict[str, dict[str, Any]] = DVC["stages"]

# stage -> its parameters, and the module of its step
CODE: dict[str, tuple[type[StepParams], str]] = {
    "ingest": (IngestParams, "dataset.ingest"),
    "validate": (ValidateParams, "dataset.validate"),
    "weights": (WeightsParams, "weights.weights"),
    "audit-imbalance": (AuditParams, "audit.imbalance"),
    "audit-synthetic": (AuditParams, "audit.synthetic"),
    "plan": (AuditParams, "audit.plan"),
    "finetune": (FinetuneParams, "training.finetune"),
    "check": (CheckParams, "training.check"),
    "distill": (DistillParams, "training.distill"),
    "export": (ExportParams, "export.export"),
    "export-teacher": (ExportParams, "export.export"),
    "benchmark": (BenchmarkParams, "benchmark.benchmark"),
    "register": (RegisterParams, "registry.register"),
}
LONG = ("finetune", "distill")
FRAME = ("components.common", "components.tracking", "components.step")  # what every step is framed by


def read_by(stage: str) -> set[str]:
    """The parameters that can change a step's products, by the fields of its class."""
    kind, _ = CODE[stage]
    sections = {field.alias or name for name, field in kind.model_fields.items()} - {"report"}
    if stage != "register":
        sections -= {"registry"}  # where and under which name runs are tracked
    if stage not in ("ingest", "validate"):
        sections -= {"data"}  # the manifest says which images there are, this only where they lie
    if stage in LONG:
        sections -= {"checks"}  # waiving a finding must not retrain
    if "ray" in sections:
        sections = (sections - {"ray"}) | {"ray.workers"}  # the rest says where the same work is done
    return sections


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_the_parameters_that_its_step_reads(stage: str) -> None:
    assert set(STAGES[stage]["params"]) == read_by(stage)


def test_every_step_of_the_report_is_a_stage_with_that_folder() -> None:
    assert [name for name, _, _ in STEPS] == list(STAGES)
    for name, folder, _ in STEPS:
        outs = STAGES[name]["outs"]
        assert f"outputs/{folder}" in outs or f"outputs/{folder}/report.json" in outs


@pytest.mark.parametrize("stage", STAGES)
def test_the_command_of_a_stage_exists(stage: str) -> None:
    program, *words = STAGES[stage]["cmd"].split()
    assert program == "retort"
    shown = CliRunner().invoke(app, [*[word for word in words if word not in ("--of", "teacher")], "--help"])
    assert shown.exit_code == 0, shown.output


def test_no_stage_reads_a_run_id_or_a_page() -> None:
    for stage in STAGES.values():
        assert not [
            dep for dep in stage["deps"] if Path(dep).name in ("run.json", "page.json", "report.html")
        ]


def test_every_stage_keeps_the_id_of_its_run() -> None:
    for name, folder, _ in STEPS:
        assert {f"outputs/{folder}", f"outputs/{folder}/run.json"} & set(STAGES[name]["outs"])


def test_the_order_is_that_of_the_kubeflow_pipeline(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    dag.compile(load(HOUSE / "params.yaml"), path)
    tasks = next(yaml.safe_load_all(path.read_text(encoding="utf-8")))["root"]["dag"]["tasks"]

    @cache
    def before(task: str) -> frozenset[str]:
        direct = frozenset(tasks[task].get("dependentTasks", []))
        return direct.union(*(before(other) for other in direct))

    @cache
    def upstream(stage: str) -> frozenset[str]:
        direct = {
            other
            for dep in STAGES[stage]["deps"]
            for other in STAGES
            if any(dep == out or dep.startswith(f"{out}/") for out in STAGES[other]["outs"])
        }
        return frozenset(direct).union(*(upstream(other) for other in direct))

    for stage in STAGES:
        assert upstream(stage) == before(stage), stage


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_code_that_its_step_imports(stage: str) -> None:
    """But for what knows no step (FRAME), and what only says where things lie."""
    graph = imports()
    module = f"components.{CODE[stage][1]}"
    room = module.split(".")[1]
    code = [
        dep.removesuffix(".py").replace("/", ".") for dep in STAGES[stage]["deps"] if "components/" in dep
    ]
    for needed in sorted({module, *graph.find_upstream_modules(module)}):
        leaf = needed.rpartition(".")[2]
        if needed.startswith(FRAME) or needed == "components.dataset.s3":
            continue
        if leaf == "params" and f".{room}." not in needed:
            continue
        if any(needed == dep or needed.startswith(f"{dep}.") for dep in code):
            continue
        assert needed.count(".") == 1, f"{stage} does not depend on {needed}"  # a package's own docstring


@cache
def imports() -> grimp.ImportGraph:
    return grimp.build_graph("components", cache_dir=None)


def test_no_output_lies_inside_another() -> None:
    outs = sorted(out for stage in STAGES.values() for out in stage["outs"])
    for one, following in itertools.pairwise(outs):
        assert following != one
        assert not following.startswith(f"{one}/")


def test_metrics_and_plots_are_outputs() -> None:
    outs = [out for stage in STAGES.values() for out in stage["outs"]]
    plotted = [path for plot in DVC["plots"] for settings in plot.values() for path in settings["y"]]
    for path in [*DVC["metrics"], *plotted]:
        assert any(path == out or path.startswith(f"{out}/") for out in outs), path


def test_every_section_of_params_yaml_is_known_to_dvc() -> None:
    """Only what cannot change a product is tracked by no stage, and what commands outside the DAG read."""
    tracked = {key.partition(".")[0] for stage in STAGES.values() for key in stage["params"]}
    sections = {field.alias or name for name, field in Params.model_fields.items()}
    assert sections - tracked == {"kubeflow", "report", "expand", "compare_weights", "tune"}


def test_dvc_reads_the_dag_and_leaves_the_kubeflow_face_out(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)  # its own: in the one that tests share the main job may have run
    shown = checkout.run("dvc", "stage", "list", "--name-only")
    assert shown.stdout.split() == list(STAGES), shown.stderr
    ignored = checkout.run("dvc", "check-ignore", "components/training/component.py")
    assert ignored.returncode == 0
    kept = checkout.run("dvc", "check-ignore", "components/training/distill.py")
    assert kept.returncode == 1
    status = json.loads(checkout.run("dvc", "status", "--json").stdout)
    assert set(status) == set(STAGES), "in a fresh checkout nothing has run yet"

"""dvc.yaml says the same as the code: which parameters and files each step reads, and in which order."""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import grimp
import pytest
import yaml
from typer.testing import CliRunner

from pipelines.cli.app import app
from pipelines.kubeflow import dag
from pipelines.params import Params, load
from pipelines.steps import MAIN, Pipeline
from tests.conftest import Checkout

REPO_ROOT = Path(__file__).resolve().parents[2]
DVC: dict[str, Any] = yaml.safe_load((REPO_ROOT / "dvc.yaml").read_text(encoding="utf-8"))
STAGES: dict[str, dict[str, Any]] = DVC["stages"]

FRAME = ("components.common", "components.tracking", "components.step")  # what every step is framed by


def disagreements(stages: dict[str, dict[str, Any]], pipeline: Pipeline) -> list[str]:
    """Where the stages of a dvc.yaml and the table of steps say different things, one line each."""
    wrong = []
    if list(stages) != [stage.name for stage in pipeline.stages]:
        wrong.append(f"dvc.yaml: stages {list(stages)}")
    for stage in pipeline.stages:
        written = stages.get(stage.name, {"cmd": "", "params": [], "deps": [], "outs": []})
        first = pipeline.uses()[stage.step.name][0]
        option = "" if stage is first else f" --{stage.step.option} {stage.option}"
        if written["cmd"] != f"retort {stage.step.command}{option}":
            wrong.append(f"{stage.name}: cmd {written['cmd']}")
        if set(written["params"]) != stage.step.tracked():
            wrong.append(f"{stage.name}: params {written['params']}")
        places = pipeline.places(stage)
        read = {os.fspath(place) for name, place in places.items() if name in stage.inputs}
        left = {os.fspath(place) for name, place in places.items() if name in stage.outputs}
        files = {dep for dep in written["deps"] if not dep.startswith(("components/", "named/"))}
        links = [dep for dep in written["deps"] if dep.startswith("named/")]
        if links != [f"named/{stage.name}"] * bool(stage.step.files):
            wrong.append(f"{stage.name}: deps {links}")
        wrong += [f"{stage.name}: deps {each}" for each in apart(files, read)]
        wrong += [f"{stage.name}: outs {each}" for each in apart(set(written["outs"]), left)]
    return wrong


def apart(files: set[str], places: set[str]) -> list[str]:
    """Files that lie at or below none of the places, and places at or below which no file lies."""
    pairs = {(file, place) for file in files for place in places if f"{file}/".startswith(f"{place}/")}
    return [*sorted(files - {file for file, _ in pairs}), *sorted(places - {place for _, place in pairs})]


def test_dvc_and_the_table_of_steps_say_the_same() -> None:
    assert disagreements(STAGES, MAIN) == []


@pytest.mark.parametrize(
    ("stage", "key", "spoil"),
    [
        ("plan", "cmd", lambda cmd: f"{cmd}s"),
        ("export-teacher", "cmd", lambda cmd: cmd.replace(" --of teacher", "")),
        ("finetune", "params", lambda params: [*params, "checks"]),
        ("distill", "params", lambda params: params[1:]),
        ("check", "deps", lambda deps: deps[1:]),
        ("weights", "deps", lambda deps: deps[1:]),
        ("audit-imbalance", "deps", lambda deps: [*deps, "outputs/weights/features.onnx"]),
        ("export", "deps", lambda deps: [dep.replace("student", "teacher") for dep in deps]),
        ("validate", "outs", lambda outs: outs[1:]),
        ("register", "outs", lambda outs: ["outputs/registered"]),
    ],
)
def test_a_dvc_yaml_that_differs_from_the_table_is_noticed(
    stage: str, key: str, spoil: Callable[[Any], Any]
) -> None:
    stages = copy.deepcopy(STAGES)
    stages[stage][key] = spoil(stages[stage][key])
    assert [line for line in disagreements(stages, MAIN) if line.startswith(f"{stage}: {key}")]


def test_a_stage_that_is_missing_or_too_many_is_noticed() -> None:
    assert disagreements({name: stage for name, stage in STAGES.items() if name != "weights"}, MAIN)
    assert disagreements({**STAGES, "more": STAGES["plan"]}, MAIN)


def test_the_report_of_every_stage_is_kept() -> None:
    for stage in MAIN.stages:
        outs = STAGES[stage.name]["outs"]
        assert {os.fspath(stage.folder), os.fspath(stage.folder / "report.json")} & set(outs), stage.name


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
    for stage in MAIN.stages:
        outs = STAGES[stage.name]["outs"]
        assert {os.fspath(stage.folder), os.fspath(stage.folder / "run.json")} & set(outs), stage.name


def test_the_order_is_that_of_the_kubeflow_pipeline(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    dag.compile(load(REPO_ROOT / "params.yaml"), path)
    pipeline = next(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    tasks = pipeline["components"]["comp-exit-handler-1"]["dag"]["tasks"]

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
    module, _, _ = MAIN[stage].step.function.partition(":")
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
    assert sections - tracked == {"kubeflow", "report", "expand", "compare_weights", "tune", "retrain"}


def test_dvc_reads_the_dag_and_leaves_the_other_commands_out(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)  # its own: in the one that tests share the main job may have run
    shown = checkout.run("dvc", "stage", "list", "--name-only")
    assert shown.stdout.split() == list(STAGES), shown.stderr
    ignored = checkout.run("dvc", "check-ignore", "components/tools/tune/tune.py")
    assert ignored.returncode == 0
    kept = checkout.run("dvc", "check-ignore", "components/training/distill.py")
    assert kept.returncode == 1
    status = json.loads(checkout.run("dvc", "status", "--json").stdout)
    assert set(status) == set(STAGES), "in a fresh checkout nothing has run yet"

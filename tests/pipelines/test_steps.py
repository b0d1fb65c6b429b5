"""The table of steps: it fits the functions, and a row more is a command and a line of the report."""

from __future__ import annotations

import inspect
import pkgutil
from pathlib import Path

import pytest
import typer

from components.common.errors import ConfigError
from components.common.params import StepParams
from pipelines.catalogue import PIPELINES
from pipelines.cli import steps
from pipelines.cli.options import Options
from pipelines.params import Params, build
from pipelines.report import report
from pipelines.steps import MAIN, Pipeline, Stage
from tests.pipelines.longer import LONGER

STEPS = {stage.step.name: stage.step for stage in MAIN.stages}
EACH = [pytest.param(line, stage, id=stage.name) for line in PIPELINES for stage in line.stages]


@pytest.mark.parametrize(("pipeline", "stage"), EACH)
def test_a_row_is_a_call_that_its_function_takes(pipeline: Pipeline, stage: Stage) -> None:
    step = stage.step
    kind = step.kind()
    assert issubclass(kind, StepParams)
    signature = inspect.signature(pkgutil.resolve_name(step.function))
    options = {step.option: stage.option} if step.option else {}
    signature.bind(kind(), **dict.fromkeys(step.takes), **options)
    assert not set(step.free) - set(step.sections().values()) - {"data"}, "what is not read need not be free"
    assert set(step.sections().items()) <= {
        (name, field.alias or name) for name, field in Params.model_fields.items()
    }


@pytest.mark.parametrize(("pipeline", "stage"), EACH)
def test_an_input_is_an_output_of_a_stage_before(pipeline: Pipeline, stage: Stage) -> None:
    before = pipeline.stages[: pipeline.stages.index(stage)]
    given = {f"{other.name}.{name}" for other in before for name in other.outputs}
    assert set(stage.inputs.values()) <= given
    names = {*stage.inputs, *stage.outputs}
    for taken in stage.step.takes.values():
        wanted = [taken] if isinstance(taken, str) else taken.values()
        assert {name.partition("/")[0] for name in wanted} <= names


@pytest.mark.parametrize(("words", "left"), [([], "count"), (["--of", "twice"], "again")])
def test_a_row_is_a_command_and_a_line_of_the_report(
    words: list[str],
    left: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("registry: {name: photos}\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/clean.parquet").write_bytes(b"12345")
    app = typer.Typer(rich_markup_mode=None)
    steps.add((LONGER,), app, {"audit": typer.Typer()})
    app(args=["count", *words], standalone_mode=False, obj=Options())
    report(Params(), tmp_path / "outputs", LONGER)
    said = capsys.readouterr().out
    shown = {name: f"  {title:<26} " for name, title in (("count", "Count"), ("again", "Count again"))}
    for name, line in shown.items():
        assert f"{line}{'passed' if name == left else 'not run'}" in said
    page = (tmp_path / "outputs/index.html").read_text(encoding="utf-8")
    assert "5 bytes" in page
    assert f'id="{left}"' in page


def test_a_second_pipeline_has_commands_for_the_steps_that_it_has_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/clean.parquet").write_bytes(b"12345")
    (tmp_path / "params.yaml").write_text("registry: {name: photos}\n")
    app, audit = typer.Typer(rich_markup_mode=None), typer.Typer()
    steps.add((MAIN, LONGER), app, {"audit": audit})
    names = [command.name for group in (app, audit) for command in group.registered_commands]
    assert sorted(names) == sorted({step.command.split()[-1] for step in STEPS.values()} | {"count"})
    app(args=["count", "--of", "twice"], standalone_mode=False, obj=Options())
    assert (tmp_path / "outputs/again/report.json").is_file()
    ran: list[tuple[str, str]] = []
    monkeypatch.setattr(Pipeline, "run", lambda self, name, params: ran.append((self.name, name)))
    app(args=["ingest"], standalone_mode=False, obj=Options())
    assert ran == [(MAIN.name, "ingest")]


def test_a_step_that_trains_in_pods_alone_is_refused_before_its_folder_is_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = MAIN["finetune"].folder / "model.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"a teacher")
    with pytest.raises(ConfigError, match="retort submit"):
        MAIN.run("finetune", build({"ray": {"address": "kuberay", "storage": "s3://bucket/prefix"}}))
    assert kept.read_bytes() == b"a teacher"

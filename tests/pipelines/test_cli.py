"""The command line: exit statuses, and errors of one or two lines without a traceback."""

from __future__ import annotations

import itertools
import logging
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from components.common import progress
from components.common.errors import FindingsError, RetortError, Terminated
from pipelines import cli
from pipelines.cli.options import Options
from tests.conftest import bare

REPO_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("global: {seed: 1}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ingst"], "Did you mean 'ingest'"),
        (["ingest", "--fast"], "--fast (see 'retort ingest --help')"),
        (["ingest", "-o", "data.sorce=x"], "did you mean 'data.source'"),
        (["-o", "data.sorce=x", "ingest"], "did you mean 'data.source'"),
        (["--params", "none.yaml", "ingest"], "none.yaml: no such file"),
        (["ingest", "-o"], "a value is missing"),
        (["ingest", "--log-level"], "a value is missing, such as --log-level warning"),
        (["ingest", "--log-level", "loud"], "--log-level loud: expected one of debug, info, warning, error"),
        (["--log-level=", "ingest"], "--log-level : expected one of"),
        (["export", "--of", "nobody"], "expected student or teacher"),
        (["cost", "resnet18", "--size", "0"], "--size"),
        (["cost"], "NAME"),
    ],
)
def test_what_cannot_be_understood_exits_with_2_before_any_work(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert len(error.splitlines()) <= 2
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (RetortError("photos: no such folder"), 1, "retort: photos: no such folder"),
        (FindingsError("check: distill.initial_lr: too high\nsee report"), 1, "distill.initial_lr"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Terminated(), 143, "terminated"),
        (OSError(28, "No space left on device", "outputs/x"), 1, "outputs/x: the disk is full"),
        (OSError(30, "Read-only file system", ".retort"), 1, ".retort: read-only file system; commands"),
        (sqlite3.OperationalError("database or disk is full"), 1, "retort: the disk is full"),
        (FileNotFoundError(2, "No such file or directory", "a.png"), 1, "a.png: no such file"),
        (ZeroDivisionError("division by zero"), 1, "internal error: ZeroDivisionError"),
        (RuntimeError("too large\n#1 a frame"), 1, "internal error: RuntimeError: too large (--debug"),
    ],
)
def test_failures_have_their_exit_status_and_one_message(
    error: BaseException,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(self: Options) -> None:
        raise error

    monkeypatch.setattr(Options, "params", fail)
    assert cli.run(["report"]) == status
    printed = capsys.readouterr().err
    assert said in printed
    assert "Traceback" not in printed


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--debug", "--params", "none.yaml", "ingest"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_options_may_stand_before_or_after_the_command() -> None:
    before, rest = Options.take(["-o", "global.seed=2", "--params", "p.yaml", "report"])
    assert (before, rest) == (Options(Path("p.yaml"), ("global.seed=2",)), ["report"])
    after, rest = Options.take(["report", "--params=q.yaml", "-o", "a=1", "-ob=2", "--debug"])
    assert (after, rest) == (Options(Path("q.yaml"), ("a=1", "b=2"), debug=True), ["report"])
    assert Options.take(["predict", "--", "-o"]) == (Options(), ["predict", "--", "-o"])
    for level in (["--log-level", "WARNING"], ["--log-level=warning"]):
        assert Options.take(["report", *level]) == (Options(log_level="warning"), ["report"])


def test_the_level_that_is_given_beats_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str | None] = []

    def params(self: Options) -> None:
        seen.append(os.environ.get("RETORT_LOG_LEVEL"))  # what processes of the step go by
        logging.getLogger("components.step").info("a note")
        logging.getLogger("components.step").warning("a warning")
        raise RetortError("the end")

    monkeypatch.setattr(Options, "params", params)
    monkeypatch.setenv("RETORT_LOG_LEVEL", "error")
    try:
        for words, level, said in (
            (["--log-level", "info"], "info", ["a note", "a warning", "retort: the end"]),
            (["--log-level", "warning"], "warning", ["a warning", "retort: the end"]),
            (["--log-level", "error"], "error", ["retort: the end"]),
        ):
            assert cli.run(["report", *words]) == 1
            assert seen.pop() == level
            assert bare(capsys.readouterr().err).splitlines() == said
        assert os.environ["RETORT_LOG_LEVEL"] == "error"
        assert logging.getLogger("components").level == logging.ERROR, "afterwards it is the environment's"
    finally:
        monkeypatch.delenv("RETORT_LOG_LEVEL")
        progress.begin_logging()


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from pipelines.cli import run\n"
        "run(['--help'])\n"
        "heavy = {'torch', 'mlflow', 'ray', 'kfp', 'great_expectations', 'pandas', 'numpy', 'pyarrow'}\n"
        "sys.exit(f'loaded: {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    for command in ("ingest", "validate", "weights", "audit", "plan", "finetune", "check", "distill"):
        assert f"  {command} " in shown.stdout
    for command in (
        "export",
        "benchmark",
        "register",
        "compile",
        "submit",
        "schedule",
        "report",
        "init",
        "clean",
    ):
        assert f"  {command} " in shown.stdout


def test_init_makes_a_project_and_refuses_to_overwrite_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["init", "mine"]) == 0
    made = {entry.name for entry in (tmp_path / "mine").iterdir()}
    assert {"params.yaml", "dvc.yaml", "images", ".gitignore", "README.md", ".dvc"} <= made
    stages = yaml.safe_load((tmp_path / "mine/dvc.yaml").read_text())
    stages["stages"]["ingest"]["deps"].remove("${data.source}")
    assert stages == yaml.safe_load((REPO_ROOT / "dvc.yaml").read_text()), (
        "the checkout's, but for the images"
    )
    assert cli.run(["--params", "mine/params.yaml", "report"]) == 0
    assert cli.run(["init", "mine"]) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--images", "my photos", "--no-measure"], []])
def test_repro_reads_own_images_again_when_there_are_more(tmp_path: Path, given: list[str]) -> None:
    images = tmp_path / ("my photos" if given else "mine/images")
    for number, (split, label) in enumerate(itertools.product(["train", "val", "test"], "ab")):
        draw(images / split / label / f"{number}.png", number)
    assert cli.run(["init", "mine", *given]) == 0

    def repro() -> tuple[int, bool]:
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "repro", "ingest"],
            cwd=tmp_path / "mine", capture_output=True, text=True, check=False,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return pq.read_metadata(tmp_path / "mine/data/manifest.parquet").num_rows, "Running" in done.stdout

    assert repro() == (6, True)
    assert repro() == (6, False)
    draw(images / "train/a/6.png", 6)
    assert repro() == (7, True)


@pytest.mark.slow
def test_expand_runs_what_it_needs_and_only_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "params.yaml").write_text(
        "global: {image_size: 32}\ndata: {source: photos, root: photos}\n"
        "teacher: &net\n  arch: {name: test_efficientnet}\nstudent: *net\n"
    )
    for number, (split, label) in enumerate(itertools.product(["train", "val", "test"], "ab")):
        draw(tmp_path / "photos" / split / label / f"{number}.png", number)

    def ran() -> list[str]:
        assert cli.run(["expand"]) == 1, "there is no student"
        said = bare(capsys.readouterr().err)
        assert "outputs/student/model.json: no such file" in said
        return re.findall(r"^expand: .*: 'retort (\w+)' runs first$", said, re.MULTILINE)

    assert ran() == ["ingest", "validate", "weights", "audit"]
    assert ran() == []
    draw(tmp_path / "photos/train/c/9.png", 9)
    assert ran() == [], "what is new in the source is for ingest to read"
    assert cli.run(["ingest"]) == 0
    assert ran() == ["validate", "audit"]


def draw(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").rotate(20 * number).save(path)


def test_a_project_gets_a_name_that_mlflow_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["init", "bob's: photos"]) == 0
    assert "name: bob-s- photos" in (tmp_path / "bob's: photos/params.yaml").read_text()
    capsys.readouterr()
    assert cli.run(["report", "-o", "registry.name=bob's"]) == 2
    assert "registry.name" in capsys.readouterr().err


def test_the_page_of_a_run_without_test_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "outputs/student"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text('{"val": {"top1": 0.75, "images": 4}, "test": {"images": 0}}')
    assert cli.run(["report"]) == 0
    assert "75.0%" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["report.json", "metrics.json", "page.json"])
def test_the_page_of_a_run_with_a_damaged_file_names_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "outputs/student"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text('{"step": "distill"}')
    (folder / name).write_text('{"val":')
    assert cli.run(["report"]) == 1
    assert f"outputs/student/{name}: not valid JSON" in capsys.readouterr().err


def test_compiled_python_is_no_change_of_a_projects_code(tmp_path: Path) -> None:
    assert cli.run(["init", "mine"]) == 0
    for name, ignored in (("__pycache__/ingest.cpython-311.pyc", 0), ("ingest.py", 1)):
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "check-ignore", f"components/dataset/{name}"],
            cwd=tmp_path / "mine", capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == ignored, name


def test_clean_removes_what_can_be_remade_and_keeps_history(tmp_path: Path) -> None:
    for name in (
        "outputs/teacher/model.safetensors",
        "data/clean.parquet",
        "data/mine.parquet",
        "data/digits/mine.png",
        ".retort/cache/a",
        "photos/a.png",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    history = tmp_path / ".retort" / "mlflow" / "mlflow.db"
    history.parent.mkdir()
    history.write_text("x")
    (tmp_path / "params.yaml").write_text("data: {source: digits, root: data/digits}\n")
    assert cli.run(["clean", "--dry-run"]) == 0
    assert (tmp_path / "outputs").exists()
    assert cli.run(["clean"]) == 0
    assert not (tmp_path / "outputs").exists()
    assert not (tmp_path / "data" / "clean.parquet").exists()
    assert not (tmp_path / ".retort" / "cache").exists()
    assert history.exists()
    for own in ("photos/a.png", "data/mine.parquet", "data/digits/mine.png"):
        assert (tmp_path / own).exists(), f"{own} is nothing that a step made"


def test_a_signal_ends_with_its_status(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from pipelines.cli import main\n"
        "from pipelines.cli.options import Options\n"
        "def wait(self):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "Options.params = wait\n"
        "main(['report'])\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert ended.returncode == 143
    assert "terminated" in ended.stderr


def test_a_signal_that_a_library_swallowed_still_ends_with_its_status(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from pipelines.cli import main\n"
        "from pipelines.cli.options import Options\n"
        "def wait(self):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except BaseException:\n"
        "        raise RuntimeError('a query was broken off') from None\n"
        "Options.params = wait\n"
        "main(['report'])\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (143, 1)


def test_a_letter_that_the_terminal_lacks_stops_no_command(tmp_path: Path) -> None:
    code = (
        "from pipelines.cli import frame\nframe.run = lambda _: print('caf\\xe9 \\udcff')\nframe.main([])\n"
    )
    for encoding, shown in (("ascii", b"caf\\xe9 \\udcff\n"), ("utf-8", "café \\udcff\n".encode())):
        ended = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=False,
            env={**os.environ, "PYTHONIOENCODING": encoding},
        )  # fmt: skip
        assert (ended.returncode, ended.stdout) == (0, shown), ended.stderr


def test_a_process_says_one_line_when_it_ends_for_want_of_a_file(tmp_path: Path) -> None:
    """Not what a library says of objects that are still there when Python ends (DuckDB's binding would)."""
    command = [sys.executable, "-m", "pipelines.cli", "validate"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    said = [
        line for line in bare(ended.stderr).splitlines() if not line.startswith("  validate: ")
    ]  # it loads
    assert said == ["retort: data/manifest.parquet: no such file; run 'retort ingest' first"]


@pytest.mark.parametrize(
    "words",
    [
        "ingest", "validate", "weights", "audit", "audit imbalance", "audit synthetic", "plan", "finetune",
        "check", "distill", "export", "benchmark", "register", "predict", "expand", "features", "cost",
        "compare-weights", "tune", "compile", "submit", "schedule", "promote", "rollback",
        "promotions", "shadow", "sync", "ui",
        "report", "init", "clean",
    ],
)  # fmt: skip
def test_every_command_explains_itself(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*words.split(), "--help"]) == 0
    assert f"retort {words}" in capsys.readouterr().out

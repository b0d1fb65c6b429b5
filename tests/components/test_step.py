"""A step leaves all of its products and a passed report, or a failed report and none of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from components.common.errors import FindingsError, RetortError, Terminated
from components.common.findings import read_report
from components.common.links import damaged, links_of
from components.common.params import StepParams
from components.step import known_as, name_of, step


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETORT_RUN", "tests")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "demo"


def params(**sections: Any) -> StepParams:
    return StepParams.model_validate(sections)


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_products_appear_beside_the_report_when_the_step_passes(out: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("hello")
    elsewhere = tmp_path / "data" / "rows.txt"
    with step("demo", params(), out, [source]) as run:
        run.product(out / "model.txt").write_text("m")
        run.product(elsewhere).write_text("r")
        run.add_finding("demo.note", "info", "all", "fine")
        assert not elsewhere.exists(), "products are staged until the step has passed"
    assert {"model.txt", "report.json", "report.html", "run.json"} <= names(out)
    assert elsewhere.read_text() == "r"
    report = read_report(out / "report.json")
    assert report.passed
    assert report.inputs == {str(source): run.sha256(source)}
    assert len(run.sha256(source)) == 64


def test_an_artifact_is_called_what_it_is_known_as(out: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "3f/teacher"
    artifact.mkdir(parents=True)
    (artifact / "model.json").write_text("{}")
    with known_as({artifact: Path("outputs/teacher")}):
        with step("demo", params(), out, [artifact / "model.json"]) as run:
            pass
        assert name_of(artifact) == "outputs/teacher"
        assert name_of(tmp_path / "3f/teachers") == str(tmp_path / "3f/teachers")
    assert list(read_report(out / "report.json").inputs) == ["outputs/teacher/model.json"]
    assert run.sha256(Path("outputs/teacher/model.json"))
    assert name_of(artifact) == str(artifact)


def test_an_error_leaves_a_failed_report_and_no_product(out: Path) -> None:
    with step("demo", params(), out) as run:
        run.product(out / "model.txt").write_text("old")
    with (
        pytest.raises(FindingsError, match=r"demo\.bad: too low") as raised,
        step("demo", params(), out) as run,
    ):
        run.product(out / "model.txt").write_text("new")
        run.add_finding("demo.bad", "error", "x", "too low", measured=1, limit=2)
    assert raised.value.status == 1
    assert "model.txt" not in names(out)
    assert "run.json" not in names(out)
    assert not read_report(out / "report.json").passed
    assert not [name for name in names(out) if name.startswith(".")]


def test_a_waived_error_is_a_warning_that_says_so(out: Path) -> None:
    with step("demo", params(checks={"waive": ["export.parity"]}), out) as run:
        run.add_finding("export.parity", "error", "x", "too low")
    finding = read_report(out / "report.json").findings[0]
    assert (finding.level, finding.waived) == ("warning", True)


def test_an_error_that_leaves_nothing_to_go_on_with_is_not_waived_and_offers_no_waiving(out: Path) -> None:
    said = {}
    for waivable in (True, False):
        with pytest.raises(FindingsError) as raised, step("demo", params(), out) as run:
            run.add_finding("demo.bad", "error", "x", "no network", waivable=waivable)
        said[waivable] = "checks.waive" in str(raised.value)
    assert said == {True: True, False: False}
    waive = params(checks={"waive": ["export.parity"]})
    with pytest.raises(FindingsError), step("demo", waive, out) as run:
        run.add_finding("export.parity", "error", "x", "no network", waivable=False)


def test_a_failure_of_the_work_is_in_the_report(out: Path) -> None:
    with pytest.raises(RetortError), step("demo", params(), out) as run:
        run.product(out / "model.txt").write_text("half")
        raise RetortError("photos/1.png: cannot be read")
    report = read_report(out / "report.json")
    assert not report.passed
    assert report.findings[-1].message == "photos/1.png: cannot be read"
    assert "model.txt" not in names(out)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, Terminated])
def test_an_interruption_leaves_nothing_half_written(out: Path, interruption: type[BaseException]) -> None:
    with pytest.raises(interruption), step("demo", params(), out) as run:
        run.product(out / "model.txt").write_text("half")
        raise interruption
    assert names(out) == set()


def test_what_other_steps_keep_in_the_folder_stays(out: Path) -> None:
    (out / "teacher").mkdir(parents=True)
    (out / "stale.txt").write_text("x")
    with step("demo", params(), out, keep=("teacher",)):
        pass
    assert "teacher" in names(out)
    assert "stale.txt" not in names(out)


def test_report_html_escapes_what_users_named(out: Path) -> None:
    with step("demo", params(), out) as run:
        run.add_finding("demo.note", "warning", "class '<script>'", "<b>odd</b> name")
        run.page.table("Names <i>", ["file"], [["<img src=x>"]])
    page = (out / "report.html").read_text()
    for hostile in ("<script>", "<b>odd", "<img src=x>", "Names <i>"):
        assert hostile not in page
    assert json.loads((out / "page.json").read_text())[0]["title"] == "Names <i>"


def test_a_step_that_fails_before_it_names_a_product_leaves_none_of_an_earlier_run(
    out: Path, tmp_path: Path
) -> None:
    """A later step would go on with the old file, as if this one had passed."""
    elsewhere = tmp_path / "data" / "rows.txt"
    with step("demo", params(), out, products=[elsewhere]) as run:
        run.product(elsewhere).write_text("r")
    with pytest.raises(RetortError), step("demo", params(), out, products=[elsewhere]):
        raise RetortError("no space left on device")
    assert not elsewhere.exists()
    assert not read_report(out / "report.json").passed


def test_a_folder_that_is_a_link_is_not_emptied(out: Path, tmp_path: Path) -> None:
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter.txt").write_text("all of it")
    out.parent.mkdir()
    out.symlink_to(mine, target_is_directory=True)
    with pytest.raises(RetortError, match=r"demo: a link to .*thesis"), step("demo", params(), out):
        raise AssertionError("nothing may run")
    assert names(mine) == {"chapter.txt"}


def test_the_folder_above_may_be_a_link(out: Path, tmp_path: Path) -> None:
    disk = tmp_path / "big disk"
    (disk / "demo").mkdir(parents=True)
    (disk / "mine.txt").write_text("x")
    out.parent.symlink_to(disk, target_is_directory=True)
    with step("demo", params(), out):
        pass
    assert "report.json" in names(disk / "demo")
    assert (disk / "mine.txt").exists()


@pytest.mark.parametrize("place", ["outputs/demo/mine.csv", "outputs/demo", "data/rows.txt"])
def test_what_a_step_reads_it_does_not_remove(out: Path, tmp_path: Path, place: str) -> None:
    made = tmp_path / "data" / "rows.txt"
    for path in (out / "mine.csv", made):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("verdicts")
    read = [tmp_path / place]
    with (
        pytest.raises(RetortError, match="keep a copy elsewhere"),
        step("demo", params(), out, read, products=[made]),
    ):
        raise AssertionError("nothing may run")
    assert (out / "mine.csv").exists()
    assert made.exists()


def test_a_file_where_the_folder_should_be_is_named(out: Path) -> None:
    out.parent.mkdir()
    out.write_text("notes")
    with pytest.raises(RetortError, match="demo: not a folder"), step("demo", params(), out):
        raise AssertionError("nothing may run")


def test_run_json_tells_what_was_read_and_left(out: Path, tmp_path: Path) -> None:
    """By sha256, wherever it lies, and without what a tracker's address gives away."""
    source = tmp_path / "in.txt"
    source.write_text("hello")
    secret = params(registry={"tracking_uri": "http://me:password@127.0.0.1:9"})
    with step("demo", secret, out, [source]) as run:
        run.product(out / "model.txt").write_text("m")
        (run.product(tmp_path / "folder") / "deep").mkdir(parents=True)
        (tmp_path / ".folder.staged/deep/file.txt").write_text("f")
    link = links_of(out)[str(out)]
    digest = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("hello", "m", "f")}
    assert link.read == {str(source): digest["hello"]}
    left = {str(out / "model.txt"): digest["m"], str(tmp_path / "folder/deep/file.txt"): digest["f"]}
    assert left.items() <= link.left.items()
    assert str(out / "report.json") in link.left
    assert str(out / "run.json") not in link.left
    assert link.parameters["registry"]["tracking_uri"] == "http://127.0.0.1:9"
    assert "password" not in (out / "run.json").read_text()
    assert damaged(out / "run.json") == ""

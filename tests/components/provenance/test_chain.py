"""A working tree's chain: whole as the steps left it, and whatever is changed is named."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from components.common.errors import RetortError
from components.common.links import before, links_of
from components.common.params import Registry
from components.common.storage import sha256_file, sha256_json, write_json
from components.tools.verify import verify


def answer(what: str = "outputs") -> list[str]:
    found = verify(what, keys=[], required=False, registry=Registry)
    return [*found.lines, *found.notes]


def rewrite(path: Path, content: dict[str, Any]) -> None:
    """As a step would have written it."""
    del content["digest"]
    write_json(path, {**content, "digest": sha256_json(content)})


def test_a_whole_tree_is_told_link_by_link(tree: Path) -> None:
    lines = answer()
    steps = [line.split()[0] for line in lines]
    assert steps == [
        "ingest", "validate", "weights", "audit-imbalance", "audit-synthetic", "plan", "finetune", "check",
        "distill", "export", "benchmark", "register",
    ]  # fmt: skip
    digest = sha256_file(tree / "outputs/student/model.safetensors")
    assert f"outputs/student/model.safetensors {digest[:12]}..." in lines[8]
    assert answer(".") == lines
    assert answer(str(tree / "outputs")) == lines


@pytest.mark.parametrize(
    "name",
    ["data/manifest.parquet", "data/clean.parquet", "outputs/weights/student.safetensors",
     "outputs/teacher/model.safetensors", "outputs/check/gate.json", "outputs/student/model.safetensors",
     "outputs/export/model.onnx", "outputs/benchmark/choice.json", "outputs/validate/report.html"],
)  # fmt: skip
def test_a_changed_byte_is_named_by_its_file(tree: Path, name: str) -> None:
    path = tree / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(RetortError, match=f"{name}: changed since .* left it"):
        answer()


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_changed_byte_is_found(tree: Path, count: int) -> None:
    """In products, reports and links alike, JSON's white space included."""
    places = sorted(path for top in ("data", "outputs") for path in (tree / top).rglob("*") if path.is_file())
    random_ = random.Random(11)
    for number in range(count):
        path = places[number % len(places)]
        before = path.read_bytes()
        content = bytearray(before)
        content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
        path.write_bytes(content)
        with pytest.raises(RetortError, match=re.escape(path.name)):
            answer()
        path.write_bytes(before)
    assert answer()


def test_what_is_missing_is_named(tree: Path) -> None:
    (tree / "outputs/check/gate.json").unlink()
    with pytest.raises(RetortError, match=r"outputs/check/gate\.json: check left it, and it is not there"):
        answer()


def test_a_step_without_its_link_breaks_the_chain(tree: Path) -> None:
    """What others carry of it still tells what it left: only where nobody does, it is missing."""
    (tree / "outputs/check/run.json").unlink()
    assert answer(), "the student's folder carries the link of the check"
    for path in tree.glob("outputs/**/run.json"):
        found = json.loads(path.read_text())
        found["before"].pop("outputs/check", None)
        rewrite(path, found)
    with pytest.raises(RetortError, match=r"outputs/check/gate\.json: distill read it .* no link says"):
        answer()


def test_a_step_that_worked_on_another_file_is_named(tree: Path) -> None:
    """The student was made again; what was exported is of the one before."""
    path = tree / "outputs/student/run.json"
    found = json.loads(path.read_text())
    model = tree / "outputs/student/model.safetensors"
    model.write_bytes(b"another network")
    found["link"]["left"]["outputs/student/model.safetensors"] = sha256_file(model)
    rewrite(path, found)
    said = r"outputs/student/model\.safetensors: distill left .* export read .*'retort export' again"
    with pytest.raises(RetortError, match=said):
        answer()


def test_a_plan_that_a_person_changed_is_noted(tree: Path) -> None:
    plan = tree / "outputs/audit/plan.json"
    plan.write_text('{"changed": "by hand"}\n')
    with pytest.raises(RetortError, match=r"outputs/audit/plan\.json: changed since plan left it"):
        answer()  # nobody has used it yet
    for path in tree.glob("outputs/**/run.json"):
        content = json.loads(path.read_text())
        for link in [content["link"], *content["before"].values()]:
            if "outputs/audit/plan.json" in link["read"]:
                link["read"]["outputs/audit/plan.json"] = sha256_file(plan)
        rewrite(path, content)
    assert answer()[-1].startswith("outputs/audit/plan.json: changed by a person: plan left sha256")


def test_files_that_no_step_left_are_noted(tree: Path) -> None:
    (tree / "outputs/teacher/notes.txt").write_text("mine")
    assert answer()[-1] == "outputs/teacher/notes.txt: no step left it"


def test_one_folder_alone_tells_its_history(tree: Path) -> None:
    """A step's folder carries the links of all before it: as a Kubeflow artifact, it lies alone."""
    shutil.copytree(tree / "outputs/student", tree / "alone/student")
    folder = tree / "alone/student"
    assert list(links_of(folder))[-1] == "outputs/student"
    assert set(links_of(folder)) == {
        "outputs/ingest", "outputs/validate", "outputs/weights", "outputs/audit/imbalance",
        "outputs/audit/synthetic", "outputs/audit", "outputs/teacher", "outputs/check", "outputs/student",
    }  # fmt: skip
    model = folder / "model.safetensors"
    digest = sha256_file(model)
    found = before({model: digest}, {"outputs/student/model.safetensors": digest}, tree / "else/export")
    assert set(found) == set(links_of(folder))


def test_a_file_without_a_folder_is_known_by_what_pods_share(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Kubeflow: clean.parquet is an artifact of its own, and the step that reads it is elsewhere."""
    from components.common import links

    monkeypatch.setenv("RETORT_SHARED", str(tree / "shared"))
    (tree / "shared").mkdir()
    monkeypatch.setenv("RETORT_STATE", str(tree / "one"))
    known = links_of(tree / "outputs/validate")
    own = known.pop("outputs/validate")
    digest = own.left["data/clean.parquet"]
    links.keep(own, known, [digest])
    monkeypatch.setenv("RETORT_STATE", str(tree / "two"))
    artifact = tree / "3f/clean"
    found = before({artifact: digest}, {"data/clean.parquet": digest}, tree / "4a/part")
    assert set(found) == {"outputs/ingest", "outputs/validate"}


def test_nothing_to_verify_is_said(tree: Path) -> None:
    (tree / "empty").mkdir()
    with pytest.raises(RetortError, match="nothing to verify"):
        answer("empty")
    with pytest.raises(RetortError, match="no version of the registered model"):
        answer("nowhere")
    with pytest.raises(RetortError, match="a working tree, and those are not signed"):
        verify("outputs", keys=[tree / "key.pub"], required=True, registry=Registry)

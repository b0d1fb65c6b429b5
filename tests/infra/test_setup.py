"""The set-up: which Pythons it takes, and that the lock, the project and the scripts name the same."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

REPO_ROOT = Path(__file__).resolve().parents[2]


def supported() -> list[str]:
    """Those that ``infra/lock.sh`` resolves for."""
    found = re.search(r"PYTHONS=\(([\d. ]+)\)", (REPO_ROOT / "infra/lock.sh").read_text(encoding="utf-8"))
    assert found is not None
    return found[1].split()


def test_lock_project_and_set_up_name_the_same_pythons() -> None:
    project = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    allowed = SpecifierSet(project["requires-python"])
    assert [minor for minor in range(8, 20) if f"3.{minor}.1" in allowed] == [
        int(version.removeprefix("3.")) for version in supported()
    ]
    script = (REPO_ROOT / "infra/setup.sh").read_text(encoding="utf-8")
    first, last = (version.replace(".", ", ") for version in (supported()[0], supported()[-1]))
    assert f"({first}) <= sys.version_info[:2] <= ({last})" in script
    assert all(f"python{version}" in script for version in supported())
    assert "--universal" in (REPO_ROOT / "requirements.lock").read_text(encoding="utf-8")[:300]


@pytest.mark.parametrize("python", ["/bin/false", "/no/such python"])
def test_a_python_that_does_not_do_is_named_before_any_work(tmp_path: Path, python: str) -> None:
    for name in ("infra/setup.sh", "requirements.lock", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPO_ROOT / name, tmp_path / name)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": python}
    done = subprocess.run(
        [tmp_path / "infra/setup.sh"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"set-up: Python 3.11, 3.12 or 3.13 is needed ({python} is none); name it with PYTHON=...\n"
    )
    assert not (tmp_path / ".venv").exists()

"""A project's history: git beside DVC, whose diffs and experiments compare with commits."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from components.common.errors import RetortError
from components.common.storage import write_text

REPO_ROOT = Path(__file__).resolve().parent.parent  # the checkout, or the image's folder

# What git calls when it runs a hook; here they would lead to that repository instead of the project's.
_ELSEWHERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_OBJECT_DIRECTORY")

IGNORED = [".retort/", "/outputs/", "/data/", "/images/", "/dvc_plots/", "/pipeline.yaml", "__pycache__/"]
DVC_IGNORED = ["/config.local", "/tmp", "/cache"]  # noqa: S108 - as 'dvc init' writes it, but not without git


def start(folder: Path, *, git: bool, ignored: Sequence[str] = ()) -> tuple[bool, str]:
    """Set up .gitignore, git and DVC in ``folder``, which gets a repository of its own unless it is in one.

    Args:
        folder: The project's folder, which exists.
        git: False leaves git alone, and DVC without history.
        ignored: More lines of .gitignore, such as ``pattern`` of images that lie in the project.

    Returns:
        Whether the repository was made here, so that its first commit is ours to make; and what a person
        has to know about history, in a line ('' if nothing).

    Raises:
        RetortError: when git or DVC refuses.
    """
    add_lines(folder / ".gitignore", [*IGNORED, *ignored])
    made, advice = False, ""
    if not git or shutil.which("git") is None:
        kind = "--no-scm"
        why = "without git" if not git else "git is not installed"
        advice = (
            f"{why}, so DVC has no diffs and experiments here; "
            "to have them later: git init && dvc config core.no_scm false"
        )
    elif (top := _repository(folder)) is None:
        _git(folder, "init", "--quiet")
        made, kind = True, ""
    else:
        kind = "" if top == folder.resolve() else "--subdir"
    _dvc_init(folder, kind)
    add_lines(folder / ".dvc/.gitignore", DVC_IGNORED)
    add_lines(folder / ".dvcignore", (REPO_ROOT / ".dvcignore").read_text(encoding="utf-8").splitlines())
    return made, advice


def commit(folder: Path, names: Sequence[str], message: str) -> bool:
    """Commit these files of ``folder``, if git knows in whose name; returns whether it did."""
    known = subprocess.run(
        ["git", "-C", os.fspath(folder), "config", "user.email"], capture_output=True, check=False
    )
    if known.returncode != 0 and "GIT_AUTHOR_EMAIL" not in os.environ:
        return False
    try:
        _git(folder, "add", "--", *names)
        _git(folder, "commit", "--quiet", "--no-verify", "--no-gpg-sign", "--message", message)
    except RetortError:  # such as a name that git asks for; the files are there, a person can commit them
        return False
    return True


def add_lines(file: Path, lines: Sequence[str]) -> None:
    """Add what a file of patterns lacks; what stands in it already is a person's and stays."""
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    missing = [line for line in lines if line not in before.splitlines()]
    if missing:
        joint = "" if not before or before.endswith("\n") else "\n"
        write_text(file, before + joint + "\n".join(missing) + "\n")


def pattern(folder: Path, place: Path) -> str:
    """The line of .gitignore for a folder ``place`` below ``folder``."""
    below = place.resolve().relative_to(folder.resolve()).as_posix()
    return "/" + re.sub(r"([\\*?\[ ])", r"\\\1", below) + "/"


def _repository(folder: Path) -> Path | None:
    """The top of the repository that the project would be a part of; None: it needs its own.

    Own data are no part of Retort's checkout, and what a repository ignores cannot be kept in it.
    """
    asked = _asked(folder, "rev-parse", "--show-toplevel")
    if asked.returncode != 0:
        said = _last_line(asked.stderr)
        if "not a git repository" in said:
            return None
        raise RetortError(f"{folder}: git says: {said}; mend that, or give --no-git")
    top = Path(asked.stdout.removesuffix("\n")).resolve()
    if top == folder.resolve():
        return top
    ignored = _asked(folder, "check-ignore", "--quiet", ".").returncode == 0
    return None if ignored or top == REPO_ROOT else top


def _dvc_init(folder: Path, kind: str) -> None:
    if (folder / ".dvc").exists():
        return
    words = ["init", "--quiet", *filter(None, [kind])]
    made = subprocess.run(
        [sys.executable, "-m", "dvc", *words],
        cwd=folder,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        raise RetortError(f"{folder}: 'dvc {' '.join(words)}' failed: {_last_line(made.stderr)}")
    subprocess.run(
        [sys.executable, "-m", "dvc", "config", "core.analytics", "false"],
        cwd=folder,
        env=_environment(),
        check=True,
    )


def _git(folder: Path, *words: str) -> None:
    done = _asked(folder, *words)
    if done.returncode != 0:
        raise RetortError(f"{folder}: 'git {words[0]}' failed: {_last_line(done.stderr)}; or give --no-git")


def _asked(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", "-C", os.fspath(folder), *words],
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def _environment() -> dict[str, str]:
    """The environment for git and DVC: in English, without another repository's words, without telemetry."""
    kept = {name: value for name, value in os.environ.items() if name not in _ELSEWHERE}
    return {**kept, "LC_ALL": "C.UTF-8", "LANGUAGE": "C", "DVC_NO_ANALYTICS": "1"}


def _last_line(text: str) -> str:
    return (text.strip() or "no reason given").splitlines()[-1]

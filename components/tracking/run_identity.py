"""Which pipeline run a step belongs to, whose code ran, and which steps it took the products of."""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.common.storage import read_own_json, sha256_json, state_dir, write_json
from components.tracking.versioned import names_of_run

REMEMBERED_RUNS = 50


def pipeline_run(step: str, uri: str, experiment: str) -> dict[str, Any]:
    """What the parent run is called and known by; the same for all steps of one pipeline run.

    The key is ``$RETORT_RUN`` (set by the KFP components), else the ``dvc`` process above this one, else
    this process. A run that KFP opened itself (``$MLFLOW_RUN_ID``) is adopted: its MLflow plugin opens one
    for the pipeline and one for each task, and names the task's.
    """
    adopt = os.environ.get("MLFLOW_RUN_ID", "")
    run = os.environ.get("RETORT_RUN") or adopt
    dvc = None if run else _dvc_above()
    if run:
        key, command = f"run:{run}", "retort submit"
    elif dvc:
        key, command = dvc
    else:
        key, command = _process_key("process", os.getpid()), f"retort {step}"
    stable_id = sha256_json([key, uri, experiment])[:32]
    known = read_own_json(state_dir() / "run.json").get(stable_id)
    if known:
        return {**known, "adopt": adopt}  # of this task, not of one before that shares the folder
    commit, dirty = git_state()
    revision = f" {commit[:7]}{'+' if dirty else ''}" if commit else ""
    started = time.time()
    when = time.strftime("%m-%d %H:%M", time.localtime(started))
    record = {
        "id": stable_id,
        "key": key,
        "adopt": adopt,
        "name": f"{command} {when}{revision}",  # told apart in the narrow legends of charts too
        "command": command,
        "started": int(started * 1000),
        "commit": commit,
        "dirty": dirty,
        "uri": uri,
        "run_id": "",
        "tags": names_of_run(),
    }
    remember(record)
    return record


def _process_key(kind: str, pid: int) -> str:
    import psutil

    return f"{kind}:{socket.gethostname()}:{pid}:{psutil.Process(pid).create_time():.2f}"


def _dvc_above() -> tuple[str, str] | None:
    """Key and command of the nearest ancestor that is ``dvc``; None when there is none."""
    import psutil

    try:
        for process in psutil.Process().parents():
            words = process.cmdline()
            names = [Path(word).name for word in words[:3]]
            if "dvc" in names and (names[0] == "dvc" or names[0].startswith("python")):
                verbs = [word for word in words[names.index("dvc") + 1 :] if not word.startswith("-")]
                return _process_key("dvc", process.pid), " ".join(["dvc", *verbs[:1]])
    except psutil.Error:  # it ended meanwhile, or is another user's
        return None
    return None


def remember(record: dict[str, Any]) -> None:
    """Keep the pipeline's run in ``.retort/run.json``, by its stable id."""
    from filelock import FileLock

    path = state_dir() / "run.json"
    with FileLock(path.with_name("run.json.lock")):
        runs = {**read_own_json(path), record["id"]: record}
        for stable_id in sorted(runs, key=lambda name: runs[name]["started"])[:-REMEMBERED_RUNS]:
            del runs[stable_id]
        write_json(path, runs)


def origin(record: Mapping[str, Any]) -> dict[str, str]:
    """Tags that say which code ran, and who ran it."""
    tags = {}
    if record["commit"]:
        tags = {"mlflow.source.git.commit": record["commit"], "git.dirty": str(record["dirty"]).lower()}
    tags["mlflow.user"] = user()
    return tags


def in_kubeflow() -> bool:
    """Whether KFP runs this process for a component."""
    return os.environ.get("_KFP_RUNTIME") == "true"


def user() -> str:
    """The name of whoever runs this process; a container's user may have none but a number."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def git_state() -> tuple[str, bool]:
    """Commit, and whether tracked files differ from it; ``("", False)`` outside a repository.

    An image says in ``RETORT_COMMIT`` of which commit it was built.
    """
    if built := os.environ.get("RETORT_COMMIT", ""):
        return built, False

    def git(*words: str) -> str:
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(["git", *words], capture_output=True, text=True, env=environment, timeout=5)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return commit, bool(commit and git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.TimeoutExpired):
        return "", False


def reused_steps(inputs: Mapping[str, str], out: Path, parent_id: str) -> dict[str, str]:
    """Steps whose products this one read, directly or not, and that this pipeline run did not run itself.

    Read from what the steps left beside each other, in the folder of the working directory that ``out`` lies
    in: ``run.json`` says who made a folder, ``report.json`` which files went into it. Maps the step to the id
    of its MLflow run.
    """
    own = Path(os.path.relpath(out))  # reports name files from here, too
    if own.parts[:1] in ((), ("..",)):
        return {}
    root = Path(own.parts[0])
    makers: dict[Path, dict[str, Any]] = {}
    for path in (*root.glob("*/run.json"), *root.glob("*/*/run.json")):
        makers[path.parent] = read_own_json(path)
    reused: dict[str, str] = {}
    seen: set[Path] = {own}
    labels = list(inputs)
    while labels:
        label = labels.pop()
        folder = _maker(label, makers)
        if folder is None or folder in seen:
            continue
        seen.add(folder)
        if makers[folder].get("parent_id") != parent_id:
            reused[makers[folder].get("step", folder.name)] = makers[folder].get("run_id", "")
        labels += read_own_json(folder / "report.json").get("inputs", {})
    return dict(sorted(reused.items()))


def _maker(label: str, makers: Mapping[Path, dict[str, Any]]) -> Path | None:
    """The step's folder that the file called ``label`` came from."""
    for folder, made in makers.items():
        if label in made.get("made", []):
            return folder
    return next((folder for folder in Path(label).parents if folder in makers), None)

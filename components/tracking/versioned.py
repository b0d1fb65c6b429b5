"""Who else knows of a step: DVC, whose lock file says what it left, and Kubeflow, whose run it is part of."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

PAGE = "RETORT_RUN_PAGE"  # the address of Kubeflow's page of a run, with RUN where its id goes


def kept_by_dvc() -> dict[str, str]:
    """Tags ``dvc.PATH``: the hash of each output, as ``dvc.lock`` will hold it when this stage is over.

    DVC names the stage that runs in ``DVC_STAGE``; empty without it.
    """
    name = os.environ.get("DVC_STAGE", "").rpartition(":")[2]
    if not name:
        return {}
    try:
        return {f"dvc.{path}": _hash(Path(path)) for path in _outs(name) if Path(path).exists()}
    except (ImportError, OSError) as error:  # DVC runs in another environment
        log.info(f"tracking: no tags of what DVC keeps: {error}")
        return {}


def names_of_run() -> dict[str, str]:
    """Tags of a pipeline's run: DVC's experiment; Kubeflow's run, and its page there."""
    tags = {}
    if experiment := os.environ.get("DVC_EXP_NAME", ""):
        tags["dvc.exp"] = experiment
    if run := os.environ.get("RETORT_RUN", ""):
        tags["kfp.run_id"] = run
        if page := os.environ.get(PAGE, ""):
            tags["kfp.run_page"] = page.replace("/RUN", f"/{run}")
    return tags


def _outs(stage: str) -> Iterator[str]:
    """What ``dvc.yaml``, in whose folder DVC runs its commands, names as outputs of a stage."""
    from ruamel.yaml import YAML

    stages = (YAML(typ="safe").load(Path("dvc.yaml")) or {}).get("stages", {})
    for out in stages.get(stage, {}).get("outs", []):
        yield from [out] if isinstance(out, str) else out  # with settings it is a mapping


def _hash(path: Path) -> str:
    """DVC's hash of a file, or of a folder ('.dir' at the end), by DVC's own code."""
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db import HashFileDB
    from dvc_objects.fs import LocalFileSystem

    disk = LocalFileSystem()
    place = os.fspath(path.absolute())
    _, _, found = build(HashFileDB(disk, place), place, disk, "md5", dry_run=True)
    return str(found.hash_info.value)

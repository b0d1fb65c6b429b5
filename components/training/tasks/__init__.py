"""What can be learnt, by name: a phase of ``spec.TrainSpec`` names one, ``distill.method`` one of METHODS.

Tasks stand here by their import paths, so that parameters are checked where there is no torch.
"""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from components.training.tasks.base import Task

METHODS = {
    "ssld": "components.training.tasks.ssld:SSLD",
    "js": "components.training.tasks.jensen_shannon:JensenShannon",
    "kd": "components.training.tasks.kd:KnowledgeDistillation",
    "dkd": "components.training.tasks.dkd:DecoupledKD",
    "dist": "components.training.tasks.dist:DIST",
    "deit": "components.training.tasks.deit:DeiT",
    "deit_soft": "components.training.tasks.deit:SoftDeiT",
    "feature": "components.training.tasks.feature:Feature",
}
TASKS = {"labels": "components.training.tasks.labels:Labels", **METHODS}


def task_of(name: str) -> type[Task]:
    """The task that a phase names."""
    task: type[Task] = pkgutil.resolve_name(TASKS[name])
    return task

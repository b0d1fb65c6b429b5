"""What can be learnt, by name: a phase of ``spec.TrainSpec`` names one."""

from __future__ import annotations

from components.training.tasks.base import Learnt, Setup, Task
from components.training.tasks.distillation import JensenShannon
from components.training.tasks.labels import Labels

TASKS: dict[str, type[Task]] = {
    "labels": Labels,
    "ssld": JensenShannon,
}

__all__ = ["TASKS", "Learnt", "Setup", "Task"]

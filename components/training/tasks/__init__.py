"""What can be learnt, by name: a phase of ``spec.TrainSpec`` names one."""

from __future__ import annotations

from components.training.tasks.base import Learnt, Setup, Task
from components.training.tasks.jensen_shannon import JensenShannon
from components.training.tasks.kd import KnowledgeDistillation
from components.training.tasks.labels import Labels
from components.training.tasks.ssld import SSLD

TASKS: dict[str, type[Task]] = {
    "labels": Labels,
    "ssld": SSLD,
    "js": JensenShannon,
    "kd": KnowledgeDistillation,
}

__all__ = ["TASKS", "Learnt", "Setup", "Task"]

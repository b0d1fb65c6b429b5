"""What can be learnt, by name: a phase of ``spec.TrainSpec`` names one."""

from __future__ import annotations

from components.training.tasks.base import Learnt, Setup, Task
from components.training.tasks.deit import DeiT, SoftDeiT
from components.training.tasks.dist import DIST
from components.training.tasks.dkd import DecoupledKD
from components.training.tasks.feature import Feature
from components.training.tasks.jensen_shannon import JensenShannon
from components.training.tasks.kd import KnowledgeDistillation
from components.training.tasks.labels import Labels
from components.training.tasks.ssld import SSLD

TASKS: dict[str, type[Task]] = {
    "labels": Labels,
    "ssld": SSLD,
    "js": JensenShannon,
    "kd": KnowledgeDistillation,
    "dkd": DecoupledKD,
    "dist": DIST,
    "deit": DeiT,
    "deit_soft": SoftDeiT,
    "feature": Feature,
}

__all__ = ["TASKS", "Learnt", "Setup", "Task"]

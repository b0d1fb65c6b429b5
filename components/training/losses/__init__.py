"""Losses of labels that the plan may ask for. What a student learns of its teacher is in ``tasks``.

A loss is a file of its name here, whose ``LOSS`` is the class, and a line in ``LOSSES`` of
``components/audit/plan_schema.py``.
"""

from __future__ import annotations

from importlib import import_module

from components.audit.plan_schema import Plan
from components.common.errors import RetortError
from components.training.losses.base import Loss
from components.training.losses.cross_entropy import CrossEntropy

__all__ = ["CrossEntropy", "Loss", "from_plan"]


def from_plan(plan: Plan, class_num: int, smoothing: float = 0.0) -> Loss:
    """The loss that the plan asks for, with label smoothing.

    Raises:
        RetortError: naming the plan's key, when an argument is unknown or makes no sense.
    """
    kind: type[Loss] = import_module(f"{__name__}.{plan.loss.name}").LOSS
    try:
        return kind.of_plan(plan, class_num, smoothing, **plan.loss.arguments)
    except (TypeError, ValueError) as error:
        raise RetortError(f"plan: loss.arguments of '{plan.loss.name}': {error}") from None

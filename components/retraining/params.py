"""The section ``retrain`` of params.yaml, and what each step of retraining reads."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from components.audit.params import Audit
from components.common.params import Section, StepParams
from components.dataset.params import Data, Validate
from components.export.params import Export
from components.models.params import Net
from components.tools.params import ExpandParams
from components.training.params import Distill, Ray


class Retrain(Section):
    from_original: Literal["auto", "always", "never"] = Field(
        "auto",
        description="whether teacher and student are trained from their start weights as well, beside the "
        "champion that learns on; auto: when budget_minutes allows it",
    )
    budget_minutes: float | None = Field(
        None, gt=0, description="for all trainings of one retraining; null: as long as they take"
    )
    epochs: int | None = Field(
        None, ge=1, description="in which the champion learns on; null: student.train.epochs"
    )
    lr: float = Field(0.1, gt=0, le=1, description="share of student.lr.initial that it learns on with")
    max_disagreement: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of new labels, beyond that of old ones, that the champion may contradict while "
        "the images look as before; above it nothing is trained",
    )


class ChangesParams(StepParams):
    """All that can change what a retraining leaves."""

    data: Data = Field(default_factory=Data)
    validation: Validate = Field(default_factory=Validate, alias="validate")
    audit: Audit = Field(default_factory=Audit)
    teacher: Net = Field(default_factory=Net)
    student: Net = Field(default_factory=Net)
    distill: Distill = Field(default_factory=Distill)
    export: Export = Field(default_factory=Export)
    retrain: Retrain = Field(default_factory=Retrain)
    ray: Ray = Field(default_factory=Ray)


class DecideParams(StepParams):
    data: Data = Field(default_factory=Data)
    student: Net = Field(default_factory=Net)
    retrain: Retrain = Field(default_factory=Retrain)


class UpdateParams(ExpandParams):
    retrain: Retrain = Field(default_factory=Retrain)

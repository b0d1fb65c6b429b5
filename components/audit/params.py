"""The section ``audit`` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from components.audit.plan_schema import LOSSES
from components.common.params import Section, StepParams, named
from components.dataset.params import Data

Share = Annotated[float, Field(ge=0)]


class Audit(Section):
    imbalance_ratio: float = Field(
        4.0, gt=1, description="largest class to smallest, above which the plan balances"
    )
    min_per_class: int = Field(20, ge=1, description="training images below which a class is named")
    blow_up: float = Field(
        3.0, gt=1, description="synthetic images to the median size of the other classes: a blow-up above it"
    )
    recognisable_recall: float = Field(
        0.7, ge=0, le=1, description="share of a class's synthetic images that a real model must recognise"
    )
    distribution: Literal["auto", "natural", "square_root", "uniform"] | list[Share] = Field(
        "auto", description="wanted distribution of classes in an epoch, or one share a class"
    )
    loss: Annotated[str, named(LOSSES, "auto")] = Field(
        "auto", description="loss that the plan asks for; auto: what the imbalance suggests"
    )
    probe_images: int = Field(
        20_000, ge=100, description="images that the synthetic audit looks at, spread over the classes"
    )
    drop_suspects: bool = Field(
        False, description="true: the plan leaves out rows with suspect labels and unrecognisable images"
    )


class AuditParams(StepParams):
    data: Data = Field(default_factory=Data)
    audit: Audit = Field(default_factory=Audit)

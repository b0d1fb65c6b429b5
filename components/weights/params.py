"""What the step ``weights`` reads: both networks."""

from __future__ import annotations

from pydantic import Field

from components.common.params import StepParams
from components.dataset.params import Data
from components.models.params import Net


class WeightsParams(StepParams):
    data: Data = Field(default_factory=Data)  # data.s3: where s3:// weights lie
    teacher: Net = Field(default_factory=Net)
    student: Net = Field(default_factory=Net)

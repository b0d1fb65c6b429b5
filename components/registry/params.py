"""What the step ``register`` reads beside the section ``registry`` (which every step reads)."""

from __future__ import annotations

from pydantic import Field

from components.common.params import StepParams
from components.dataset.params import Data


class RegisterParams(StepParams):
    data: Data = Field(default_factory=Data)

"""What the commands that are no step read of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from components.common.params import Section, StepParams, named
from components.dataset.params import Data
from components.models.recipes import RECIPES
from components.training.params import TwoNetsParams


class Expand(Section):
    mode: Literal["all", "new_rows"] = Field(
        "all", description="what is trained: the whole network, or only the new rows of its classifier"
    )
    old_classes: list[str] | None = Field(
        None, min_length=1, description="old classes to keep, with their images; null: all"
    )
    epochs: int | None = Field(None, ge=1, description="null: train.epochs of the network")
    lr: float = Field(
        0.1, gt=0, le=1, description="share of the network's lr.initial that training starts with"
    )
    control: bool = Field(True, description="train the other way too, and report the difference")


class CompareWeights(Section):
    of: Literal["teacher", "student"] = Field(
        "teacher", description="the network whose weights are compared, finetuned with its settings"
    )
    candidates: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], str] = Field(
        default={},
        description="more weights, by a name: {100k: ResNet50_vd_10w_pretrained.tar}; the network's own, "
        "random ones and the champion are always compared",
    )
    seeds: int = Field(3, ge=1, description="finetunes of each; with one there is no interval, and no claim")
    epochs: int | None = Field(None, ge=1, description="of each finetune; null: train.epochs of the network")
    split: Literal["val", "test"] = Field("val", description="the images on which they are compared")


def _span(values: list[float]) -> list[float]:
    if len(values) not in (0, 2):
        raise PydanticCustomError("no_span", "expected two numbers, from - to, or [] for none")
    if values != sorted(values):
        raise PydanticCustomError("not_rising", "the first number must not be above the second")
    return values


_Share = Annotated[list[Annotated[float, Field(ge=0, le=1)]], AfterValidator(_span)]
_Positive = Annotated[list[Annotated[float, Field(gt=0)]], AfterValidator(_span)]


class Tune(Section):
    of: Literal["teacher", "student"] = Field(
        "student", description="the network whose recipe is searched, trained on labels with its settings"
    )
    trials: int = Field(16, ge=2, description="recipes that are tried; the first is the fixed one")
    epochs: int | None = Field(
        None, ge=1, description="of a trial that is not stopped, and of the comparison; null: train.epochs"
    )
    first_epochs: int = Field(1, ge=1, description="epochs before a trial may be stopped (ASHA)")
    reduction: float = Field(3.0, gt=1, description="of so many trials one goes on at each rung (ASHA)")
    seeds: int = Field(
        3, ge=1, description="trainings of the best and of the fixed recipe; with one nothing is claimed"
    )
    lr: _Positive = Field([0.1, 10.0], description="factors of lr.initial, from - to; []: as it is")
    weight_decay: _Positive = Field(
        [1e-5, 0.1], description="optimizer.weight_decay, from - to; []: as it is"
    )
    label_smoothing: _Share = Field([0.0, 0.2], description="train.label_smoothing, from - to; []: as it is")
    mixup: _Share = Field([0.0, 0.8], description="train.mixup, from - to; []: as it is")
    augment: list[Annotated[str, named(RECIPES)]] = Field(
        ["light", "standard", "strong"], description="train.augment, some of them; []: as it is"
    )


class ExpandParams(TwoNetsParams):
    expand: Expand = Field(default_factory=Expand)


class CompareWeightsParams(TwoNetsParams):
    compare_weights: CompareWeights = Field(default_factory=CompareWeights)


class TuneParams(TwoNetsParams):
    tune: Tune = Field(default_factory=Tune)


class ShadowParams(StepParams):
    """What ``shadow`` reads: where a manifest's images lie, and which store holds a bucket."""

    data: Data = Field(default_factory=Data)

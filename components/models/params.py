"""The sections ``teacher`` and ``student``: a network, its weights, and how it is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from components.common.params import Place, Section, named
from components.models.recipes import RECIPES


class Head(Section):
    bottleneck: int | None = Field(
        None, ge=1, description="width of a narrow FC before the last one; null: none"
    )


class Arch(Section):
    name: str = Field("tf_efficientnet_lite0", description="any timm name, or one of our variants")
    head: Head = Field(default_factory=Head, description="the classifier on top of the backbone")
    blocks: Literal["plain", "acb"] = Field(
        "plain", description="acb: square convolutions train as d x d + 1 x d + d x 1"
    )


class LearningRate(Section):
    initial: float = Field(0.02, gt=0, description="for the total batch, at the end of the warm-up")
    schedule: Literal["cosine", "constant", "step"] = Field("cosine", description="after warm-up")
    warmup_epochs: float = Field(0.5, ge=0, description="epochs of linear rise from zero")


class Optimizer(Section):
    name: Literal["sgd", "adamw", "lamb", "rmsproptf"] = Field(
        "sgd", description="timm's of that name; sgd: with Nesterov momentum"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd and rmsproptf; beta1 of adamw and lamb")
    weight_decay: float = Field(
        1e-4, ge=0, description="not applied to biases, norms and position embeddings"
    )
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="factor of the rate from each layer to the one before it; null: none"
    )
    stage_rates: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None,
        description="factors of the rate for equal parts of the backbone, the input's first; []: none; null: "
        "the published ones where the start weights were themselves distilled, else none",
    )
    clip_norm: float | None = Field(
        None, gt=0, description="largest norm of a step's gradient, which is scaled down to it; null: any"
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Optimizer:
        if self.layer_decay is not None and self.stage_rates:
            raise PydanticCustomError("both", "layer_decay and stage_rates both scale the rate; set one")
        return self


class Train(Section):
    epochs: int = Field(4, ge=1, description="passes over the training rows, as the plan weighs them")
    time_budget_minutes: float | None = Field(
        None,
        gt=0,
        description="of finetune or distill as a whole: as many of the epochs as fit; null: all of them",
    )
    batch_size: int = Field(32, ge=1, description="images per Ray worker and step")
    num_workers: int = Field(
        0, ge=0, description="loader processes per Ray worker; 0: none, and threads where images are decoded"
    )
    augment: Annotated[str, named(RECIPES)] = Field(
        "light",
        description="light: shift, scale, contrast; flip: light and mirror; standard: random crop, mirror, "
        "colour; strong: TrivialAugment, MixUp, CutMix; deit: RandAugment, MixUp, CutMix",
    )
    mixup: float | None = Field(
        None, ge=0, description="alpha of MixUp, 0: none; null: as the recipe of augment has it"
    )
    cutmix: float | None = Field(
        None, ge=0, description="alpha of CutMix, 0: none; null: as the recipe of augment has it"
    )
    label_smoothing: float | None = Field(
        None, ge=0, lt=1, description="share of a label spread over all classes; null: as the recipe has it"
    )
    repeats: int | None = Field(
        None, ge=1, description="views of an image in one batch; null: as the recipe of augment has it"
    )
    image_size: int | None = Field(
        None,
        ge=16,
        le=1024,
        description="pixels a side while training, if fewer than when the model is used; null: "
        "global.image_size",
    )
    keep: Literal["best", "last"] = Field(
        "best", description="which epoch is kept: the highest macro recall on validation, or the last"
    )
    patience: int | None = Field(
        None, ge=1, description="epochs without a better one after which a phase ends; null: it never does"
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of a moving average of the weights, which is kept; null: none"
    )
    checkpoint_minutes: float = Field(
        30,
        gt=0,
        description="after so long in an epoch a checkpoint is kept, beside the one after each epoch",
    )
    precision: Literal["auto", "float32", "bf16"] = Field(
        "auto", description="of forward and backward passes; auto: bf16 on a GPU that has it, else float32"
    )
    deterministic: bool | None = Field(
        None, description="the same bytes from every run; null: on a CPU, where it costs nothing"
    )
    compile: bool | None = Field(
        None, description="torch.compile; null: on a GPU, where the training is long enough to gain by it"
    )


class Valid(Section):
    batch_size: int = Field(64, ge=1, description="images per Ray worker and step")
    num_workers: int = Field(
        0, ge=0, description="loader processes per Ray worker; 0: none, and threads where images are decoded"
    )


class Net(Section):
    arch: Arch = Field(default_factory=Arch, description="the network")
    weights: Annotated[str, Place(anywhere=True)] = Field(
        "none",
        description="package:NAME, file, folder, tar, timm:MODEL.TAG, hf:OWNER/NAME, s3://..., https://..., "
        "or none",
    )
    weights_sha256: str | None = Field(
        None,
        pattern="^[0-9a-fA-F]{64}$",
        description="sha256 of the weights file; null: recorded with the first download, then held to",
    )
    coverage: float = Field(1.0, ge=0, le=1, description="share of the backbone that weights must cover")
    lr: LearningRate = Field(default_factory=LearningRate, description="learning rate")
    optimizer: Optimizer = Field(default_factory=Optimizer, description="optimizer")
    train: Train = Field(default_factory=Train, description="training loop")
    valid: Valid = Field(default_factory=Valid, description="validation loop")

"""The sections ``data`` and ``validate`` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from components.common.params import Place, Section, StepParams


class Splits(Section):
    val: float = Field(0.2, gt=0, lt=1, description="share of real labelled images for validation")
    test: float = Field(0.2, gt=0, lt=1, description="share of real labelled images for the test")

    @model_validator(mode="after")
    def _leave_some(self) -> Splits:
        if self.val + self.test >= 1:
            raise PydanticCustomError("no_training", "val and test together leave nothing for training")
        return self


class S3(Section):
    endpoint_url: str | None = Field(
        None, description="any S3-compatible store; null: what the standard chain says"
    )
    region: str | None = Field(None, description="null: what the standard chain says")
    cache_gb: float | None = Field(
        None,
        gt=0,
        description="of images kept on a machine's disk, the least recently used go first; null: all, "
        "in a pod as many as fit into half of kubeflow.scratch",
    )


class Data(Section):
    source: Annotated[str | dict[str, str], Place(anywhere=True)] = Field(
        "digits",
        description="image folder, list file ({train: F, val: F}: one a split), s3://bucket/prefix, "
        "a manifest.parquet, or digits (embedded)",
    )
    root: str = Field("data/images", description="paths in the manifest are relative to this folder")
    class_names: Annotated[str | None, Place(anywhere=False)] = Field(
        None,
        description="file with one class name a line (line n names label n, beginning with 0), or "
        "'label name' a line",
    )
    group: str | None = Field(
        None,
        description="pattern with one capture, or a column: images of one group stay in one split",
    )
    corrections: Annotated[str | None, Place(anywhere=False)] = Field(
        None, description="CSV of verdicts on suspect labels: path,label or path,drop"
    )
    splits: Splits = Field(default_factory=Splits, description="used where the source has no splits")
    synthetic: list[str] = Field(default=[], description="globs below root: synthetic images")
    semi_synthetic: list[str] = Field(default=[], description="globs below root: semi-synthetic images")
    unlabeled: list[str] = Field(
        default=[], description="globs below root: images without a label, for distillation"
    )
    remap_labels: bool = Field(False, description="number labels 0..n-1 without gaps; the mapping is saved")
    s3: S3 = Field(default_factory=S3, description="where s3:// sources lie; keys: standard chain")


class Validate(Section):
    images: Literal["all", "none"] | Annotated[int, Field(ge=1)] = Field(
        "all", description="images to decode and check: all, none, or a number of them"
    )
    near_duplicate_bits: int = Field(
        6, ge=0, le=16, description="Hamming distance of perceptual hashes that proposes a pair"
    )
    quality: bool = Field(
        True, description="name images that are blurry, dark, over-exposed, flat, or hold little information"
    )
    max_bad_share: float = Field(
        0.1, ge=0, le=1, description="share of quarantined rows above which the step fails"
    )
    baseline: Annotated[str | None, Place(anywhere=False)] = Field(
        None,
        description="an earlier manifest, or the counts.parquet that validate left of one: drift is reported",
    )


class IngestParams(StepParams):
    data: Data = Field(default_factory=Data)


class ValidateParams(StepParams):
    data: Data = Field(default_factory=Data)
    validation: Validate = Field(default_factory=Validate, alias="validate")

"""The sections ``distill``, ``ray``, ``expand``, ``compare_weights`` and ``tune``; what each step reads."""

from __future__ import annotations

import socket
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from components.common.errors import ConfigError
from components.common.params import Place, Section, StepParams, named
from components.dataset.params import Data
from components.models.params import Net
from components.training.tasks import METHODS

QUANTITY = r"^\d+(\.\d+)?([EPTGMK]i?)?$"  # bytes as Kubernetes writes them: 8Gi, 500M


class Ray(Section):
    address: str = Field(
        "",
        description="empty: a local cluster, started and stopped; auto, or ray://HOST:PORT; kuberay: each "
        "training step of the pipeline starts a cluster of its own on Kubernetes, as a RayJob",
    )
    workers: int = Field(2, ge=1, description="training processes (DistributedDataParallel)")
    cpus_per_worker: float = Field(1, gt=0, description="cores, and torch threads, of each")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of each")
    max_failures: int = Field(2, ge=0, description="lost workers that training survives")
    stall_minutes: float = Field(
        10, gt=0, description="without a step, after which a run is stopped and the worker named"
    )
    price_per_hour: float | None = Field(
        None, ge=0, description="of the whole cluster, in any currency; with it, what training costs is said"
    )
    min_workers: int | None = Field(
        None,
        ge=1,
        description="with how few workers training goes on when nodes are lost, until others join; null: it "
        "waits until all ray.workers can run again",
    )
    storage: str = Field(
        "",
        description="URI that all nodes reach: s3://bucket/prefix or a shared folder; empty: this machine's "
        ".retort",
    )
    memory_per_worker: str = Field(
        "8Gi", pattern=QUANTITY, description="kuberay: memory of each worker's pod, its /dev/shm included"
    )
    head_cpus: float = Field(2, gt=0, description="kuberay: cores of the head's pod, in which the step runs")
    head_memory: str = Field("8Gi", pattern=QUANTITY, description="kuberay: memory of the head's pod")
    disk: str = Field(
        "20Gi", pattern=QUANTITY, description="kuberay: scratch disk of each pod, for images and checkpoints"
    )
    gpu_resource: str = Field("nvidia.com/gpu", description="kuberay: what nodes call their GPUs")
    start_minutes: float = Field(
        30, gt=0, description="kuberay: for pods and images to be there, after which the job is given up"
    )
    deadline_minutes: float = Field(1440, gt=0, description="kuberay: for the whole of one step's job")
    silence_minutes: float = Field(
        5,
        gt=0,
        description="kuberay: without a sign of life of the pipeline's pod, after which a job ends itself",
    )
    keep_minutes: float = Field(
        60, ge=0, description="kuberay: how long a failed job can be looked at, without its pods"
    )
    restarts: int = Field(1, ge=0, description="kuberay: new clusters after one that was lost with its head")
    queue: str = Field("", description="kuberay: Kueue's LocalQueue that jobs wait in; empty: none")

    @field_validator("address")
    @classmethod
    def _can_be_reached(cls, value: str) -> str:
        if value not in ("", "auto", "kuberay") and not value.startswith("ray://"):
            raise PydanticCustomError(
                "address", "expected '' (a local cluster), auto, ray://HOST:PORT or kuberay"
            )
        return value

    @model_validator(mode="after")
    def _shares_a_place(self) -> Ray:
        """A cluster elsewhere finds none of this machine's files; what it writes would not come back."""
        host = self.address.removeprefix("ray://").partition("/")[0].rpartition(":")[0].strip("[]")
        elsewhere = host and host not in ("localhost", "::1", socket.gethostname())
        if (
            self.address.startswith("ray://")
            and elsewhere
            and not host.startswith("127.")
            and not self.storage
        ):
            raise PydanticCustomError(
                "storage",
                "address {address} is another machine, and storage is empty: it shares neither a disk nor a "
                "bucket with this one; set ray.storage to s3://bucket/prefix, or to a folder that both mount",
                {"address": self.address},
            )
        return self


def refuse_kuberay(ray: Ray) -> None:
    """Raise ConfigError where nobody makes a cluster by KubeRay; its own entry point connects to ``auto``."""
    if ray.address == "kuberay":
        raise ConfigError(
            "ray.address: kuberay: such clusters are made for the pipeline's steps finetune, check, distill "
            "in their pods ('retort submit'); here, use '' for a local cluster, or ray://HOST:PORT"
        )


class Distill(Section):
    method: Annotated[str, named(METHODS, "auto")] = Field(
        "auto", description="what the student learns of the teacher; auto: by teacher, classes and data"
    )
    label_share: float | None = Field(
        None, ge=0, le=1, description="share of the labels' own loss, on images with labels; null: by method"
    )
    temperature: float | None = Field(
        None, gt=0, description="that softens both answers (kd, dkd, dist, deit_soft); null: by method"
    )
    teachers: Annotated[list[str], Place(anywhere=False)] = Field(
        default=[], description="folders of more teachers of the same classes: all answers are averaged"
    )
    committee: int | None = Field(
        None,
        ge=0,
        description="networks of the student's kind, trained on labels, whose answers are averaged with the "
        "teacher's; null: up to 4 where unlabelled images outnumber labelled ones, else none",
    )
    keep: Literal["better", "student"] = Field(
        "better", description="what is exported: the better of student and control, or the student"
    )
    seeds: int = Field(1, ge=1, description="trainings of student and control; from 3 on a gain is claimed")
    teacher_labels: Literal["cached", "online"] = Field(
        "cached",
        validate_default=True,
        description="soft labels once per crop, kept on disk; or at every step",
    )
    crops: int = Field(
        4, ge=1, description="augmented views per image whose soft labels are cached; epochs take turns"
    )
    top_k_labels: int | None = Field(
        None, ge=1, description="classes kept of each cached soft label; null: all up to 128 classes, else 20"
    )
    unlabeled_per_class: int = Field(
        100, ge=0, description="unlabelled images kept per class, the teacher's most confident first"
    )
    epochs: int | None = Field(None, ge=1, description="null: student.train.epochs")
    finetune_epochs: int = Field(
        1, ge=0, description="short finetune on the labelled data after distillation"
    )
    finetune_lr: float = Field(
        0.01, gt=0, le=1, description="share of student.lr.initial that the short finetune starts with"
    )
    finetune_size: int | None = Field(
        None,
        ge=16,
        le=1024,
        description="image size of the short finetune, and of the student then; null: global.image_size",
    )
    min_teacher_accuracy: float | None = Field(
        None,
        ge=0,
        le=1,
        description="top-1 on the validation split below which the gate closes; null: a fifth of the way "
        "from chance (one in as many as there are classes) to 1; macro recall is held to the latter, too",
    )
    reference_lr: float | None = Field(
        None, gt=0, description="initial learning rate used to train this student on ImageNet-1k"
    )
    reference_batch: int | None = Field(None, ge=1, description="total batch size of that rate")
    reference_optimizer: Literal["sgd", "adamw", "lamb", "rmsproptf"] | None = Field(
        None, description="optimizer of that rate, which says nothing of others; null: the student's"
    )
    control: bool = Field(
        True, description="train the same student without a teacher first, and compare the teacher with it"
    )
    control_epochs: int | None = Field(
        None,
        ge=1,
        description="of the control that the check trains; null: all, or a short one where that takes above "
        "ten minutes",
    )

    @field_validator("label_share")
    @classmethod
    def _for_both_heads(cls, value: float | None, info: ValidationInfo) -> float | None:
        method = str(info.data.get("method"))
        if method.startswith("deit") and value in (0.0, 1.0):
            raise PydanticCustomError(
                "one_head",
                "method {method} has a head for labels and one for the teacher: expected a number above 0 "
                "and below 1, or null",
                {"method": method},
            )
        return value

    @field_validator("teacher_labels")
    @classmethod
    def _holds_features(cls, value: str, info: ValidationInfo) -> str:
        if info.data.get("method") == "feature" and value == "cached":
            raise PydanticCustomError(
                "no_features",
                "method feature compares what both networks see, which is not kept on disk: expected online",
            )
        return value


class FinetuneParams(StepParams):
    data: Data = Field(default_factory=Data)
    teacher: Net = Field(default_factory=Net)
    ray: Ray = Field(default_factory=Ray)


class ShardParams(StepParams):
    data: Data = Field(default_factory=Data)
    ray: Ray = Field(default_factory=Ray)


class TwoNetsParams(FinetuneParams):
    student: Net = Field(default_factory=Net)


class CheckParams(TwoNetsParams):
    distill: Distill = Field(default_factory=Distill)


class DistillParams(CheckParams):
    """The same as the gate reads: what passed it is what is distilled."""

"""The base of all parameter sections, and the sections that every step reads."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from components.common import rules


class Section(BaseModel):
    """A section of ``params.yaml``: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class Place:
    """Marks a key whose value names where something lies, so that it can be asked who reaches that.

    Args:
        anywhere: whether a URI may stand there as well as a path; else it is read as a file in any case.
    """

    def __init__(self, *, anywhere: bool) -> None:
        self.anywhere = anywhere


def _known(rule: str) -> str:
    """A rule that nobody knows waives nothing, and would do so in silence."""
    if rule not in rules.RULES:
        near = rules.nearest(rule)
        mean = f"did you mean '{near}'?" if near else "docs/rules.md lists them"

        raise PydanticCustomError(
            "unknown_rule", "unknown rule '{rule}'; {mean}", {"rule": rule, "mean": mean}
        )
    return rule


def named(
    registry: Collection[str], *more: str, unwritten: Mapping[str, str] | None = None
) -> AfterValidator:
    """A validator of names: those in ``registry`` when a value is checked, and ``more``.

    Args:
        unwritten: names that a person may look for, and why they cannot be chosen.
    """

    def check(name: str) -> str:
        if name in more or name in registry:
            return name
        known = [*more, *registry]
        near = difflib.get_close_matches(name, known, n=1)
        reason = (unwritten or {}).get(name, "")
        if not reason and near:
            reason = f"did you mean '{near[0]}'?"
        raise PydanticCustomError(
            "unknown_name",
            "'{name}' is none of {known}{reason}",
            {"name": name, "known": ", ".join(known), "reason": f"; {reason}" if reason else ""},
        )

    return AfterValidator(check)


class Global(Section):
    seed: int = Field(7, ge=0, description="every random choice of every step follows from it")
    class_num: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="outputs of the classifier; auto: highest label + 1"
    )
    image_size: int = Field(
        224, ge=16, le=1024, description="height and width in pixels that the networks see"
    )


class Checks(Section):
    waive: list[Annotated[str, AfterValidator(_known)]] = Field(
        default=[], description="rule ids whose errors count as warnings, said in the report"
    )


class ReportSettings(Section):
    thumbnails: bool = Field(
        True, description="false keeps every user image out of reports and out of MLflow"
    )


class Registry(Section):
    tracking_uri: str = Field(
        "sqlite:///.retort/mlflow/mlflow.db",
        description="MLflow: a server's URL, or a SQLite file (the default)",
    )
    name: str = Field(
        "retort",
        pattern=r"""^[^/:'"]+$""",  # MLflow refuses the first two, and cannot search for the others
        description="MLflow experiment and registered model",
    )
    tolerance: float = Field(
        0.0,
        ge=0,
        le=1,
        description="top-1 that a challenger may lose at the lower end of its 95 % interval; 0: it must gain",
    )
    class_tolerance: float = Field(
        0.05,
        ge=0,
        le=1,
        description="recall of a class, or of a slice, that a challenger may lose",
    )
    equal_within: float = Field(
        0.01,
        ge=0,
        le=1,
        description="top-1 within which a smaller or faster challenger, or one of more classes, is an equal",
    )
    latency_tolerance: float = Field(
        0.5,
        ge=0,
        description="share by which a challenger may be slower, where benchmark.latency_budget_ms is null",
    )
    trial: bool = Field(
        True, description="try the registered bundle in a clean process before it can be champion"
    )
    notify: str = Field(
        "",
        description="what is told of each promotion, as JSON: a URL (may name ${VARIABLES}) or a command",
    )
    sign_key: Annotated[str | None, Place(anywhere=False)] = Field(
        None,
        description="PEM file of the elliptic curve key that signs a version; null: RETORT_SIGN_KEY, or "
        "nothing is signed",
    )
    sign_certificate: Annotated[str | None, Place(anywhere=False)] = Field(
        None, description="PEM file of the key's certificate and of its issuers; null: the bare key signs"
    )
    trusted_keys: Annotated[list[str], Place(anywhere=False)] = Field(
        default=[],
        description="PEM files, or folders of them: public keys, and certificates that may vouch for one",
    )
    require_signature: bool = Field(
        False, description="register and predict refuse what none of trusted_keys signed"
    )

    @field_validator("notify")
    @classmethod
    def _can_be_told(cls, value: str) -> str:
        import shlex

        scheme, separator, _ = value.partition("://")
        if separator and " " not in scheme and scheme not in ("http", "https"):
            raise ValueError("a URL begins with http:// or https://")
        try:
            shlex.split(value)
        except ValueError as error:
            raise ValueError(f"no command ({error}), and no URL") from None
        return value


class StepParams(BaseModel):
    """What a step is told. A step's own parameter class adds the sections that it reads.

    DVC's ``params:`` and the inputs of the KFP component follow from the fields of that class.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)

    general: Global = Field(default_factory=Global, alias="global")
    checks: Checks = Field(default_factory=Checks)
    report: ReportSettings = Field(default_factory=ReportSettings)
    registry: Registry = Field(default_factory=Registry)

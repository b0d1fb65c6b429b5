"""The plan: everything that the audits tell training, in one file a person can read and edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from components.common.errors import RetortError
from components.common.params import named
from components.common.storage import read_json, write_json

SCHEMA_VERSION = 1


class Sampling(BaseModel):
    """How often a row is drawn, beside 1.0 for a row that nothing speaks about.

    A row's weight is ``by_class[label] * by_source[label].get(source, 1.0)``. An epoch draws as many rows
    as there are training rows, with probability proportional to the weights. ``expected`` is what each
    class's count per epoch becomes by that, and ``counts`` what it was.
    """

    distribution: str = "natural"
    by_class: dict[int, float] = {}
    by_source: dict[int, dict[str, float]] = {}
    counts: dict[int, int] = {}
    expected: dict[int, float] = {}
    finding: str = ""


# Losses by name, with the arguments that the plan gives where audit.loss asks for one. Each is the module of
# that name in components/training/losses. What follows from the classes is worked out by balance.py.
LOSSES: dict[str, dict[str, Any]] = {
    "cross_entropy": {},
    "focal": {"gamma": 2.0},  # the paper's best
    "ohem": {"keep": 0.7},
    "class_balanced": {},
}


class Loss(BaseModel):
    """A loss of LOSSES and the arguments of its class; ``class_balanced`` has {beta, weights: {label: w}}."""

    name: Annotated[str, named(LOSSES)] = "cross_entropy"
    arguments: dict[str, Any] = {}
    finding: str = ""
    why: str = ""


class LeaveOut(BaseModel):
    """A training row (its path in the manifest) that training skips, and the finding that asked for it."""

    path: str
    finding: str


class Plan(BaseModel):
    """What training carries out. An unknown key is refused: a person may have edited the file.

    ``manifest`` is the sha256 of the clean manifest that was audited: labels and paths mean nothing in
    another. Empty: of whatever is trained on.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    manifest: str = ""
    sampling: Sampling = Sampling()
    loss: Loss = Loss()
    leave_out: list[LeaveOut] = []

    def write(self, path: Path) -> None:
        write_json(path, self.model_dump(mode="json"))


def read_plan(path: Path, manifest: str = "") -> Plan:
    """Read ``plan.json``.

    Args:
        manifest: sha256 of the clean manifest that is to be trained on; empty: any.

    Raises:
        RetortError: naming file and key, so that a person who edited the plan finds the mistake; or when it
            was made for another manifest.
    """
    try:
        plan = Plan.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RetortError(f"{path}: {key}: {first['msg']}") from None
    if plan.schema_version > SCHEMA_VERSION:
        raise RetortError(f"{path}: schema_version {plan.schema_version} is newer than {SCHEMA_VERSION}")
    if manifest and plan.manifest and plan.manifest != manifest:
        raise RetortError(
            f"{path}: was made for another clean manifest, whose labels may be others; run 'retort audit' "
            "again (or, where a person wrote the plan for this data, set its key 'manifest' to \"\")"
        )
    return plan

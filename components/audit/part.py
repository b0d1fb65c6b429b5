"""The parts of the plan: what each audit hands to the step that merges them."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from components.audit.plan_schema import LeaveOut, Loss, Sampling
from components.common.errors import RetortError
from components.common.findings import Finding
from components.common.storage import need, read_json, write_json

SCHEMA_VERSION = 1
FILE = "part.json"


class Part(BaseModel):
    """What both parts have: the audit's findings, so that the plan can say who asked for what.

    ``manifest`` is the sha256 of the clean manifest that was audited.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    manifest: str = ""
    findings: list[Finding] = []

    def write(self, path: Path) -> None:
        write_json(path, self.model_dump(mode="json"))


class ImbalancePart(Part):
    """The classes as they are, and the sampling and loss that their sizes alone ask for.

    ``names`` and ``train`` (training images by source) have one entry a label of ``labels``.
    """

    labels: list[int]
    names: list[str]
    train: dict[str, list[int]]
    sampling: Sampling = Sampling()
    loss: Loss = Loss()


class LeftOut(LeaveOut):
    """A row to leave out, with what it counts as."""

    label: int
    source: str


class SyntheticPart(Part):
    """Weights by source of classes that synthesis blew up, and rows to leave out."""

    by_source: dict[int, dict[str, float]] = {}
    leave_out: list[LeftOut] = []


P = TypeVar("P", bound=Part)


def read_part(kind: type[P], folder: Path, made_by: str) -> P:
    """Read ``part.json`` of an audit's folder.

    Raises:
        RetortError: when it is missing (naming the command ``made_by``), damaged, or newer than this program.
    """
    path = need(folder / FILE, made_by)
    content = read_json(path)
    version = content.get("schema_version", 0) if isinstance(content, dict) else 0
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise RetortError(f"{path}: schema_version {version} is newer than {SCHEMA_VERSION}")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RetortError(f"{path}: {key}: {first['msg']}; run 'retort {made_by}' again") from None

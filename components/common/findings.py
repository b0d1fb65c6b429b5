"""Findings: what a check says. A report is a step's list of findings and its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.common.errors import RetortError
from components.common.storage import read_json, write_json

SCHEMA_VERSION = 1
Level = Literal["error", "warning", "info"]
ORDER: dict[str, int] = {"error": 0, "warning": 1}


class Finding(BaseModel):
    """One thing that a rule says about one subject.

    ``measured`` and ``limit`` are in the rule's own unit, said in ``message``; ``row`` is that of the
    FAQ which the rule comes from, as ``docs/rules.md`` lists it. An error that leaves nothing to go on with
    is not ``waivable``; report.json does not repeat that.
    """

    model_config = ConfigDict(extra="ignore")

    rule: str
    level: Level
    subject: str
    measured: Any = None
    limit: Any = None
    waived: bool = False
    message: str
    advice: str = ""
    row: str = ""
    waivable: bool = Field(True, exclude=True)


class Report(BaseModel):
    """A step's findings, as ``report.json`` holds them. ``inputs`` maps each file read to its sha256."""

    model_config = ConfigDict(extra="ignore")

    schema_version: int = SCHEMA_VERSION
    step: str
    passed: bool = True
    inputs: dict[str, str] = {}
    findings: list[Finding] = []

    def add(self, finding: Finding, waive: Sequence[str] = ()) -> Finding:
        """Add a finding; an error whose rule is waived becomes a warning that says so."""
        if finding.level == "error" and finding.waivable and finding.rule in waive:
            finding = finding.model_copy(update={"level": "warning", "waived": True})
        self.findings.append(finding)
        self.passed = self.passed and finding.level != "error"
        return finding

    def loud(self) -> list[Finding]:
        """Errors, then warnings; in the order found within a level."""
        found = [finding for finding in self.findings if finding.level != "info"]
        return sorted(found, key=lambda finding: ORDER[finding.level])

    def notes(self) -> list[Finding]:
        """What asks for nothing: measured numbers, and what was done."""
        return [finding for finding in self.findings if finding.level == "info"]

    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]

    def write(self, path: Path) -> None:
        write_json(path, self.model_dump(mode="json"))


def read_report(path: Path) -> Report:
    """Raises RetortError when the file is missing, not a report, or newer than this program."""
    content = read_json(path)
    try:
        report = Report.model_validate(content)
    except ValidationError as error:
        raise RetortError(f"{path}: not a report ({error.errors()[0]['msg']})") from None
    if report.schema_version > SCHEMA_VERSION:
        raise RetortError(
            f"{path}: schema_version {report.schema_version} is newer than this program's {SCHEMA_VERSION}"
        )
    return report

"""A failed step's report, published by the step: Kubeflow keeps nothing of a failed task but its log."""

from __future__ import annotations

import os
import re
from pathlib import Path

from components.common import shared
from components.common.findings import Report
from components.common.object_store import Storage
from components.tracking.tracker import ARTIFACTS, MAX_ARTIFACT_BYTES, NOT_ARTIFACTS

RUNS = "runs"  # below the shared place: RUN/STEP/report.html
SECONDS = 30.0  # for all of it: a pod that is stopped has no more
SHOWN = 5  # errors that the last lines of the log name
LETTERS = 300  # of what each of them says


def wanted() -> bool:
    """Whether a failed step's report would be lost with its pod, or is to be shared."""
    return bool(os.environ.get("RETORT_RUN")) or shared.place() is not None


def publish(run: str, step: str, out: Path) -> str:
    """Copy the report in ``out``, with its pictures, to the shared place; returns where its page lies.

    Empty when nothing is shared, or the place could not take it, which is said in a warning.
    """
    place = shared.place()
    if place is None or not (out / "report.html").exists():
        return ""
    folder = f"{RUNS}/{_plain(os.environ.get('RETORT_RUN') or run)}/{_plain(step)}"
    files = [
        path
        for path in sorted(out.iterdir())
        if path.suffix in ARTIFACTS
        and path.name not in NOT_ARTIFACTS
        and path.is_file()
        and path.stat().st_size <= MAX_ARTIFACT_BYTES
    ]
    # the page last: whoever sees it finds all of it
    files.sort(key=lambda path: path.name == "report.html")

    def send(storage: Storage) -> bool:
        for path in files:
            storage.put(path, f"{folder}/{path.name}")
        return True

    return f"{place.uri}/{folder}/report.html" if place.attempt(send, SECONDS, insist=True) else ""


def last_lines(report: Report, pages: list[str]) -> str:
    """What the log of a failed step ends with: each error, shortly, and where its page lies."""
    errors = report.errors()
    lines = [f"{error.rule}: {_short(error.message)}" for error in errors[:SHOWN]]
    if len(errors) > SHOWN:
        lines.append(f"and {len(errors) - SHOWN} more errors")
    return "\n".join([*lines, *(f"report: {page}" for page in pages if page)])


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LETTERS else f"{line[: LETTERS - 3]}..."


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "run"

"""What commands beside the pipeline need of it: the plan, made for the data that there are now."""

from __future__ import annotations

import logging

from components.audit.plan_schema import read_plan
from components.common.findings import read_report
from components.common.storage import sha256_file
from pipelines.params import Params
from pipelines.steps import AUDIT, MAIN

log = logging.getLogger(__name__)


def make_plan_up_to_date(params: Params, command: str) -> None:
    """Run what stands before the plan and is missing, or was made for another manifest than there is now.

    Whether the source itself has changed is not looked at: that takes reading it.

    Args:
        command: the command that needs the plan, for the line that says what runs first.
    """
    manifest, clean = MAIN.path("ingest.manifest"), MAIN.path("validate.clean")
    features, plan = MAIN.path("weights.weights/features.onnx"), MAIN.path("plan.plan/plan.json")
    report = MAIN["validate"].folder / "report.json"

    def run(name: str, why: str, *stages: str) -> None:
        log.info(f"{command}: {why}: 'retort {name}' runs first")
        for stage in stages or [name]:
            MAIN.run(stage, params)

    if not clean.exists() and not manifest.exists():
        run("ingest", f"{manifest} is missing")
    if not clean.exists():
        run("validate", f"{clean} is missing")
    elif (
        manifest.exists()
        and report.exists()
        and read_report(report).inputs.get(str(manifest)) != sha256_file(manifest)
    ):
        run("validate", f"{manifest} is newer than {clean}")
    why = ""
    if not plan.exists():
        why = "is missing"
    elif read_plan(plan).manifest not in ("", sha256_file(clean)):  # empty: a person wrote it for this data
        why = "was made for other data"
    if why:
        if not features.exists():
            run("weights", f"{features} is missing")
        run("audit", f"{plan} {why}", *AUDIT)

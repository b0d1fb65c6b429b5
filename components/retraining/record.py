"""The step ``retrain record``: what a retraining came to, for a person and for the next one."""

from __future__ import annotations

import logging
from pathlib import Path

from components.common.params import StepParams
from components.common.storage import need, read_json
from components.registry.decision import verdict
from components.retraining.decision import FILE, read_decision
from components.retraining.memory import Seen, remember
from components.step import step

log = logging.getLogger(__name__)


def record(params: StepParams, *, decided: Path, chosen: Path, registered: Path, out: Path) -> None:
    """Remember what was seen, so that the same again is not trained; the report is one page for a person.

    Args:
        decided: folder of the step ``retrain decide``.
        chosen: folder of the step ``retrain choose``.
        registered: folder of ``register``.

    Raises:
        RetortError: when a file is missing, or the tracker does not answer.
    """
    with step("retrain-record", params, out, [decided / FILE, registered / "registered.json"]) as run:
        decision = read_decision(decided, "retrain decide")
        made = read_json(need(registered / "registered.json", "register"))
        metrics = read_json(need(chosen / "metrics.json", "retrain choose"))
        line = verdict(made["version"], made["alias"], made["champion"], made["reason"])
        run.page.text("What came of it", f"{made['name']} {line}.")
        rows = [
            ["why", decision.reason],
            ["champion before", "none" if decision.champion is None else f"v{decision.champion}"],
            ["champion now", "none" if made["champion"] is None else f"v{made['champion']}"],
            ["top-1, validation", f"{metrics['val']['top1']:.2%}"],
        ]
        if "top1" in metrics.get("test", {}):
            rows.append(["top-1, test", f"{metrics['test']['top1']:.2%}"])
        run.page.table("This retraining", ["", ""], rows)
        seen = {name: getattr(decision, name) for name in ("data", "code", "params", "rows", "clean")}
        remember(params.registry, Seen(**seen))
        run.tracker.tags({"retrain": line})
        log.info(f"{run.name}: {made['name']} {line}")

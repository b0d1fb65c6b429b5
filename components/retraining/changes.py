"""The step ``retrain changes``: is there anything that the last retraining did not see?"""

from __future__ import annotations

import logging
from pathlib import Path

import pyarrow.parquet as pq

from components.common.progress import counted
from components.common.storage import need, sha256_json
from components.dataset import manifest as manifests
from components.retraining import code
from components.retraining.decision import FILE, Decision
from components.retraining.memory import Memory, Seen, recall
from components.retraining.params import ChangesParams
from components.step import step

log = logging.getLogger(__name__)

# of a section: what changes no product, though the section does
FREE = {"data": {"root", "s3"}, "retrain": {"budget_minutes"}}
SECTIONS = ("general", "data", "validation", "audit", "teacher", "student", "distill", "export", "retrain")
PARTS = {"data": "images or labels", "params": "parameters", "code": "the code or its libraries"}


def changes(params: ChangesParams, *, manifest: Path, out: Path) -> None:
    """Compare data, code and parameters with those of the last retraining; writes ``decision.json``.

    The manifest of ``ingest`` is compared, which knows every image by its sha256: no image is opened here.

    Raises:
        FindingsError: retrain.registry, when there may be something new and the registry does not answer: it
            has the champion that everything is compared with.
    """
    with step("retrain-changes", params, out, [manifest]) as run:
        need(manifest, "ingest")
        rows = pq.read_metadata(manifest).num_rows
        now = Seen(manifests.fingerprint(manifest), code.fingerprint(), fingerprint(params), rows)
        memory = recall(params.registry)
        decision = decide(memory, now)
        if memory.away:
            run.add_finding(
                "retrain.registry", "error" if decision.go_on else "warning", params.registry.tracking_uri,
                f"{memory.away.rstrip('.')}; it has the champion, and what the last retraining saw.",
                advice="Start the tracker, or correct registry.tracking_uri, and run it again."
                if decision.go_on else "", waivable=False,
            )  # fmt: skip
            run.stop_on_errors()
        run.add_finding(
            "retrain.changes", "info", "the last retraining", f"{decision.reason}.", measured=decision.go_on,
        )  # fmt: skip
        decision.write(run.product(out / FILE))
        run.page.text("Is there anything new?", f"{decision.reason[0].upper()}{decision.reason[1:]}.")
        run.tracker.tags({"retrain": decision.reason})
        log.info(f"{run.name}: {decision.reason}")


def decide(memory: Memory, now: Seen) -> Decision:
    """Whether to go on, by what the last retraining saw."""
    seen = memory.seen
    found = {**vars(now), "champion": memory.champion, "clean": seen.clean if seen else ""}
    if not memory.away and memory.champion is None:
        return Decision(go_on=True, reason="there is no champion yet", **found)
    if seen is None:
        return Decision(go_on=True, reason="what the champion was made from is not known yet", **found)
    changed = [words for part, words in PARTS.items() if getattr(seen, part) != getattr(now, part)]
    if not changed:
        reason = (
            f"nothing has changed: {counted(now.rows, 'row')} of the content, the code and the parameters "
            "that the last retraining saw"
        )
        return Decision(go_on=False, reason=reason, **found)
    rows = f" ({now.rows:,} rows, {seen.rows:,} then)" if seen.data != now.data else ""
    reason = f"{' and '.join(changed)} changed since the last retraining{rows}"
    otherwise = (seen.code, seen.params) != (now.code, now.params)
    return Decision(go_on=True, reason=reason, otherwise=otherwise, **found)


def fingerprint(params: ChangesParams) -> str:
    """The sha256 over all parameters that can change a product."""
    values = {
        name: getattr(params, name).model_dump(mode="json", exclude=FREE.get(name)) for name in SECTIONS
    }
    return sha256_json({**values, "workers": params.ray.workers})

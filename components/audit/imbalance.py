"""The step ``audit imbalance``: how even the classes are, and what sampling and loss that asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.audit import report
from components.audit.balance import Balance, balance, by_label, effective_number, ratio
from components.audit.counts import SOURCES, Counts, count
from components.audit.params import AuditParams
from components.audit.part import FILE, ImbalancePart
from components.audit.plan_schema import Sampling
from components.common.progress import counted
from components.common.storage import need
from components.dataset import manifest as manifests
from components.step import StepContext, step

WORST = 10  # classes that a report names one by one
MIN_VALIDATION = 10  # below it one image is more than ten points of recall


def audit_imbalance(params: AuditParams, *, manifest: Path, out: Path) -> None:
    """Measure the imbalance of the training split; propose sampling weights and a loss.

    Beside the report: ``part.json`` (for the plan) and ``classes.parquet`` (every class: counts, effective
    number of samples, weight, expected count per epoch, and which rules name it).

    Raises:
        RetortError: ``manifest`` is no manifest, has no training rows, or ``audit.distribution`` does not
            fit its classes.
    """
    with step("audit-imbalance", params, out, [manifest]) as run:
        need(manifest, "validate")
        manifests.record_use(run.tracker, "clean", manifest)
        counts = count(manifest)
        total = counts.total
        found = balance(total, total.astype(np.float64), counts.labels, params.audit)
        uneven = _ratio(run, counts, params.audit.imbalance_ratio)
        few = _few(run, counts, params.audit.min_per_class)
        _write_classes(run.product(out / "classes.parquet"), counts, found, few)
        part = ImbalancePart(
            manifest=run.sha256(manifest),
            labels=counts.labels.tolist(),
            names=counts.names,
            train={source: counts.train[:, column].tolist() for column, source in enumerate(SOURCES)},
            sampling=Sampling(
                distribution=found.distribution,
                by_class={} if found.distribution == "natural" else by_label(counts.labels, found.by_class),
                counts=by_label(counts.labels, total),
                expected=by_label(counts.labels, found.expected),
                finding="imbalance.ratio" if uneven else "",
            ),
            loss=found.loss.model_copy(update={"finding": "imbalance.ratio" if uneven else ""}),
            findings=run.report.findings,
        )
        part.write(run.product(out / FILE))
        run.tracker.summary({"imbalance_ratio": ratio(total), "classes": len(total)})
        report.imbalance(run.page, counts, found, params.audit)


def _ratio(run: StepContext, counts: Counts, limit: float) -> bool:
    """``imbalance.ratio``: a warning above the limit; returns whether it was."""
    total = counts.total
    measured = ratio(total)
    there = np.flatnonzero(total)
    smallest, largest = there[np.argmin(total[there])], int(np.argmax(total))
    pair = f"'{counts.names[smallest]}' has {total[smallest]:,} training images, "
    pair += f"'{counts.names[largest]}' {total[largest]:,}"
    if measured <= limit:
        run.add_finding(
            "imbalance.ratio", "info", "classes",
            f"The largest class is {measured:.1f} x the smallest: {pair}.",
            measured=measured, limit=limit, row="1.2",
        )  # fmt: skip
        return False
    small = int((total[there] * limit < total[largest]).sum())
    others = f" {small:,} classes are that far below the largest." if small > 1 else ""
    effective = ratio(effective_number(total[there]))
    run.add_finding(
        "imbalance.ratio", "warning", f"class '{counts.names[smallest]}'",
        f"The largest class is {measured:.1f} x the smallest ({effective:.1f} x by effective number of "
        f"samples): {pair}.{others}",
        measured=measured, limit=limit,
        advice="The plan balances (audit.distribution, audit.loss); more real images of small classes help "
        "more than any weight.",
        row="1.2",
    )  # fmt: skip
    return True


def _few(run: StepContext, counts: Counts, min_per_class: int) -> dict[str, np.ndarray]:
    """``imbalance.few_samples``, for learning and for validation; returns both masks over the classes."""
    masks = {
        "learn": counts.total < min_per_class,
        "validate": counts.val < MIN_VALIDATION,
    }
    learn = np.flatnonzero(masks["learn"])
    for c in learn[np.argsort(counts.total[learn], kind="stable")][:WORST].tolist():
        run.add_finding(
            "imbalance.few_samples", "warning", f"class '{counts.names[c]}'",
            f"{counted(int(counts.total[c]), 'training image is', 'training images are')} "
            "too few to learn it.",
            measured=int(counts.total[c]), limit=min_per_class,
            advice="Add images, or merge the class with one that it looks like.", row="1.2",
        )  # fmt: skip
    if len(learn) > WORST:
        run.add_finding(
            "imbalance.few_samples", "warning", f"{len(learn):,} classes",
            f"{len(learn):,} of {len(counts.labels):,} classes have fewer than {min_per_class} training "
            f"images; the worst {WORST} are named above, all of them in classes.parquet.",
            measured=len(learn), limit=0, advice="Add images, or merge classes.", row="1.2",
        )  # fmt: skip
    if not counts.val.any():  # validate has said so already
        return masks
    judge = np.flatnonzero(masks["validate"])
    if len(judge):
        worst = judge[np.argsort(counts.val[judge], kind="stable")][:WORST].tolist()
        named = ", ".join(f"'{counts.names[c]}' ({counts.val[c]})" for c in worst)
        more = f", and {len(judge) - WORST:,} more: classes.parquet" if len(judge) > WORST else ""
        run.add_finding(
            "imbalance.few_samples", "warning", ", ".join(f"class '{counts.names[c]}'" for c in worst),
            f"Too few validation images to judge {len(judge):,} of {len(counts.labels):,} classes: "
            f"{named}{more}. One image more or less is over ten points of recall.",
            measured=int(counts.val[judge].min()), limit=MIN_VALIDATION,
            advice="Move real images to the validation split (data.splits.val).", row="1.2",
        )  # fmt: skip
    return masks


def _write_classes(path: Path, counts: Counts, found: Balance, few: dict[str, np.ndarray]) -> None:
    columns = {
        "label": counts.labels.astype(np.int32),
        "class_name": counts.names,
        "train": counts.total,
        **{source: counts.train[:, column] for column, source in enumerate(SOURCES)},
        "val": counts.val,
        "test": counts.test,
        "effective_number": effective_number(counts.total),
        "weight": found.by_class,
        "expected": found.expected,
        "few_to_learn": few["learn"],
        "few_to_validate": few["validate"],
    }
    pq.write_table(pa.table(columns), path, compression="zstd")

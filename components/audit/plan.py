"""The step ``plan``: merge what both audits found into what training carries out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from components.audit import report
from components.audit.balance import Balance, balance, by_label
from components.audit.counts import SOURCES
from components.audit.params import AuditParams
from components.audit.part import FILE, ImbalancePart, SyntheticPart, read_part
from components.audit.plan_schema import LeaveOut, Plan, Sampling
from components.common.errors import RetortError
from components.common.progress import counted
from components.step import StepContext, step


def plan(params: AuditParams, *, imbalance: Path, synthetic: Path, out: Path) -> None:
    """Write ``plan.json``, and a report with the findings of both audits.

    Class weights are worked out anew from what the sources weigh, so that ``expected`` is the wanted
    distribution: a class that synthesis blew up is not made smaller twice.

    Args:
        imbalance, synthetic: the folders that the audits wrote.

    Raises:
        RetortError: a part is missing or damaged, or the two are not of the same data.
    """
    inputs = [imbalance / FILE, synthetic / FILE]
    with step("plan", params, out, inputs, keep=("imbalance", "synthetic")) as run:
        sizes = read_part(ImbalancePart, imbalance, "audit imbalance")
        sources = read_part(SyntheticPart, synthetic, "audit synthetic")
        if sizes.manifest and sources.manifest and sizes.manifest != sources.manifest:
            raise RetortError(
                f"{imbalance} and {synthetic}: are of different clean manifests; run 'retort audit' again"
            )
        labels = np.array(sizes.labels, np.int64)
        before = np.stack([np.array(sizes.train[source], np.int64) for source in SOURCES], axis=1)
        rows = before - _left_out(sources, labels)
        drawn = rows * _weights(sources, labels)
        mass = drawn.sum(axis=1)
        if not mass.any():
            raise RetortError("plan: the audits leave no training rows; set audit.drop_suspects to false")
        found = balance(rows.sum(axis=1), mass, labels, params.audit)
        for finding in (*sizes.findings, *sources.findings):
            run.report.add(finding, params.checks.waive)
        made = Plan(
            manifest=sizes.manifest,
            sampling=Sampling(
                distribution=found.distribution,
                by_class=_by_class(labels, found),
                by_source=sources.by_source,
                counts=by_label(labels, before.sum(axis=1)),
                expected=by_label(labels, found.expected),
                finding=_asked_for_by(sizes, sources, found),
            ),
            loss=found.loss.model_copy(update={"finding": sizes.loss.finding}),
            leave_out=[LeaveOut(path=row.path, finding=row.finding) for row in sources.leave_out],
        )
        _explain(run, made, found)
        made.write(run.product(out / "plan.json"))
        report.plan(run.page, sizes.names, before, drawn, found, made)


def _left_out(sources: SyntheticPart, labels: np.ndarray) -> np.ndarray:
    """How many rows of each class and source the plan leaves out, int64 [C, 3]."""
    result = np.zeros((len(labels), len(SOURCES)), np.int64)
    for (label, source), count in Counter((row.label, row.source) for row in sources.leave_out).items():
        result[_place(labels, label), SOURCES.index(source)] = count
    return result


def _weights(sources: SyntheticPart, labels: np.ndarray) -> np.ndarray:
    """The weight of each class's sources, float64 [C, 3]."""
    result = np.ones((len(labels), len(SOURCES)))
    for label, by_source in sources.by_source.items():
        for source, weight in by_source.items():
            result[_place(labels, label), SOURCES.index(source)] = weight
    return result


def _asked_for_by(sizes: ImbalancePart, sources: SyntheticPart, found: Balance) -> str:
    """The finding behind the weights: of the classes' sizes where these are balanced, else of sources."""
    if found.distribution != "natural" and sizes.sampling.finding:
        return sizes.sampling.finding
    rules = ("synthetic.blow_up", "synthetic.recognisable", "synthetic.degradation")
    named = {finding.rule for finding in sources.findings if finding.level == "warning"}
    return next((rule for rule in rules if rule in named), "") if sources.by_source else ""


def _place(labels: np.ndarray, label: int) -> int:
    place = int(np.searchsorted(labels, label))
    if place == len(labels) or labels[place] != label:
        raise RetortError(
            f"plan: label {label} of the synthetic audit is unknown to the imbalance audit; "
            "run 'retort audit' again"
        )
    return place


def _by_class(labels: np.ndarray, found: Balance) -> dict[int, float]:
    """Weights by label; none where every class has the same: drawing is relative."""
    there = found.by_class[found.expected > 0]
    if np.allclose(there, there[0], rtol=1e-12) and (found.expected > 0).all():
        return {}
    return by_label(labels, found.by_class)


def _explain(run: StepContext, plan: Plan, found: Balance) -> None:
    """``plan.sampling`` and ``plan.loss``: what training will do, and why."""
    sampling = plan.sampling
    counts = np.array(list(sampling.counts.values()))
    changed = (
        f"classes of {counts[counts > 0].min():,} to {counts.max():,} images become "
        f"{found.expected[found.expected > 0].min():,.0f} to {found.expected.max():,.0f} per epoch"
    )
    weighed = counted(len(sampling.by_source), "class weighs", "classes weigh")
    by_source = f" {weighed} by source." if sampling.by_source else ""
    dropped = f" {counted(len(plan.leave_out), 'row is', 'rows are')} left out." if plan.leave_out else ""
    asked = f" Asked for by {sampling.finding}." if sampling.finding else ""
    run.add_finding(
        "plan.sampling", "info", sampling.distribution,
        f"Sampling is {sampling.distribution}: {changed}. {found.why}{by_source}{dropped}{asked}",
        measured=float(found.expected.max() / found.expected[found.expected > 0].min()),
        advice="audit.distribution changes it; so does editing plan.json.", row="1.2",
    )  # fmt: skip
    run.add_finding(
        "plan.loss", "info", plan.loss.name, f"The loss is {plan.loss.name}. {plan.loss.why}",
        advice="audit.loss changes it.", row="1.2",
    )  # fmt: skip

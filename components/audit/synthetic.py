"""The step ``audit synthetic``: do synthetic images flood, help or harm, and which labels are suspect."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.audit import report, rules
from components.audit.counts import SOURCES, Counts, count
from components.audit.neighbours import closeness
from components.audit.params import AuditParams
from components.audit.part import FILE, LeftOut, SyntheticPart
from components.audit.probe import Discriminant, Folded
from components.audit.rows import Rows, look
from components.audit.rules import Class
from components.audit.suspects import Sample, judge, suspects
from components.common.sheet import write_csv
from components.common.storage import need
from components.dataset import manifest as manifests
from components.step import StepContext, step


def audit_synthetic(params: AuditParams, *, manifest: Path, features: Path, out: Path) -> None:
    """Apply the three rules for synthetic images, and look for suspect labels among the real ones.

    Beside the report: ``part.json`` (for the plan), ``classes.parquet`` (each class with synthetic images),
    ``samples.parquet`` (suspect labels, unrecognised and hard images by file) and, when labels are suspect,
    ``proposed_corrections.csv``, which a person may edit and give to ``data.corrections``.

    Args:
        features: the backbone ``features.onnx``.

    Raises:
        RetortError: a file is missing or damaged, or a store cannot be reached.
    """
    with step("audit-synthetic", params, out, [manifest, features]) as run:
        need(manifest, "validate")
        need(features, "weights")
        manifests.record_use(run.tracker, "clean", manifest)
        counts = count(manifest)
        classes = rules.blow_up(run, counts, params.audit.blow_up)
        if not classes:
            run.add_finding(
                "synthetic.none", "info", "images",
                "There are no synthetic images: only suspect labels are looked for.", measured=0, row="4.1",
            )  # fmt: skip
        rows = look(run, params, manifest, features, counts)
        samples = [] if rows is None else _probe(run, params, counts, rows, classes)
        rules.same_order(run, counts, classes)
        _write(run, params, manifest, out, counts, classes, samples)


def _probe(
    run: StepContext, params: AuditParams, counts: Counts, rows: Rows, classes: list[Class]
) -> list[Sample]:
    """Everything that takes features; fills ``classes``, and returns the files to look at.

    Which rows decide: on labels of training rows, real training rows alone, each by the others; on synthetic
    images, real rows of training and validation. The test split decides nothing.
    """
    number, seed = len(counts.labels), params.general.seed
    real = np.flatnonzero(rows.real)
    trained = rows.split[real] == "train"
    folded = Folded(rows.vectors[real[trained]], rows.place[real[trained]], number, seed)
    shrinkage, by_others = folded.best()
    scores = Discriminant(folded.moments, shrinkage)(rows.vectors[real])
    scores[trained] = by_others
    near = closeness(rows.vectors[real], trained, rows.place[real], number)
    judged = judge(scores, near, rows.place[real], trained)
    run.tracker.metrics({"probe_top1": float((by_others.argmax(axis=1) == rows.place[real[trained]]).mean())})
    if judged is not None:
        report.labels(run.page, rows.split[real], judged)
    samples = suspects(run, counts, rows, real, judged)
    if not rows.real.all():
        judging = Folded(rows.vectors[rows.judging], rows.place[rows.judging], number, seed)
        told = judging.scores(shrinkage).argmax(axis=1)
        samples += rules.recognisable(run, params, counts, rows, classes, shrinkage, told)
        samples += rules.degradation(run, counts, rows, classes, shrinkage, judging, told)
        rules.domain_gap(run, counts, rows, classes, shrinkage)
    return samples


def _write(
    run: StepContext,
    params: AuditParams,
    manifest: Path,
    out: Path,
    counts: Counts,
    classes: list[Class],
    samples: list[Sample],
) -> None:
    """The part of the plan, the tables, the proposed corrections and the page."""
    by_source = {}
    for one in classes:
        if one.weight < 1.0:
            kinds = [SOURCES[k] for k in (1, 2) if counts.train[one.place, k]]
            by_source[int(counts.labels[one.place])] = dict.fromkeys(kinds, float(f"{one.weight:.6g}"))
    leave_out: dict[str, LeftOut] = {}  # a file may be named by several rules: the first one counts
    for file in samples:
        if params.audit.drop_suspects and file.split == "train" and file.rule != "hard":
            left = LeftOut(path=file.path, finding=file.rule, label=file.label, source=file.source)
            leave_out.setdefault(file.path, left)
    part = SyntheticPart(
        manifest=run.sha256(manifest),
        by_source=by_source,
        leave_out=list(leave_out.values()),
        findings=run.report.findings,
    )
    part.write(run.product(out / FILE))
    names = [counts.names[one.place] for one in classes]
    columns = {field.name: [getattr(one, field.name) for one in classes] for field in fields(Class)}
    columns["label"] = [int(counts.labels[place]) for place in columns.pop("place")]
    pq.write_table(
        pa.table({"class_name": pa.array(names, pa.string()), **columns}),
        run.product(out / "classes.parquet"),
    )
    listed = {field.name: [getattr(one, field.name) for one in samples] for field in fields(Sample)}
    pq.write_table(pa.table(listed), run.product(out / "samples.parquet"), compression="zstd")
    found = [one for one in samples if one.rule == "labels.suspect"]
    if found:
        write_csv(
            run.product(out / "proposed_corrections.csv"),
            [("path", "label", "split"), *((one.path, one.suggested, one.split) for one in found)],
        )
    run.tracker.summary({"suspect_labels": len(found), "classes_with_synthetic": len(classes)})
    report.synthetic(run.page, counts, classes, samples, params)

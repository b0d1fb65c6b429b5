"""The step ``validate``: every row of the manifest ends as clean, or in quarantine with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.errors import RetortError
from components.dataset import content, drift, labels, report
from components.dataset import manifest as manifests
from components.dataset import quarantine as verdicts
from components.dataset.database import database
from components.dataset.params import ValidateParams
from components.dataset.quality import report as quality
from components.dataset.rules import CASES
from components.step import StepContext, step

if TYPE_CHECKING:
    import duckdb


def validate(params: ValidateParams, *, manifest: Path, clean: Path, quarantine: Path, out: Path) -> None:
    """Check rows, images, labels, duplicates and leakage; write ``clean`` and ``quarantine``.

    Beside the report: ``findings.parquet`` (every single case: rule, path, other, detail),
    ``quality.parquet`` (what the quality audit measured on each clean image), ``counts.parquet`` (clean rows
    by label, split and source: the ``validate.baseline`` of a later run), ``drift.parquet`` (every class
    against the baseline) and ``data_docs/`` (Great Expectations).

    Raises:
        RetortError: when ``manifest`` is no manifest.
        FindingsError: among others, when more than ``validate.max_bad_share`` of the rows are bad.
    """
    inputs = [manifest]
    baseline = Path(params.validation.baseline) if params.validation.baseline else None
    if baseline:
        inputs.append(baseline)
        if out.resolve() in baseline.resolve().parents:
            raise RetortError(
                f"validate.baseline: {baseline} lies in {out}, which this step rewrites; "
                "keep a copy elsewhere"
            )
        if _same_file(baseline, manifest):
            raise RetortError(
                f"validate.baseline: {baseline} is the manifest that is validated: it would be compared with "
                "itself; name an earlier one"
            )
    with (
        step("validate", params, out, inputs, products=[clean, quarantine]) as run,
        database(manifest) as db,
    ):
        manifests.check(manifest)
        manifests.record_use(run.tracker, "manifest", manifest)
        before = drift.read_baseline(db, baseline) if baseline else None
        source = str(manifest).replace("'", "''")  # a view takes no parameters
        db.execute(
            "create view m as select file_row_number as row, * exclude (file_row_number) "  # noqa: S608
            f"from read_parquet('{source}', file_row_number = true)"
        )
        db.execute(
            "create table cases (rule varchar, row bigint, path varchar, other varchar, detail varchar)"
        )
        verdicts.broken_rows(db)
        looked = content.images(run, db, params)
        content.same_content(db, looked)
        if looked:
            content.near(run, db, params.validation.near_duplicate_bits)
        verdicts.report_cases(run, db)
        labels.labels(run, db, params)
        labels.names(run, db)
        labels.groups_apart(run, db)
        counts = verdicts.quarantined(run, db, params, looked)
        # after that: what it names stays
        show_quality = quality.audit(run, db, out) if looked and params.validation.quality else None
        clean_counts = verdicts.clean_counts(db)
        labels.lost_classes(run, db, clean_counts)
        drift.write_counts(clean_counts, run.product(out / "counts.parquet"))
        if baseline and before is not None:
            drift.judge(run, db, baseline, before, clean_counts.to_pandas(), out)
        _expect(run, db, params, counts, out)
        verdicts.write_findings(db, out)
        report.show_validated(run, db, params, counts, looked)
        if show_quality:
            show_quality(params.data.root)
        verdicts.write_rows(run, db, manifest, clean, quarantine)


def _same_file(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()


def _expect(
    run: StepContext, db: duckdb.DuckDBPyConnection, params: ValidateParams, counts: dict[str, Any], out: Path
) -> None:
    """Run the suite; what it finds beyond the findings so far is added to them."""
    from components.dataset import suite

    groups = db.execute(
        """select label, class_name, split, source, rows, without_path, if(min(class_name) over same_label
        is not distinct from max(last_name) over same_label, 1, 2) as names
        from groups window same_label as (partition by label) order by all"""
    ).df()
    found = sorted(set(groups.loc[(groups["split"] != "unlabeled") & (groups["label"] >= 0), "label"]))
    cases = counts["cases"]
    given = params.general.class_num
    totals = {
        "rows": counts["rows"],
        **{split: counts["splits"].get(split, 0) for split in manifests.SPLITS},
        "classes": len(found),
        "lowest_label": min(found, default=0),
        "gaps": max(found, default=0) - min(found, default=0) + 1 - len(found) if found else 0,
        **{rule.total: cases.get(name, 0) for name, rule in CASES.items() if rule.total},
        "quarantined_share": counts["share"],
    }
    import pandas as pd

    failures = suite.run(
        {"groups": groups, "totals": pd.DataFrame([totals])},
        max_bad_share=params.validation.max_bad_share,
        class_num=max(found, default=0) + 1 if given == "auto" else given,
        docs=out / "data_docs",
    )
    said = {finding.rule for finding in run.report.findings}
    for failure in failures:
        if failure.rule not in said:
            run.add_finding(failure.rule, failure.level, failure.subject, failure.message)  # type: ignore[arg-type]

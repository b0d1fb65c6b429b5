"""Which rows are bad, and why: the cases, what is said of them, and the manifest parted in two."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.common.progress import counted
from components.dataset import manifest as manifests
from components.dataset.manifest import image_path
from components.dataset.params import ValidateParams
from components.dataset.rules import CASES, KEPT
from components.step import StepContext

if TYPE_CHECKING:
    import duckdb
    from numpy.typing import NDArray

WORST = 10  # subjects that a report names one by one
# whatever made a row bad may be that a value is missing
QUARANTINE = pa.schema(
    [*(field.with_nullable(True) for field in manifests.SCHEMA), pa.field("reason", pa.string())],
    metadata=manifests.SCHEMA.metadata,
)


def broken_rows(db: duckdb.DuckDBPyConnection) -> None:
    """Rows that break the manifest's own rules; ingest writes none of these, but a person may."""
    for name, rule in CASES.items():
        if rule.condition:
            db.execute(
                f"insert into cases select '{name}', row, coalesce(path, ''), '', '{rule.detail}' "  # noqa: S608
                f"from m where {rule.condition}"
            )


def report_cases(run: StepContext, db: duckdb.DuckDBPyConnection) -> None:
    """One finding a rule, with its first subjects; every case stands in findings.parquet."""
    for name, rule in CASES.items():
        count = db.execute("select count(distinct row) from cases where rule = ?", [name]).fetchall()[0][0]
        if not count:
            continue
        worst = db.execute(
            """select path, other, detail from cases where rule = ?
            qualify row_number() over (partition by row order by other, detail) = 1
            order by path, other, detail limit ?""",
            [name, WORST],
        ).fetchall()
        shown = "; ".join(
            f"{path}{f' = {other}' if other else ''} ({detail})" for path, other, detail in worst[:3]
        )
        run.add_finding(
            name, rule.level, ", ".join(path for path, _, _ in worst),
            f"{counted(count, rule.one, rule.several)}: {shown}{' and others' if count > 3 else ''}. "
            "All of them: findings.parquet.",
            measured=count, limit=0, advice=rule.advice, row=rule.row,
        )  # fmt: skip


def quarantined(
    run: StepContext, db: duckdb.DuckDBPyConnection, params: ValidateParams, looked: bool
) -> dict[str, Any]:
    """Decide which rows are bad; returns the counts that the suite and the page look at."""
    db.execute(
        f"""create table bad as select row, rule || ': ' || detail
            || case when other = '' then '' else ' (' || other || ')' end as reason
        from cases where rule not in {KEPT} qualify row_number() over
        (partition by row order by rule not like 'image%', rule, other, detail) = 1 order by row"""  # noqa: S608
    )
    total, bad = db.execute("select (select count(*) from m), (select count(*) from bad)").fetchall()[0]
    share = bad / max(total, 1)
    limit = params.validation.max_bad_share
    if share > limit:
        run.add_finding(
            "validate.max_bad_share", "error", "manifest",
            f"{bad:,} of {counted(total, 'row')} ({share:.1%}) {'is' if bad == 1 else 'are'} bad, "
            f"the limit is {limit:.1%}.",
            measured=share, limit=limit,
            advice=(looked and _wrong_root(db, params.data.root))
            or "Mend the source (findings.parquet lists every file), or raise validate.max_bad_share.",
        )  # fmt: skip
    cases = dict(db.execute("select rule, count(distinct row) from cases group by 1").fetchall())
    splits = dict(
        db.execute(
            "select split, count(*) from m where row not in (select row from bad) group by 1"
        ).fetchall()
    )
    for split in ("train", "val"):
        if not splits.get(split):
            run.add_finding(
                "splits.empty", "error", f"split '{split}'", f"No clean row is left in '{split}'.",
                measured=0, limit=1, advice="See what was quarantined, and mend the source.",
            )  # fmt: skip
    run.add_finding(
        "validate.rows", "info", "manifest",
        f"{total - bad:,} of {counted(total, 'row')} {'is' if total - bad == 1 else 'are'} clean, "
        f"{bad:,} quarantined.",
        measured=bad,
    )  # fmt: skip
    run.tracker.summary({"rows": total - bad, "quarantined": bad})
    return {"rows": total, "bad": bad, "share": share, "cases": cases, "splits": splits}


def _wrong_root(db: duckdb.DuckDBPyConnection, root: str) -> str:
    """The way out where most files could not even be opened: they are not where data.root says."""
    lost, tried, first = db.execute(
        """select count(*) filter (rule <> '' and seen.sha256 is null), count(*),
        min(m.path) filter (rule <> '' and seen.sha256 is null) from seen join m using (row)"""
    ).fetchall()[0]
    if 2 * lost <= tried:
        return ""
    if "://" in first:
        return f"Most of them are not there at all, such as {first}."
    return (
        f"Most of them are not there at all, such as {image_path(root, first)}: check data.root ({root}) and "
        "whether this machine has the images."
    )


def clean_counts(db: duckdb.DuckDBPyConnection) -> pa.Table:
    """Clean rows by label, split and source."""
    return db.sql(
        """with apart as (select coalesce(label, -1) as label, split, source, count(*) as rows
            from m semi join bad using (row) group by all)
        select groups.label, class_name, groups.split, groups.source,
            groups.rows - coalesce(apart.rows, 0) as rows
        from groups left join apart on groups.label = apart.label
            and groups.split is not distinct from apart.split
            and groups.source is not distinct from apart.source
        where groups.rows > coalesce(apart.rows, 0) order by all"""
    ).to_arrow_table()


def write_findings(db: duckdb.DuckDBPyConnection, out: Path) -> None:
    """Every single case, as ``findings.parquet``."""
    table = db.sql(
        "select rule, path, other, detail from cases order by rule, path, other, detail"
    ).to_arrow_table()
    pq.write_table(table, out / "findings.parquet", compression="zstd")


def write_rows(
    run: StepContext, db: duckdb.DuckDBPyConnection, manifest: Path, clean: Path, quarantine: Path
) -> None:
    """Part the manifest in two, a portion at a time, in its own order."""
    bad = db.sql("select row, reason from bad order by row").to_arrow_table()
    rows: NDArray[np.int64] = bad["row"].to_numpy()
    reasons: Sequence[str] = bad["reason"].to_pylist()
    clean_file, quarantine_file = run.product(clean), run.product(quarantine)
    if not len(rows):
        shutil.copyfile(manifest, clean_file)
        pq.write_table(QUARANTINE.empty_table(), quarantine_file, compression="zstd")
        return
    start = 0
    with (
        pq.ParquetWriter(clean_file, manifests.SCHEMA, compression="zstd") as good_rows,
        pq.ParquetWriter(quarantine_file, QUARANTINE, compression="zstd") as bad_rows,
    ):
        # reading ahead would hold a gigabyte more
        for batch in pq.ParquetFile(manifest, pre_buffer=False).iter_batches(
            1 << 20, columns=manifests.SCHEMA.names
        ):
            table = pa.Table.from_batches([batch])
            first, last = np.searchsorted(rows, [start, start + len(batch)])
            mask = np.ones(len(batch), bool)
            mask[rows[first:last] - start] = False
            good_rows.write_table(table.filter(pa.array(mask)).cast(manifests.SCHEMA))
            apart = table.filter(pa.array(~mask)).append_column(
                "reason", pa.array(reasons[first:last], pa.string())
            )
            bad_rows.write_table(apart.cast(QUARANTINE))
            start += len(batch)

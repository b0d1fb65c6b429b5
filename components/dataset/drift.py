"""Drift: how a manifest's classes differ from those of an earlier one, by counts alone.

The counts are exact and small (a row a label, split and source), so it costs the same at any size.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from components.common.errors import RetortError
from components.common.progress import counted
from components.common.storage import atomic_path
from components.dataset import manifest as manifests
from components.dataset.report import show_drift
from components.step import StepContext

if TYPE_CHECKING:
    import duckdb
    from numpy.typing import NDArray

SCHEMA_VERSION = 1
COUNTS = pa.schema(
    [
        pa.field("label", pa.int32(), nullable=False),
        pa.field("class_name", pa.string()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
    ],
    metadata={"schema_version": str(SCHEMA_VERSION)},
)
FALSE_DISCOVERIES = 0.01  # share of the classes named as changed that may be chance (Benjamini-Hochberg)
CHANGED = 1.25  # times a class's share has to grow or shrink by, to matter
SMALL_EFFECT = 0.1  # Cohen's w from which all small changes together matter
WORST = 10  # classes that the report names one by one


def write_counts(counts: pa.Table, path: Path) -> None:
    """Save what a later run compares itself with: rows by label, split and source."""
    with atomic_path(path) as partial:
        pq.write_table(counts.cast(COUNTS), partial, compression="zstd")


def read_baseline(db: duckdb.DuckDBPyConnection, path: Path) -> pd.DataFrame:
    """The counts of an earlier manifest: out of its ``counts.parquet``, or out of the manifest itself.

    Raises:
        RetortError: naming ``validate.baseline``, when the file is neither.
    """
    way_out = (
        "set validate.baseline to an earlier manifest, or to the counts.parquet that validate left of one"
    )
    if not path.is_file():
        raise RetortError(f"validate.baseline: {path}: no such file; {way_out}")
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError):
        raise RetortError(f"validate.baseline: {path}: not a Parquet file; {way_out}") from None
    if is_counts(schema):
        version = int((schema.metadata or {}).get(b"schema_version", b"1"))
        if version > SCHEMA_VERSION:
            raise RetortError(f"{path}: schema_version {version} is newer than {SCHEMA_VERSION}")
        return pq.read_table(path, columns=COUNTS.names).to_pandas()
    try:
        manifests.check(path)
    except RetortError as error:
        raise RetortError(f"validate.baseline: {error}; {way_out}") from None
    source = str(path).replace("'", "''")
    return db.execute(
        "select label, min(class_name) as class_name, split, source, count(*) as rows "  # noqa: S608
        f"from read_parquet('{source}') group by label, split, source order by label, split, source"
    ).df()


def is_counts(schema: pa.Schema) -> bool:
    """Whether a Parquet file of this schema holds saved counts, rather than a manifest."""
    return set(COUNTS.names) <= set(schema.names) and "path" not in schema.names


def by_class(counts: pd.DataFrame) -> pd.DataFrame:
    """Labelled rows by the class's name (its label's number where it has none): columns label, rows."""
    labelled = counts[(counts["split"] != "unlabeled") & (counts["label"] >= 0)]
    numbers = labelled["label"].astype(str)
    names = labelled["class_name"].where(labelled["class_name"].notna(), numbers).astype(str)
    return labelled.groupby(names).agg(label=("label", "min"), rows=("rows", "sum")).rename_axis("class_name")


def compare(before: pd.DataFrame, now: pd.DataFrame) -> pd.DataFrame:
    """One row a class of either: its label, rows and share before and now, and what became of it.

    Shares are of the rows of classes that stand in both, so that a class which comes or goes does not
    change the others'; ``ratio`` is share now to share before.

    ``p`` is that of the exact two-sided test that the class's share is the same in both (given its rows in
    both together, those of now are binomial). ``kind`` is ``new``, ``vanished``, ``changed`` (significant
    among all classes by Benjamini and Hochberg's procedure, and by more than CHANGED) or ``same``.
    """
    from scipy.stats import false_discovery_control

    table = before.join(now, how="outer", lsuffix="_before", rsuffix="_now").sort_index()
    for column in ("rows_before", "rows_now"):
        table[column] = table[column].fillna(0).astype(np.int64)
    for column in ("label_before", "label_now"):
        table[column] = table[column].astype("Int32")
    old, new = table["rows_before"].to_numpy(), table["rows_now"].to_numpy()
    both = (old > 0) & (new > 0)
    total_before, total_now = max(int(old[both].sum()), 1), max(int(new[both].sum()), 1)
    table["share_before"] = np.where(both, old / total_before, np.nan)
    table["share_now"] = np.where(both, new / total_now, np.nan)
    table["ratio"] = table["share_now"] / table["share_before"]
    table["p"] = _binomial_test(old, new, total_now / (total_before + total_now))
    table.loc[~both, "p"] = np.nan
    significant = np.zeros(len(table), bool)
    if both.any():
        # Benjamini and Hochberg (1995): of those that are called changed, this share at most is not
        significant[both] = false_discovery_control(table["p"].to_numpy()[both]) <= FALSE_DISCOVERIES
    far = ((table["ratio"] >= CHANGED) | (table["ratio"] <= 1 / CHANGED)).to_numpy()
    table["kind"] = np.select([old == 0, new == 0, significant & far], ["new", "vanished", "changed"], "same")
    return table


def _binomial_test(old: NDArray[np.int64], new: NDArray[np.int64], share: float) -> NDArray[np.float64]:
    from scipy.stats import binom

    both = old + new
    tail = np.minimum(binom.cdf(new, both, share), binom.sf(new - 1, both, share))
    return np.minimum(1.0, 2 * tail)


def effect(old: NDArray[np.int64], new: NDArray[np.int64]) -> tuple[float, float]:
    """Cohen's w of the table classes x (before, now), and the p of its chi-squared test.

    What chance alone adds to chi-squared, its degrees of freedom, is taken off first, so that w does not
    grow with the number of classes.
    """
    from scipy.stats import chi2

    both = old + new
    keep = both > 0
    old, new, both = old[keep], new[keep], both[keep]
    if len(both) < 2 or not old.sum() or not new.sum():
        return 0.0, 1.0
    share = new.sum() / both.sum()
    statistic = float((((new - both * share) ** 2) / (both * share * (1 - share))).sum())
    freedom = len(both) - 1
    return float(np.sqrt(max(0.0, statistic - freedom) / both.sum())), float(chi2.sf(statistic, freedom))


def judge(
    run: StepContext,
    db: duckdb.DuckDBPyConnection,
    baseline: Path,
    earlier: pd.DataFrame,
    counts: pd.DataFrame,
    out: Path,
) -> None:
    """Compare counts with those of ``baseline``: findings ``drift.*``, a table, and ``drift.parquet``."""
    table = compare(by_class(earlier), by_class(counts))
    columns = [name for name in table.columns if name != "kind"]
    pq.write_table(
        pa.Table.from_pandas(table.reset_index()[["kind", "class_name", *columns]], preserve_index=False),
        out / "drift.parquet",
        compression="zstd",
    )
    _classes(run, table)
    _shares(run, table)
    _images(run, db, baseline)
    rows = {when: int(table[f"rows_{when}"].sum()) for when in ("before", "now")}
    classes = {when: int((table[f"rows_{when}"] > 0).sum()) for when in ("before", "now")}
    run.add_finding(
        "drift.compared", "info", str(baseline),
        f"{rows['now']:,} labelled rows of {classes['now']:,} classes, against {rows['before']:,} of "
        f"{classes['before']:,} in the baseline. Every class: drift.parquet.",
        measured=rows["now"], limit=rows["before"],
    )  # fmt: skip
    show_drift(run.page, table)


def _classes(run: StepContext, table: pd.DataFrame) -> None:
    for kind, rows, verb, advice in (
        (
            "new",
            "rows_now",
            ("is new", "are new"),
            "A model of the baseline cannot predict them: train anew, or 'retort expand'.",
        ),
        (
            "vanished",
            "rows_before",
            ("has vanished", "have vanished"),
            "Check the source: a folder may be missing, or a class renamed.",
        ),
    ):
        found = table[table["kind"] == kind].sort_values(rows, ascending=False, kind="stable")
        if len(found):
            names = [f"'{name}'" for name in found.index[:WORST]]
            run.add_finding(
                "drift.classes", "warning", f"{kind}: {', '.join(names)}{_more(len(found))}",
                f"{len(found):,} of {counted(len(table), 'class', 'classes')} {verb[len(found) > 1]}, with "
                f"{counted(int(found[rows].sum()), 'row')}.",
                measured=len(found), limit=0, advice=advice,
            )  # fmt: skip
    moved = table[(table["label_before"] != table["label_now"]).fillna(False)]
    if len(moved):
        first = moved.iloc[0]
        run.add_finding(
            "drift.classes", "warning",
            f"renumbered: {', '.join(repr(str(name)) for name in moved.index[:WORST])}{_more(len(moved))}",
            f"{counted(len(moved), 'class has', 'classes have')} another label than in the baseline, "
            f"such as '{moved.index[0]}': {first['label_now']}, which was {first['label_before']}.",
            measured=len(moved), limit=0,
            advice="Labels of the two models do not compare; keep the numbers with data.class_names.",
        )  # fmt: skip


def _shares(run: StepContext, table: pd.DataFrame) -> None:
    changed = table[table["kind"] == "changed"]
    apart = 0.5 * float((table["share_now"] - table["share_before"]).abs().sum())
    old, new = table["rows_before"].to_numpy(), table["rows_now"].to_numpy()
    both = (old > 0) & (new > 0)
    w, p = effect(old[both], new[both])
    together = w >= SMALL_EFFECT and p <= FALSE_DISCOVERIES
    if not len(changed) and not together:
        return
    far = np.abs(np.log(changed["ratio"].to_numpy(np.float64)))
    worst = changed.iloc[np.argsort(-far, kind="stable")[:WORST]]
    named = "; ".join(
        f"'{name}' {one.share_before:.2%} to {one.share_now:.2%}"
        for name, one in zip(worst.index[:3], worst.itertuples(), strict=False)
    )
    run.add_finding(
        "drift.shares", "warning",
        ", ".join(f"'{name}'" for name in worst.index) + _more(len(changed)) or "all classes together",
        f"{counted(len(changed), 'class', 'classes')} changed their share by a factor of {CHANGED:g} or "
        f"more, beyond chance{': ' + named if named else ''}. In all, {apart:.1%} of the rows lie "
        f"in other classes than the baseline's shares would have it (Cohen's w {w:.2f}, "
        f"small from {SMALL_EFFECT:g}).",
        measured=round(w, 4), limit=SMALL_EFFECT,
        advice="Look whether the source or the world changed; accuracy by class tells what it costs.",
    )  # fmt: skip


def _images(run: StepContext, db: duckdb.DuckDBPyConnection, baseline: Path) -> None:
    """The share of contents that the baseline does not hold, where it is a manifest."""
    if is_counts(pq.read_schema(baseline)):
        return
    source = str(baseline).replace("'", "''")
    known, fresh = db.execute(
        f"""with old as (select distinct hash(sha256) as h from read_parquet('{source}')
            where sha256 is not null)
        select count(*), count(*) filter (where hash(sha256) not in (select h from old))
        from m where sha256 is not null"""  # noqa: S608
    ).fetchall()[0]
    if known:
        run.add_finding(
            "drift.images", "info", str(baseline),
            f"{fresh:,} of {counted(known, 'image')} ({fresh / known:.1%}) "
            f"{'is' if fresh == 1 else 'are'} not in the baseline, by content.",
            measured=round(fresh / known, 6),
        )  # fmt: skip


def _more(count: int) -> str:
    return ", ..." if count > WORST else ""

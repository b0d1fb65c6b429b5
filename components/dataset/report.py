"""What the steps of this room show: rows by split, images per class, what was put aside, drift."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from typing import TYPE_CHECKING, Any

from components.common.page import Page
from components.dataset.images import thumbnail
from components.dataset.manifest import SOURCES, SPLITS
from components.dataset.params import ValidateParams
from components.step import StepContext

if TYPE_CHECKING:
    import duckdb
    import pandas as pd
    from matplotlib.figure import Figure

    from components.dataset.tally import Tally

WORST = 10  # entries that a page names one by one
MOST_DRIFT = 20  # classes of the table of drift
BARS = 40  # classes up to which each has a bar of its own
SHEET = 24  # images of a contact sheet
# Okabe and Ito's palette: told apart by colour-blind readers
KINDS = (
    ("train, real", "#0072B2", "split = 'train' and source = 'real'"),
    ("train, semi-synthetic", "#CC79A7", "split = 'train' and source = 'semi_synthetic'"),
    ("train, synthetic", "#E69F00", "split = 'train' and source = 'synthetic'"),
    ("val", "#009E73", "split = 'val'"),
    ("test", "#999999", "split = 'test'"),
)


def show_rejected(page: Page, rejected: Sequence[tuple[str, str]]) -> None:
    """The first entries of a source that are no rows of the manifest, and why."""
    page.table("Entries that could not be read", ["entry", "why"], rejected[:WORST])


def show_splits(page: Page, tally: Tally) -> None:
    """Rows of the manifest by split and source."""
    by_split = tally.by_split()
    page.table(
        "Images by split and source",
        ["split", *SOURCES],
        [[split, *(tally.rows[split, source] for source in SOURCES)] for split in SPLITS if by_split[split]],
    )


def show_drift(page: Page, table: pd.DataFrame) -> None:
    """The classes that changed most, of what ``drift.compare`` gives; nothing where none did."""
    worst = table[table["kind"] != "same"].copy()
    worst["moved"] = (worst["rows_now"] - worst["rows_before"]).abs()
    worst = worst.sort_values("moved", ascending=False, kind="stable").head(MOST_DRIFT)
    if not len(worst):
        return
    page.table(
        "Drift against the baseline",
        ["class", "what", "rows before", "rows now", "share now to before"],
        [
            [name, kind, before, now, None if isnan(ratio) else ratio]
            for name, kind, before, now, ratio in worst[
                ["kind", "rows_before", "rows_now", "ratio"]
            ].itertuples()
        ],
        note="The largest changes first. Shares are among the classes that stand in both.",
    )


def show_validated(
    run: StepContext,
    db: duckdb.DuckDBPyConnection,
    params: ValidateParams,
    counts: dict[str, Any],
    looked: bool,
) -> None:
    """What ``validate`` found; images only where they were opened and may be shown."""
    run.page.figure(
        "Images per class",
        _histogram(db),
        note=f"{counts['rows']:,} rows before quarantine; unlabelled images "
        f"({counts['splits'].get('unlabeled', 0):,}) have no class.",
    )
    if counts["bad"]:
        rows = db.execute(
            "select split_part(reason, ':', 1), count(*) from bad group by 1 order by 2 desc, 1"
        ).fetchall()
        run.page.table("Quarantined rows", ["rule", "rows"], rows)
    run.page.text(
        "Data Docs", "The expectations and how they were met: data_docs/index.html beside this report."
    )
    if params.report.thumbnails and looked:
        _sheets(run, db, params.data.root)


def _histogram(db: duckdb.DuckDBPyConnection) -> Figure:
    from matplotlib import pyplot

    labels = db.execute(
        "select label, coalesce(any_value(class_name), label::varchar), sum(rows) filter (split = 'train') "
        "from groups where split <> 'unlabeled' group by label order by label"
    ).fetchall()
    if len(labels) > BARS:
        sizes = sorted((size or 0 for _, _, size in labels), reverse=True)
        figure, axes = pyplot.subplots(figsize=(8, 3.2))
        axes.plot(range(1, len(sizes) + 1), sizes, color="#0072B2")
        axes.fill_between(range(1, len(sizes) + 1), sizes, color="#0072B2", alpha=0.25)
        axes.set(
            xlabel="classes, largest first", ylabel="training images", yscale="symlog", xlim=(1, len(sizes))
        )
    else:
        figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.3 * len(labels)))
        left = dict.fromkeys((label for label, _, _ in labels), 0)
        for name, colour, condition in KINDS:
            of_kind = dict(
                db.execute(f"select label, sum(rows) from groups where {condition} group by 1").fetchall()  # noqa: S608
            )
            if not of_kind:
                continue
            widths = [int(of_kind.get(label, 0)) for label, _, _ in labels]
            axes.barh(
                range(len(labels)), widths, left=list(left.values()), color=colour, label=name, height=0.75
            )
            for (label, _, _), width in zip(labels, widths, strict=True):
                left[label] += width
        names = [name if len(name) <= 24 else name[:23] + "…" for _, name, _ in labels]
        axes.set_yticks(range(len(labels)), [name.replace("$", r"\$") for name in names])
        axes.invert_yaxis()
        axes.set_xlabel("images")
        axes.legend(frameon=False, ncols=5, loc="lower left", bbox_to_anchor=(0, 1), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _sheets(run: StepContext, db: duckdb.DuckDBPyConnection, root: str) -> None:
    sample = db.execute(
        """select path, coalesce(class_name, label::varchar)
            || case when source = 'real' then '' else ', ' || source end
        from m semi join seen using (row)
        where row not in (select row from bad) and split <> 'unlabeled'
        qualify row_number() over (partition by label, source order by sha256, path) <= 2
        and dense_rank() over (order by label) <= 13 order by label, source, path limit 48"""
    ).fetchall()
    run.page.images("A look at the classes", [(thumbnail(root, path), caption) for path, caption in sample])
    put_aside = db.execute(
        """select path, reason from m join bad using (row)
        qualify row_number() over (partition by split_part(reason, ':', 1) order by path) <= 8
        order by split_part(reason, ':', 1), path limit ?""",
        [SHEET],
    ).fetchall()
    if put_aside:
        run.page.images(
            "Quarantined images",
            [(thumbnail(root, path), f"{path}: {reason}") for path, reason in put_aside],
        )
    pairs = db.execute(
        """select rule, path, other, detail from cases
        where rule in ('duplicates.near', 'leakage.near', 'duplicates.labels')
        order by rule, path, other limit ?""",
        [SHEET // 2],
    ).fetchall()
    if pairs:
        images = []
        for rule, path, other, detail in pairs:
            images += [
                (thumbnail(root, path), f"{rule}: {path}"),
                (thumbnail(root, other), f"= {other} ({detail})"),
            ]
        run.page.images("Near-duplicates, side by side", images)

"""What ``shadow`` found, as a person reads it: which answers changed, how sure both were, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.common.progress import counted
from components.common.sheet import write_csv
from components.dataset.images import thumbnail_of
from components.step import StepContext
from components.tools.shadow.contender import SAME, Contender

PICTURES = 48
MOST_ROWS = 60
BINS = (0.0, 0.5, 0.7, 0.9, 0.99, 1.0)  # of the champion's score
SLOWER = 1.25  # times the champion's median, from which it is a warning
CHANGED = (
    "number", "request", "champion_class", "champion_score", "challenger_class", "challenger_score",
    "difference",
)  # fmt: skip


def find_inputs(run: StepContext, champion: Contender, challenger: Contender) -> None:
    """What is to be known before the answers are read: other classes, another size, unknown training."""
    if champion.sha256 == challenger.sha256:
        run.add_finding(
            "shadow.models", "warning", challenger.label,
            f"it is the very file of {champion.label}: every answer will be the same",
            advice="Name another with --champion or --challenger.",
        )  # fmt: skip
    for one, other in ((champion, challenger), (challenger, champion)):
        alone = [name for name in one.names if name not in set(other.names)]
        if alone:
            run.add_finding(
                "shadow.classes", "warning", f"{one.role}, {one.label}",
                f"it alone knows {counted(len(alone), 'class', 'classes')}: {_some(alone)}; answers are "
                "compared by class name",
                measured=len(alone),
            )  # fmt: skip
    if champion.about.size != challenger.about.size:
        run.add_finding(
            "shadow.size", "info", challenger.label,
            f"the challenger sees {challenger.about.size} pixels, the champion {champion.about.size}: each "
            "gets its own",
            measured=challenger.about.size, limit=champion.about.size,
        )  # fmt: skip
    for one in (champion, challenger):
        if not one.known:
            run.add_finding(
                "shadow.skew", "info", f"{one.role}, {one.label}",
                "no model.json lies beside it: what training fed it is taken from the file itself",
            )  # fmt: skip


def _some(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:5]) + (", ..." if len(names) > 5 else "")


def measured(
    answers: pa.Table, both: tuple[Contender, Contender], latency: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """The numbers of the whole, as ``metrics.json`` has them; times in milliseconds, skew in grey levels."""
    good = answers.filter(pc.equal(answers["error"], ""))
    changed = int(pc.sum(good["changed"]).as_py())
    found: dict[str, Any] = {
        "requests": answers.num_rows,
        "malformed": answers.num_rows - good.num_rows,
        "changed": changed,
        "agreement": 1 - changed / good.num_rows,
        "mean_difference": _mean(good["difference"].to_numpy()),
    }
    for one in both:
        skew = good[f"{one.role}_skew"].to_numpy()
        times = np.array(latency[one.role]) * 1000
        found |= {
            one.role: one.label,
            f"{one.role}_sha256": one.sha256,
            f"{one.role}_p50_ms": float(np.percentile(times, 50)) if len(times) else None,
            f"{one.role}_p95_ms": float(np.percentile(times, 95)) if len(times) else None,
            f"{one.role}_skew_max": None if np.isnan(skew).any() else float(skew.max()),
            f"{one.role}_skewed": int((np.isnan(skew) | (skew > SAME)).sum()),
        }
    return found


def _mean(values: np.ndarray) -> float | None:
    return None if np.isnan(values).all() else float(np.nanmean(values))


def find_results(run: StepContext, summary: Mapping[str, Any]) -> None:
    """Findings on the requests, the answers, the preprocessing and the time."""
    requests, malformed = summary["requests"], summary["malformed"]
    answered = requests - malformed
    if malformed:
        run.add_finding(
            "shadow.requests", "warning", "requests",
            f"{malformed:,} of {requests:,} could not be read; malformed.csv says why of each",
            measured=malformed,
        )  # fmt: skip
    run.add_finding(
        "shadow.agreement", "info", summary["challenger"],
        f"{summary['changed']:,} of {answered:,} answers change, {summary['agreement']:.2%} stay as "
        f"{summary['champion']} gives them; changed.csv lists them",
        measured=summary["agreement"],
    )  # fmt: skip
    for role in ("champion", "challenger"):
        skewed, most = summary[f"{role}_skewed"], summary[f"{role}_skew_max"]
        said = "training fed it another size" if most is None else f"by up to {most:.3g} of 255 grey levels"
        run.add_finding(
            "shadow.skew", "warning" if skewed else "info", f"{role}, {summary[role]}",
            f"from the same bytes, serving feeds it something else than training for {skewed:,} of "
            f"{answered:,} requests ({said})" if skewed else
            f"from the same bytes, serving feeds it what training did ({said})",
            measured=most, limit=SAME,
            advice="Export it again, and do not change its metadata; with preprocessing in the graph, "
            "rounding may differ by a level or two." if skewed else "",
        )  # fmt: skip
    before, now = summary["champion_p50_ms"], summary["challenger_p50_ms"]
    if before and now:
        run.add_finding(
            "shadow.latency", "warning" if now > SLOWER * before else "info", summary["challenger"],
            f"a request takes {now:.2f} ms (95 % at most {summary['challenger_p95_ms']:.2f}), with the "
            f"champion {before:.2f} ms ({summary['champion_p95_ms']:.2f}), from its bytes to the answer",
            measured=now, limit=before,
        )  # fmt: skip


def write_lists(run: StepContext, answers: pa.Table, out: Path) -> None:
    """``changed.csv``, the surest first, and ``malformed.csv``."""
    rows = [[_cell(row[name]) for name in CHANGED] for row in _changed(answers).to_pylist()]
    write_csv(run.product(out / "changed.csv"), [list(CHANGED), *rows])
    bad = answers.filter(pc.not_equal(answers["error"], "")).select(["number", "request", "error"])
    write_csv(
        run.product(out / "malformed.csv"),
        [bad.column_names, *(list(row.values()) for row in bad.to_pylist())],
    )


def _cell(value: Any) -> Any:
    return f"{value:.6f}" if isinstance(value, float) else value


def _changed(answers: pa.Table) -> pa.Table:
    """The changed answers, those first of which both models were surest."""
    found = answers.filter(pc.fill_null(answers["changed"], fill_value=False))
    surest = pc.min_element_wise(found["champion_score"], found["challenger_score"])
    order = pc.sort_indices(
        pa.table({"sure": surest, "number": found["number"]}),
        sort_keys=[("sure", "descending"), ("number", "ascending")],
    )
    return found.take(order)


def shown(answers: pa.Table) -> list[int]:
    """The numbers of the requests whose pictures the page shows."""
    return _changed(answers)["number"].to_pylist()[:PICTURES]


def show(
    run: StepContext,
    answers: pa.Table,
    both: tuple[Contender, Contender],
    summary: Mapping[str, Any],
    contents: Mapping[int, bytes],
) -> None:
    """The page.

    Args:
        contents: of the requests whose pictures may be shown, by number.
    """
    page = run.page
    good = answers.filter(pc.equal(answers["error"], ""))
    changed = _changed(answers)
    page.table(
        "Champion and challenger",
        ["", *(one.role for one in both)],
        [
            ["model", *(one.label for one in both)],
            ["sha256", *(one.sha256[:16] for one in both)],
            ["classes", *(len(one.names) for one in both)],
            ["input, pixels", *(one.about.size for one in both)],
            ["one request, median, ms", *(summary[f"{one.role}_p50_ms"] for one in both)],
            ["one request, 95 %, ms", *(summary[f"{one.role}_p95_ms"] for one in both)],
            ["largest skew, grey levels", *(summary[f"{one.role}_skew_max"] for one in both)],
            ["requests with skew", *(summary[f"{one.role}_skewed"] for one in both)],
        ],
        note=f"{summary['requests']:,} requests, of which {summary['malformed']:,} malformed; "
        f"{summary['agreement']:.2%} of the answers are the same class. Skew: how far the tensor that "
        "serving makes of a request's bytes lies from the one that training makes of them.",
    )
    page.table(
        "Changed answers by the champion's confidence",
        ["score of the champion", "requests", "changed", "share"],
        _by_confidence(good),
    )
    pairs = changed.group_by(["champion_class", "challenger_class"]).aggregate(
        [("number", "count"), ("champion_score", "mean"), ("challenger_score", "mean")]
    )
    pairs = pairs.sort_by([("number_count", "descending"), ("champion_class", "ascending")])
    totals = dict(zip(*_counts(good["champion_class"]), strict=True))
    page.table(
        "Changed answers by class",
        ["champion said", "challenger says", "requests", "of the class", "champion's", "challenger's"],
        [
            [
                row["champion_class"], row["challenger_class"], row["number_count"],
                f"{row['number_count'] / totals[row['champion_class']]:.1%}",
                row["champion_score_mean"], row["challenger_score_mean"],
            ]
            for row in pairs.slice(0, MOST_ROWS).to_pylist()
        ],
        note="Scores are means over those requests.",
    )  # fmt: skip
    page.table(
        "Changed answers, the surest first",
        ["request", "champion said", "score", "challenger says", "score"],
        [
            [
                row["request"], row["champion_class"], row["champion_score"], row["challenger_class"],
                row["challenger_score"],
            ]
            for row in changed.slice(0, MOST_ROWS).to_pylist()
        ],
        note="Those first of which both models were sure. changed.csv has all.",
    )  # fmt: skip
    if contents:
        by_number = {row["number"]: row for row in changed.slice(0, PICTURES).to_pylist()}
        pictures = [
            (thumbnail_of(contents[number]), _caption(row))
            for number, row in by_number.items()
            if number in contents
        ]
        page.images("Pictures of changed answers", pictures, "Champion's answer, then the challenger's.")
    bad = answers.filter(pc.not_equal(answers["error"], ""))
    if bad.num_rows:
        rows = [[row["request"], row["error"]] for row in bad.slice(0, MOST_ROWS).to_pylist()]
        page.table("Malformed requests", ["request", "why"], rows, "malformed.csv has all.")


def _caption(row: Mapping[str, Any]) -> str:
    return (
        f"{row['champion_class']} {row['champion_score']:.0%} -> "
        f"{row['challenger_class']} {row['challenger_score']:.0%}"
    )


def _counts(column: pa.ChunkedArray) -> tuple[list[Any], list[int]]:
    counts = column.value_counts()
    return counts.field("values").to_pylist(), counts.field("counts").to_pylist()


def _by_confidence(good: pa.Table) -> list[list[Any]]:
    sure, changed = good["champion_score"].to_numpy(), good["changed"].to_numpy()
    places = np.clip(np.searchsorted(BINS, sure, side="right") - 1, 0, len(BINS) - 2)
    rows: list[list[Any]] = []
    for place in reversed(range(len(BINS) - 1)):
        here = places == place
        if here.any():
            named = f"{BINS[place]:.0%} to {BINS[place + 1]:.0%}"
            rows.append([named, int(here.sum()), int(changed[here].sum()), f"{changed[here].mean():.1%}"])
    return rows

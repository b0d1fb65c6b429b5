"""What ``validate`` says of labels, of the names of classes, and of groups on both sides of a split."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import pyarrow as pa

from components.common.progress import counted
from components.common.storage import human_bytes
from components.dataset.params import ValidateParams
from components.dataset.rules import EVAL
from components.step import StepContext

if TYPE_CHECKING:
    import duckdb

WORST = 10  # subjects that a report names one by one
FEATURES = 1280  # inputs of the last FC layer that costs are said for: those of the default networks


def labels(run: StepContext, db: duckdb.DuckDBPyConnection, params: ValidateParams) -> None:
    """Row 2.1: where labels start, their gaps, the class count; each with what it costs."""
    db.execute(
        """create table groups as
        select coalesce(label, -1) as label, split, source, count(*) as rows, min(class_name) as class_name,
        max(class_name) as last_name,
        count(*) filter (path is null or path = '') as without_path
        from m group by 1, split, source order by all"""
    )
    labels = db.execute(
        "select distinct label from groups where split <> 'unlabeled' and label >= 0 order by 1"
    )
    found = [label for (label,) in labels.fetchall()]
    if not found:
        return
    lowest, highest = found[0], found[-1]
    remap = "Set data.remap_labels: true; the mapping is saved beside ingest's report."
    if lowest > 0:
        run.add_finding(
            "labels.start", "warning", f"label {lowest}",
            f"Labels start at {lowest}, not at 0: {_cost(lowest)}", measured=lowest, limit=0,
            advice=remap, row="2.1",
        )  # fmt: skip
    missing = highest - lowest + 1 - len(found)
    if missing:
        known = set(found)
        first = list(islice((label for label in range(lowest, highest) if label not in known), 5))
        run.add_finding(
            "labels.contiguous", "warning",
            f"labels {', '.join(map(str, first))}{', ...' if missing > 5 else ''}",
            f"{counted(missing, 'label')} between {lowest} and {highest} "
            f"{'has' if missing == 1 else 'have'} no images: {_cost(missing)}",
            measured=missing, limit=0, advice=remap, row="2.1",
        )  # fmt: skip
    given = params.general.class_num
    if given != "auto" and given <= highest:
        run.add_finding(
            "labels.class_num", "error", f"global.class_num {given}",
            f"The highest label is {highest}, so there are {highest + 1} classes, not {given}.",
            measured=given, limit=highest + 1,
            advice=f"Set global.class_num to auto or {highest + 1}, or check label {highest}.", row="2.1",
        )  # fmt: skip
    elif given != "auto" and given > highest + 1:
        run.add_finding(
            "labels.class_num", "info", f"global.class_num {given}",
            f"{counted(given - highest - 1, 'class', 'classes')} more than the labels need: "
            f"{_cost(given - highest - 1)}",
            measured=given, limit=highest + 1, row="2.1",
        )  # fmt: skip


def _cost(rows: int) -> str:
    bytes_each = 4 * (FEATURES + 1)
    return (
        f"{counted(rows, 'row')} of the last FC layer {'is' if rows == 1 else 'are'} never trained, "
        f"{human_bytes(rows * bytes_each)} as float32 "
        f"with {FEATURES:,} features."
    )


def names(run: StepContext, db: duckdb.DuckDBPyConnection) -> None:
    """Labels that go by two names, and names that stand for two labels."""
    db.execute(
        """create view named as
        select label, class_name as name from groups where split <> 'unlabeled' and label >= 0
        union select label, last_name from groups where split <> 'unlabeled' and label >= 0"""
    )
    for one, other, *what in (
        ("label", "name", "label goes by several names", "labels go by several names"),
        ("name", "label", "class name stands for several labels", "class names stand for several labels"),
    ):
        torn = db.execute(
            f"select {one}, min({other}), max({other}) from named where name is not null "  # noqa: S608
            f"group by 1 having count(distinct {other}) > 1 order by 1"
        ).fetchall()
        if torn:
            first, low, high = torn[0]
            run.add_finding(
                "labels.names", "warning", f"{one} {', '.join(repr(key) for key, _, _ in torn[:WORST])}",
                f"{counted(len(torn), *what)}, such as {first!r}: {low!r} and {high!r}.",
                measured=len(torn), limit=0, advice="Give each label one name of its own.", row="2.1",
            )  # fmt: skip


def lost_classes(run: StepContext, db: duckdb.DuckDBPyConnection, clean_counts: pa.Table) -> None:
    """Classes that have rows, but no clean one: training would count them and never see them."""
    clean = set(clean_counts["label"].to_pylist())
    rows = db.execute(
        "select label, min(class_name), sum(rows) from groups where split <> 'unlabeled' and label >= 0 "
        "group by 1 order by 1"
    ).fetchall()
    lost = [(name or str(label), int(count)) for label, name, count in rows if label not in clean]
    if lost:
        run.add_finding(
            "labels.classes", "warning", ", ".join(f"class '{name}'" for name, _ in lost[:WORST]),
            f"{len(lost):,} of {len(rows):,} classes "
            f"{'has' if len(lost) == 1 else 'have'} no clean row left, "
            f"such as '{lost[0][0]}' ({counted(lost[0][1], 'row')}, all quarantined).",
            measured=len(lost), limit=0, advice="Mend these images, or take the class out.", row="2.1",
        )  # fmt: skip


def groups_apart(run: StepContext, db: duckdb.DuckDBPyConnection) -> None:
    """Images of one group (frames of one recording) on both sides of a split."""
    parted = db.execute(
        f"""select "group", count(*) from m where "group" is not null and split <> 'unlabeled' group by 1
        having bool_or({EVAL}) and bool_or(split = 'train') order by 2 desc, 1"""  # noqa: S608
    ).fetchall()
    if parted:
        run.add_finding(
            "leakage.group", "warning", ", ".join(name for name, _ in parted[:WORST]),
            f"{counted(len(parted), 'group stands', 'groups stand')} on both sides of a split.",
            measured=len(parted), limit=0,
            advice="Let ingest split (no splits in the source), or move whole groups.",
        )  # fmt: skip

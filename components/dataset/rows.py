"""The rows as the manifest holds them: labels, verdicts, hashes, splits."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.common.errors import RetortError
from components.common.progress import counted
from components.common.storage import state_dir
from components.dataset import manifest as manifests
from components.dataset.assign_splits import assign_splits
from components.dataset.columns import Columns, by_value, equals, kept, put
from components.dataset.database import database
from components.dataset.inspection import inspect_all
from components.dataset.names import numbers
from components.dataset.sources.found import PORTION, Found
from components.dataset.survey import RowRules, Survey
from components.dataset.tally import Tally
from components.step import StepContext


def finished(
    found: Found, rules: RowRules, survey: Survey, names: dict[int, str], tally: Tally
) -> Iterator[pa.RecordBatch]:
    """The rows as the manifest holds them, in the order of the source."""
    order = numbers(names)

    def renumbered(label: int) -> int:
        return rules.remapped.get(label, label)

    start = 0
    for columns, _ in found.portions():
        columns = rules.mark(rules.unlabel(columns))
        start += len(columns["path"])
        label, name = columns["label"], columns["class_name"]
        if label.null_count:
            columns["label"] = pc.coalesce(label, by_value(name, order.get, pa.int32()))
        nameless = pc.and_(
            pc.fill_null(pc.equal(name, ""), True), pc.invert(equals(columns["split"], "unlabeled"))
        )
        if pc.any(nameless).as_py():
            columns["class_name"] = pc.if_else(
                nameless, by_value(columns["label"], names.get, pa.string()), name
            )
        columns = _corrected(columns, rules, names)
        if rules.remapped:
            columns["label"] = by_value(columns["label"], renumbered, pa.int32())
        columns = _digests(columns, tally)
        columns = _inspected(
            columns, rules.data.root, found.etags, tally, f"to row {start:,} of {survey.rows:,}"
        )
        columns = assign_splits(columns, rules.data, survey.given, tally)
        made = pa.table({"split": columns["split"], "source": columns["source"]})
        counts = made.group_by(["split", "source"]).aggregate([([], "count_all")]).to_pylist()
        tally.rows.update({(one["split"], one["source"]): one["count_all"] for one in counts})
        yield pa.record_batch([columns[name] for name in manifests.SCHEMA.names], schema=manifests.SCHEMA)


def correct(run: StepContext, survey: Survey, rules: RowRules, names: dict[int, str]) -> None:
    """Work out what ``data.corrections`` does to the rows that it names: another label, or out."""
    if rules.data.corrections is None:
        return
    order = numbers(names)
    dropped = 0
    for path, split in survey.judged:
        verdict = rules.verdicts[path]
        if verdict is None or (verdict.strip() == "drop" and "drop" not in order):
            rules.corrected[path] = None
            dropped += 1
            continue
        label = order.get(verdict, order.get(verdict.strip()))
        if label is None and re.fullmatch(r"\d{1,10}", verdict.strip()) and int(verdict) in names:
            label = int(verdict)
        if label is None:
            raise RetortError(
                f"{rules.data.corrections}: no class '{verdict}' for {path}; use a name, or drop"
            )
        rules.corrected[path] = label
        survey.labels.add(label)
        survey.splits.add(None if split == "unlabeled" else split)
    run.add_finding(
        "ingest.corrections", "info", rules.data.corrections,
        f"{counted(len(survey.judged), 'row')} corrected, {dropped:,} of them dropped.",
        measured=len(survey.judged),
    )  # fmt: skip
    if missing := sorted(set(rules.verdicts) - set(rules.corrected)):
        run.add_finding(
            "ingest.corrections", "warning", rules.data.corrections,
            f"{counted(len(missing), 'path is', 'paths are')} not in the data, "
            f"such as {', '.join(missing[:3])}.",
            measured=len(missing), advice="Paths are those of the manifest, relative to data.root.",
        )  # fmt: skip


def _corrected(columns: Columns, rules: RowRules, names: dict[int, str]) -> Columns:
    judged = pc.is_in(columns["path"], rules.judged) if rules.corrected else None
    if judged is None or not pc.any(judged).as_py():
        return columns
    labels = [rules.corrected[path] for path in columns["path"].filter(judged).to_pylist()]
    split = columns["split"]
    again = pc.and_(judged, equals(split, "unlabeled"))  # it has a label now
    columns = {
        **columns,
        "label": put(columns["label"], judged, labels),
        "class_name": put(
            columns["class_name"], judged, [None if label is None else names[label] for label in labels]
        ),
        "split": put(split, again, None),
    }
    return kept(columns, pc.invert(pc.and_(judged, pc.is_null(columns["label"]))))


def _digests(columns: Columns, tally: Tally) -> Columns:
    """Hashes in small letters; what is no sha256 in hexadecimal is forgotten, and worked out then."""
    digests = columns["sha256"]
    usual = pc.fill_null(pc.match_substring_regex(digests, "^[0-9a-f]{64}$"), True)
    if pc.all(usual, min_count=0).as_py():
        return columns
    digests = pc.ascii_lower(digests)
    bad = pc.invert(pc.fill_null(pc.match_substring_regex(digests, "^[0-9a-f]{64}$"), True))
    tally.hashed_anew += columns["path"].filter(bad).to_pylist()
    return {**columns, "sha256": put(digests, bad, None)}


def _inspected(columns: Columns, root: str, etags: dict[str, str], tally: Tally, where: str) -> Columns:
    """Hashes and sizes of the rows whose source does not bring them."""
    unknown = pc.is_null(columns["sha256"])
    paths = columns["path"].filter(unknown).to_pylist()
    if not paths:
        return columns
    once = list(dict.fromkeys(paths))
    known = dict(zip(once, inspect_all(root, once, etags, f"reading images {where}"), strict=True))
    # content that nobody saw; what is wrong with an image that was read, validate says
    tally.missing += [(path, one.problem) for path, one in known.items() if one.rule and one.sha256 is None]
    columns = dict(columns)
    for name in ("sha256", "bytes", "phash", "width", "height"):
        columns[name] = put(columns[name], unknown, [getattr(known[path], name) for path in paths])
    return columns


def in_order(rows: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The rows by what they say, so that the order of a source does not matter; on disk, beyond 2 GB."""
    with tempfile.TemporaryDirectory(prefix="ingest-", dir=state_dir("cache")) as folder:
        file = Path(folder) / "unsorted.parquet"
        with pq.ParquetWriter(file, manifests.SCHEMA, compression="lz4") as writer:
            for batch in rows:
                writer.write_batch(batch)
        with database(file) as db:
            table = db.read_parquet(str(file), file_row_number=True)
            names = ", ".join(f'"{name}"' for name in manifests.SCHEMA.names)
            by = 'path, split, label, source, class_name, "group", file_row_number'
            ordered = table.order(by).project(names)
            for batch in ordered.to_arrow_reader(PORTION):
                yield batch.cast(manifests.SCHEMA)

"""The step ``validate``: every row of the manifest ends as clean, or in quarantine with a reason."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.common.errors import RetortError
from components.common.progress import counted
from components.common.storage import human_bytes
from components.dataset import drift, report, s3
from components.dataset import manifest as manifests
from components.dataset.database import database
from components.dataset.inspection import FLAT, inspect_all
from components.dataset.manifest import image_path
from components.dataset.near import SURE_ROUNDING, SURE_WORST, near_duplicates, same_everywhere
from components.dataset.params import ValidateParams
from components.dataset.quality import report as quality
from components.step import Run, step

if TYPE_CHECKING:
    import duckdb
    from numpy.typing import NDArray

PORTION = 50_000  # rows whose inspections are in memory at once
WORST = 10  # subjects that a report names one by one
SMALLEST_SIDE = 8  # pixels
LONGEST = 20  # times the shorter side
TWELVE_BITS = 4095 // 257  # the brightest of 12 bits in an image of 16, as 8 bits
FEATURES = 1280  # inputs of the last FC layer that costs are said for: those of the default networks
EVAL = "split in ('val', 'test')"

# whatever made a row bad may be that a value is missing
QUARANTINE = pa.schema(
    [*(field.with_nullable(True) for field in manifests.SCHEMA), pa.field("reason", pa.string())],
    metadata=manifests.SCHEMA.metadata,
)


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
    inputs = {"data/manifest.parquet": manifest}
    baseline = Path(params.validation.baseline) if params.validation.baseline else None
    if baseline:
        inputs[str(baseline)] = baseline
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
        before = drift.read_baseline(db, baseline) if baseline else None
        source = str(manifest).replace("'", "''")  # a view takes no parameters
        db.execute(
            "create view m as select file_row_number as row, * exclude (file_row_number) "  # noqa: S608
            f"from read_parquet('{source}', file_row_number = true)"
        )
        db.execute(
            "create table cases (rule varchar, row bigint, path varchar, other varchar, detail varchar)"
        )
        _rows(db)
        looked = _images(run, db, params)
        _same_content(db, looked)
        if looked:
            _near(run, db, params.validation.near_duplicate_bits)
        _report_cases(run, db)
        _labels(run, db, params)
        _names(run, db)
        _groups_apart(run, db)
        counts = _quarantined(run, db, params, looked)
        # after that: what it names stays
        show_quality = quality.audit(run, db, out) if looked and params.validation.quality else None
        clean_counts = _clean_counts(db)
        _lost_classes(run, db, clean_counts)
        drift.write_counts(clean_counts, run.product(out / "counts.parquet"))
        if baseline and before is not None:
            drift.report(run, db, baseline, before, clean_counts.to_pandas(), out)
        _expect(run, db, params, counts, out)
        _write_findings(db, out)
        report.sections(run, db, params, counts, looked)
        if show_quality:
            show_quality(params.data.root)
        _write_rows(run, db, manifest, clean, quarantine)


def _same_file(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()


def _rows(db: duckdb.DuckDBPyConnection) -> None:
    """Rows that break the manifest's own rules; ingest writes none of these, but a person may."""
    checks = (
        ("manifest.path", "path is null or path = ''", "the path is empty"),
        ("manifest.split", f"split is null or split not in {manifests.SPLITS}", "the split is unknown"),
        ("manifest.source", f"source is null or source not in {manifests.SOURCES}", "the source is unknown"),
        ("labels.missing", "split <> 'unlabeled' and (label is null or label < 0)", "the label is missing"),
        ("labels.unlabeled", "split = 'unlabeled' and label <> -1", "an unlabelled row has a label"),
        ("leakage.synthetic", f"{EVAL} and source <> 'real'", "only real images can judge a classifier"),
    )
    for rule, condition, detail in checks:
        db.execute(
            f"insert into cases select '{rule}', row, coalesce(path, ''), '', '{detail}' "  # noqa: S608
            f"from m where {condition}"
        )


def _images(run: Run, db: duckdb.DuckDBPyConnection, params: ValidateParams) -> bool:
    """Decode the images that ``validate.images`` asks for; returns whether there were any."""
    wanted = params.validation.images
    if wanted == "none" or wanted == 0:
        run.find(
            "image.unreadable", "info", "images",
            "validate.images is 'none': no image was opened. Unreadable images and near-duplicates are not "
            "known; exact duplicates and leakage are, from the manifest's hashes.",
        )  # fmt: skip
        return False
    db.execute(
        "create table seen (row bigint, rule varchar, problem varchar, sha256 varchar, width int, "
        "height int, mode varchar, frames int, rotated boolean, contrast double, phash ubigint, look blob, "
        "quality blob)"
    )
    total = db.execute("select count(*) from m").fetchall()[0][0]
    order = "order by row" if wanted == "all" else f"order by md5(path), row limit {int(wanted)}"
    chosen = db.sql(f"select row, path from m {order}").to_arrow_table()  # noqa: S608
    buckets = db.execute(
        "select distinct split_part(path, '/', 3) from m where starts_with(path, 's3://')"
    ).fetchall()
    for (bucket,) in buckets:  # this may be another machine than the one that ingested
        s3.remember_store(bucket, params.data.s3)
    for start in range(0, chosen.num_rows, PORTION):
        portion = chosen.slice(start, PORTION)
        paths = portion["path"].to_pylist()
        what = f"checking images {start:,} to {start + len(paths):,} of {chosen.num_rows:,}"
        seen = inspect_all(params.data.root, paths, what=what)
        columns = {name: [getattr(one, name) for one in seen] for name in _SEEN.names if name != "row"}
        batch = pa.table({"row": portion["row"], **columns}, schema=_SEEN)  # noqa: F841 - read by DuckDB
        db.execute("insert into seen select * from batch")
    if chosen.num_rows < total:
        run.find(
            "image.unreadable", "info", "images",
            f"validate.images is {wanted:,}: "
            f"{counted(total - chosen.num_rows, 'image was', 'images were')} not opened.",
            measured=chosen.num_rows, limit=total,
        )  # fmt: skip
    db.execute(
        "insert into cases select rule, row, path, '', problem from seen join m using (row) where rule <> ''"
    )
    db.execute(
        """insert into cases
        select 'image.changed', row, m.path, '', 'the file is not the one that ingest read'
        from seen join m using (row)
        where seen.rule = '' and m.sha256 is not null and seen.sha256 <> m.sha256"""
    )
    db.execute(
        f"""insert into cases
        with sides as (select row, width, height, least(width, height) as short,
            greatest(width, height) as long from seen where rule = '')
        select 'image.size', row, path, '', sides.width || ' x ' || sides.height || ' pixels'
        from sides join m using (row) where short < {SMALLEST_SIDE} or long > {LONGEST} * short"""  # noqa: S608
    )
    _modes(run, db)
    return True


_SEEN = pa.schema(
    [
        ("row", pa.int64()),
        ("rule", pa.string()),
        ("problem", pa.string()),
        ("sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("mode", pa.string()),
        ("frames", pa.int32()),
        ("rotated", pa.bool_()),
        ("contrast", pa.float64()),
        ("phash", pa.uint64()),
        ("look", pa.binary()),
        ("quality", pa.binary()),
    ]
)


def _modes(run: Run, db: duckdb.DuckDBPyConnection) -> None:
    """Say what decoding does to images that are not plain RGB or grey."""
    modes = db.execute(
        "select mode, count(*) from seen where rule = '' and mode not in ('RGB', 'L') "
        "group by mode order by 2 desc, 1"
    ).fetchall()
    if modes:
        run.find(
            "image.mode", "info", ", ".join(mode for mode, _ in modes),
            "Not plain RGB or grey, and made so by every step alike (alpha over white, 16 bits to 8): "
            + ", ".join(f"{mode} ({count:,})" for mode, count in modes) + ".",
            measured=sum(count for _, count in modes),
        )  # fmt: skip
    looks = db.execute("select look from seen where rule = '' and starts_with(mode, 'I')").fetchall()
    if dark := sum(max(look) <= TWELVE_BITS for (look,) in looks):
        run.find(
            "image.mode", "warning", "16 bits",
            f"{counted(dark, '16-bit image is', '16-bit images are')} nearly black: they seem to use 12 of "
            "the 16 bits, or fewer.",
            measured=dark, limit=0, advice="Scale their values to all 16 bits, or save them as 8 bits.",
        )  # fmt: skip
    rotated, animated = db.execute(
        "select count(*) filter (rotated), count(*) filter (frames > 1) from seen where rule = ''"
    ).fetchall()[0]
    if rotated:
        run.find(
            "image.exif", "info", "orientation",
            f"{counted(rotated, 'image carries', 'images carry')} an EXIF rotation, "
            "which every step applies.",
            measured=rotated,
        )  # fmt: skip
    if animated:
        run.find(
            "image.frames", "info", "animated",
            f"{counted(animated, 'image has', 'images have')} several frames; the first one counts.",
            measured=animated,
        )  # fmt: skip


def _same_content(db: duckdb.DuckDBPyConnection, looked: bool) -> None:
    """Exact duplicates, contradicting labels, and training rows that also stand in validation or test."""
    # a row whose content nobody has read is still known by its path
    unread = db.execute("select count(*) from m where sha256 is null").fetchall()[0][0]
    content, rows = "m.sha256", "m"
    if unread and looked:
        content, rows = "coalesce(m.sha256, seen.sha256, m.path)", "m left join seen using (row)"
    elif unread:
        content = "coalesce(m.sha256, m.path)"
    # 64-bit hashes first: a table of 43 million hexadecimal strings would not stay in memory
    db.execute(
        f"""create table same as
        with often as (select hash({content}) as h from {rows} group by h having count(*) > 1)
        select row, m.path, label, split, source, {content} as sha256 from {rows}
        where hash({content}) in (select h from often)
            and row not in (select row from cases where rule in ('image.unreadable', 'image.bomb'))"""  # noqa: S608
    )
    db.execute(
        "delete from same where sha256 in (select sha256 from same group by sha256 having count(*) = 1)"
    )
    # what leaves validation anyway must not take its good twin in training along
    db.execute(
        f"""insert into cases
        with held as
            (select sha256, min(path) as path, min_by(split, path) as split from same
            where {EVAL} and row not in (select row from cases where rule not in {KEPT}) group by 1)
        select 'leakage.exact', same.row, same.path, held.path, 'the same content, in ' || held.split
        from same join held using (sha256) where same.split in ('train', 'unlabeled')"""  # noqa: S608
    )
    db.execute(
        """insert into cases
        with first as
            (select sha256, split, min(row) as row, min_by(path, row) as path from same group by 1, 2)
        select 'duplicates.exact', same.row, same.path, first.path, 'the same content, in ' || same.split
        from same join first using (sha256, split) where same.row <> first.row"""
    )
    db.execute(
        """insert into cases
        with torn as (select sha256, min(label) as low, min_by(path, label) as path from same where label >= 0
            group by 1 having count(distinct label) > 1)
        select 'duplicates.labels', same.row, same.path, torn.path, 'the same content, labels ' || same.label
            || ' and ' || torn.low
        from same join torn using (sha256) where same.label > torn.low"""
    )
    db.execute(
        """insert into cases
        with tests as (select sha256, min(path) as path from same where split = 'test' group by 1)
        select 'duplicates.exact', same.row, same.path, tests.path, 'the same content, in val and in test'
        from same join tests using (sha256) where same.split = 'val'"""
    )


def _near(run: Run, db: duckdb.DuckDBPyConnection, bits: int) -> None:
    """Near-duplicates among the images that were opened; flat and dark ones don't count."""
    contents = db.sql(
        f"""select min(row) as row, min_by(m.path, row) as path, min_by(m.label, row) as label,
            bool_or({EVAL}) as held, bool_or(not ({EVAL})) as training, min_by(m.split, row) as split,
            any_value(seen.phash) as phash, any_value(seen.look) as look
        from seen join m using (row)
        where seen.rule = '' and seen.contrast >= {FLAT}
            and row not in (select row from cases where rule not in {KEPT})
        group by seen.sha256 order by 1"""  # noqa: S608
    ).to_arrow_table()
    if contents.num_rows < 2:
        return
    hashes = contents["phash"].to_numpy()
    looks = np.frombuffer(b"".join(contents["look"].to_pylist()), np.uint8).reshape(-1, 256)
    held = contents["held"].to_numpy(zero_copy_only=False)
    labels = contents["label"].to_numpy()
    splits = np.unique(contents["split"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)[1]
    kinds = np.unique(np.stack([splits, labels]), axis=1, return_inverse=True)[1]
    pairs = near_duplicates(hashes, looks, kinds, bits)
    # another label: likelier another thing, and no score is better for it, so a doubt takes nothing away
    low, high = (function(labels[pairs.one], labels[pairs.other]) for function in (np.minimum, np.maximum))
    doubtful = (low >= 0) & (low < high)
    one, other = pairs.one[doubtful], pairs.other[doubtful]
    doubtful[doubtful] = ~same_everywhere(looks, one, other, SURE_WORST, SURE_ROUNDING)
    paths, rows, names = (contents[name].to_pylist() for name in ("path", "row", "split"))
    distance = np.bitwise_count(hashes[pairs.one] ^ hashes[pairs.other])
    found: list[tuple[str, int, str, str, str]] = []
    for one, other, alike, apart, doubt in zip(
        pairs.one, pairs.other, pairs.alike, distance, doubtful, strict=True
    ):
        detail = f"concordance {alike:.4f}, {apart} of 64 bits apart, in {names[other]}"
        leaks = held[other] and not held[one]
        if leaks and not doubt:
            found.append(("leakage.near", rows[one], paths[one], paths[other], detail))
        elif held[one] == held[other] and rows[other] < rows[one]:
            found.append(("duplicates.near", rows[one], paths[one], paths[other], detail))
        if labels[one] > labels[other] >= 0 or (leaks and doubt):
            torn = f"labels {labels[one]} and {labels[other]}, {detail}"
            found.append(("duplicates.labels", rows[one], paths[one], paths[other], torn))
    if not found:
        return
    columns = list(zip(*found, strict=True))
    names_of = ("rule", "row", "path", "other", "detail")
    batch = pa.table(dict(zip(names_of, map(list, columns), strict=True)))  # noqa: F841 - read by DuckDB
    db.execute("insert into cases select * from batch")
    # copies of the same content share the verdict
    db.execute(
        """insert into cases select c.rule, twin.row, twin.path, c.other, c.detail
        from cases c join same on same.row = c.row
        join same twin on twin.sha256 = same.sha256 and twin.row <> c.row
        where c.rule = 'leakage.near' and twin.split in ('train', 'unlabeled')
        and twin.row not in (select row from cases where rule like 'leakage%')"""
    )


# rule: (level, what happened to one and to several, the way out, row)
CASES = {
    "manifest.path": (
        "warning", ("row has no path", "rows have no path"),
        "They are quarantined: mend the manifest.", ""),
    "manifest.split": (
        "warning", ("row has an unknown split", "rows have an unknown split"),
        "They are quarantined: use train, val, test or unlabeled.", ""),
    "manifest.source": (
        "warning", ("row has an unknown source", "rows have an unknown source"),
        "They are quarantined: use real, synthetic or semi_synthetic.", ""),
    "labels.missing": (
        "warning", ("labelled row has no label", "labelled rows have no label"),
        "They are quarantined: name their class.", "2.1"),
    "labels.unlabeled": (
        "warning", ("unlabelled row carries a label", "unlabelled rows carry a label"),
        "Use -1 in the split unlabeled.", "2.1"),
    "image.unreadable": (
        "warning", ("image cannot be decoded", "images cannot be decoded"),
        "They are quarantined: mend or replace these files.", "",
    ),
    "image.bomb": (
        "warning", ("image is too large to be decoded safely", "images are too large to be decoded safely"),
        "They are quarantined: shrink them.", ""),
    "image.changed": (
        "warning", ("image changed since ingest", "images changed since ingest"),
        "They are quarantined: run 'retort ingest' again.", ""),
    "image.size": (
        "warning",
        (f"image is smaller than {SMALLEST_SIDE} pixels or {LONGEST} times as long as wide",
         f"images are smaller than {SMALLEST_SIDE} pixels or {LONGEST} times as long as wide"),
        "They stay: look whether they are what they should be.", "",
    ),
    "duplicates.exact": (
        "warning", ("row repeats the content of another", "rows repeat the content of another row"),
        "They stay: each counts as often.", "",
    ),
    "duplicates.near": (
        "warning", ("image is a near-duplicate of another", "images are near-duplicates of another"),
        "They stay: each counts as often.", "",
    ),
    "duplicates.labels": (
        "warning", ("image stands there again, or nearly so, with another label",
         "images stand there again, or nearly so, with another label"),
        "They stay: decide with data.corrections which label is right.", "2.1",
    ),
    "leakage.exact": (
        "warning", ("training or unlabelled row also stands in validation or test",
         "training or unlabelled rows also stand in validation or test"),
        "They are quarantined. A lower score than before is a correction, not a loss.", "B3",
    ),
    "leakage.near": (
        "warning", ("training or unlabelled row is a near-duplicate of a validation or test image",
         "training or unlabelled rows are near-duplicates of validation or test images"),
        "They are quarantined. A lower score than before is a correction, not a loss.", "B3",
    ),
    "leakage.synthetic": (
        "warning", ("synthetic row stands in validation or test",
         "synthetic rows stand in validation or test"),
        "They are quarantined: only real images judge.", "4.1",
    ),
}  # fmt: skip
# reported, never removed
KEPT = ("image.size", "duplicates.exact", "duplicates.near", "duplicates.labels")


def _report_cases(run: Run, db: duckdb.DuckDBPyConnection) -> None:
    """One finding a rule, with its first subjects; every case stands in findings.parquet."""
    for rule, (level, what, advice, row) in CASES.items():
        count = db.execute("select count(distinct row) from cases where rule = ?", [rule]).fetchall()[0][0]
        if not count:
            continue
        worst = db.execute(
            """select path, other, detail from cases where rule = ?
            qualify row_number() over (partition by row order by other, detail) = 1
            order by path, other, detail limit ?""",
            [rule, WORST],
        ).fetchall()
        shown = "; ".join(
            f"{path}{f' = {other}' if other else ''} ({detail})" for path, other, detail in worst[:3]
        )
        run.find(
            rule, level, ", ".join(path for path, _, _ in worst),  # type: ignore[arg-type]
            f"{counted(count, *what)}: {shown}{' and others' if count > 3 else ''}. "
            "All of them: findings.parquet.",
            measured=count, limit=0, advice=advice, row=row,
        )  # fmt: skip


def _labels(run: Run, db: duckdb.DuckDBPyConnection, params: ValidateParams) -> None:
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
    remap = "Set data.remap_labels: true; the mapping is saved in outputs/ingest/label_map.json."
    if lowest > 0:
        run.find(
            "labels.start", "warning", f"label {lowest}",
            f"Labels start at {lowest}, not at 0: {_cost(lowest)}", measured=lowest, limit=0,
            advice=remap, row="2.1",
        )  # fmt: skip
    missing = highest - lowest + 1 - len(found)
    if missing:
        known = set(found)
        first = list(islice((label for label in range(lowest, highest) if label not in known), 5))
        run.find(
            "labels.contiguous", "warning",
            f"labels {', '.join(map(str, first))}{', ...' if missing > 5 else ''}",
            f"{counted(missing, 'label')} between {lowest} and {highest} "
            f"{'has' if missing == 1 else 'have'} no images: {_cost(missing)}",
            measured=missing, limit=0, advice=remap, row="2.1",
        )  # fmt: skip
    given = params.general.class_num
    if given != "auto" and given <= highest:
        run.find(
            "labels.class_num", "error", f"global.class_num {given}",
            f"The highest label is {highest}, so there are {highest + 1} classes, not {given}.",
            measured=given, limit=highest + 1,
            advice=f"Set global.class_num to auto or {highest + 1}, or check label {highest}.", row="2.1",
        )  # fmt: skip
    elif given != "auto" and given > highest + 1:
        run.find(
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


def _names(run: Run, db: duckdb.DuckDBPyConnection) -> None:
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
            run.find(
                "labels.names", "warning", f"{one} {', '.join(repr(key) for key, _, _ in torn[:WORST])}",
                f"{counted(len(torn), *what)}, such as {first!r}: {low!r} and {high!r}.",
                measured=len(torn), limit=0, advice="Give each label one name of its own.", row="2.1",
            )  # fmt: skip


def _lost_classes(run: Run, db: duckdb.DuckDBPyConnection, clean_counts: pa.Table) -> None:
    """Classes that have rows, but no clean one: training would count them and never see them."""
    clean = set(clean_counts["label"].to_pylist())
    rows = db.execute(
        "select label, min(class_name), sum(rows) from groups where split <> 'unlabeled' and label >= 0 "
        "group by 1 order by 1"
    ).fetchall()
    lost = [(name or str(label), int(count)) for label, name, count in rows if label not in clean]
    if lost:
        run.find(
            "labels.classes", "warning", ", ".join(f"class '{name}'" for name, _ in lost[:WORST]),
            f"{len(lost):,} of {len(rows):,} classes "
            f"{'has' if len(lost) == 1 else 'have'} no clean row left, "
            f"such as '{lost[0][0]}' ({counted(lost[0][1], 'row')}, all quarantined).",
            measured=len(lost), limit=0, advice="Mend these images, or take the class out.", row="2.1",
        )  # fmt: skip


def _groups_apart(run: Run, db: duckdb.DuckDBPyConnection) -> None:
    """Images of one group (frames of one recording) on both sides of a split."""
    parted = db.execute(
        f"""select "group", count(*) from m where "group" is not null and split <> 'unlabeled' group by 1
        having bool_or({EVAL}) and bool_or(split = 'train') order by 2 desc, 1"""  # noqa: S608
    ).fetchall()
    if parted:
        run.find(
            "leakage.group", "warning", ", ".join(name for name, _ in parted[:WORST]),
            f"{counted(len(parted), 'group stands', 'groups stand')} on both sides of a split.",
            measured=len(parted), limit=0,
            advice="Let ingest split (no splits in the source), or move whole groups.",
        )  # fmt: skip


def _quarantined(
    run: Run, db: duckdb.DuckDBPyConnection, params: ValidateParams, looked: bool
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
        run.find(
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
            run.find(
                "splits.empty", "error", f"split '{split}'", f"No clean row is left in '{split}'.",
                measured=0, limit=1, advice="See what was quarantined, and mend the source.",
            )  # fmt: skip
    run.find(
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


def _clean_counts(db: duckdb.DuckDBPyConnection) -> pa.Table:
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


def _expect(
    run: Run, db: duckdb.DuckDBPyConnection, params: ValidateParams, counts: dict[str, Any], out: Path
) -> None:
    """Run the suite; what it finds beyond the findings so far is added to them."""
    from components.dataset import suite

    groups = db.execute(
        """select label, class_name, split, source, rows, without_path, if(min(class_name) over same_label
        is not distinct from max(last_name) over same_label, 1, 2) as names
        from groups window same_label as (partition by label) order by all"""
    ).df()
    labels = sorted(set(groups.loc[(groups["split"] != "unlabeled") & (groups["label"] >= 0), "label"]))
    cases = counts["cases"]
    given = params.general.class_num
    totals = {
        "rows": counts["rows"],
        **{split: counts["splits"].get(split, 0) for split in manifests.SPLITS},
        "classes": len(labels),
        "lowest_label": min(labels, default=0),
        "gaps": max(labels, default=0) - min(labels, default=0) + 1 - len(labels) if labels else 0,
        "unreadable": cases.get("image.unreadable", 0),
        "bombs": cases.get("image.bomb", 0),
        "exact_duplicates": cases.get("duplicates.exact", 0),
        "near_duplicates": cases.get("duplicates.near", 0),
        "contradicting_labels": cases.get("duplicates.labels", 0),
        "exact_leaks": cases.get("leakage.exact", 0),
        "near_leaks": cases.get("leakage.near", 0),
        "quarantined_share": counts["share"],
    }
    import pandas as pd

    failures = suite.run(
        {"groups": groups, "totals": pd.DataFrame([totals])},
        max_bad_share=params.validation.max_bad_share,
        class_num=max(labels, default=0) + 1 if given == "auto" else given,
        docs=out / "data_docs",
    )
    said = {finding.rule for finding in run.report.findings}
    for failure in failures:
        if failure.rule not in said:
            run.find(failure.rule, failure.level, failure.subject, failure.message)  # type: ignore[arg-type]


def _write_findings(db: duckdb.DuckDBPyConnection, out: Path) -> None:
    table = db.sql(
        "select rule, path, other, detail from cases order by rule, path, other, detail"
    ).to_arrow_table()
    pq.write_table(table, out / "findings.parquet", compression="zstd")


def _write_rows(
    run: Run, db: duckdb.DuckDBPyConnection, manifest: Path, clean: Path, quarantine: Path
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

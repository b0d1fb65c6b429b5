"""What images hold: whether they can be decoded, and which are the same, or nearly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from components.common.progress import counted
from components.dataset import s3
from components.dataset.inspection import FLAT, inspect_all
from components.dataset.near import SURE_ROUNDING, SURE_WORST, near_duplicates, same_everywhere
from components.dataset.params import ValidateParams
from components.dataset.rules import EVAL, KEPT, LONGEST, SMALLEST_SIDE
from components.step import StepContext

if TYPE_CHECKING:
    import duckdb

PORTION = 50_000  # rows whose inspections are in memory at once
TWELVE_BITS = 4095 // 257  # the brightest of 12 bits in an image of 16, as 8 bits


def images(run: StepContext, db: duckdb.DuckDBPyConnection, params: ValidateParams) -> bool:
    """Decode the images that ``validate.images`` asks for; returns whether there were any."""
    wanted = params.validation.images
    if wanted == "none" or wanted == 0:
        run.add_finding(
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
        run.add_finding(
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


def _modes(run: StepContext, db: duckdb.DuckDBPyConnection) -> None:
    """Say what decoding does to images that are not plain RGB or grey."""
    modes = db.execute(
        "select mode, count(*) from seen where rule = '' and mode not in ('RGB', 'L') "
        "group by mode order by 2 desc, 1"
    ).fetchall()
    if modes:
        run.add_finding(
            "image.mode", "info", ", ".join(mode for mode, _ in modes),
            "Not plain RGB or grey, and made so by every step alike (alpha over white, 16 bits to 8): "
            + ", ".join(f"{mode} ({count:,})" for mode, count in modes) + ".",
            measured=sum(count for _, count in modes),
        )  # fmt: skip
    looks = db.execute("select look from seen where rule = '' and starts_with(mode, 'I')").fetchall()
    if dark := sum(max(look) <= TWELVE_BITS for (look,) in looks):
        run.add_finding(
            "image.mode", "warning", "16 bits",
            f"{counted(dark, '16-bit image is', '16-bit images are')} nearly black: they seem to use 12 of "
            "the 16 bits, or fewer.",
            measured=dark, limit=0, advice="Scale their values to all 16 bits, or save them as 8 bits.",
        )  # fmt: skip
    rotated, animated = db.execute(
        "select count(*) filter (rotated), count(*) filter (frames > 1) from seen where rule = ''"
    ).fetchall()[0]
    if rotated:
        run.add_finding(
            "image.exif", "info", "orientation",
            f"{counted(rotated, 'image carries', 'images carry')} an EXIF rotation, "
            "which every step applies.",
            measured=rotated,
        )  # fmt: skip
    if animated:
        run.add_finding(
            "image.frames", "info", "animated",
            f"{counted(animated, 'image has', 'images have')} several frames; the first one counts.",
            measured=animated,
        )  # fmt: skip


def same_content(db: duckdb.DuckDBPyConnection, looked: bool) -> None:
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


def near(run: StepContext, db: duckdb.DuckDBPyConnection, bits: int) -> None:
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

"""The step ``ingest``: whatever ``data.source`` is becomes one manifest, the same bytes each time."""

from __future__ import annotations

import csv
import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.common import sheet
from components.common.errors import ConfigError, RetortError
from components.common.progress import counted
from components.common.sheet import write_csv
from components.common.storage import state_dir, write_json
from components.dataset import manifest as manifests
from components.dataset import places, s3, sources
from components.dataset.columns import Columns, by_value, equals, kept, matches, put
from components.dataset.database import database
from components.dataset.images import NOT_READ
from components.dataset.inspection import inspect_all
from components.dataset.names import name_classes, numbers
from components.dataset.params import Data, IngestParams
from components.dataset.sources import Found
from components.dataset.splits import splits_of
from components.step import Run, step

WORST = 10  # subjects that a report names one by one
SURVEYED = ("path", "below", "label", "class_name", "split", "group")


def ingest(params: IngestParams, *, manifest: Path, out: Path) -> None:
    """Read ``data.source`` and write ``manifest``.

    The rows pass twice, a portion at a time, so that memory does not grow with them: once to learn what
    the data as a whole says (classes, splits), once to be written.

    Raises:
        RetortError: when there is nothing to read, or fewer than two classes.
    """
    data = params.data
    inputs = {path: Path(path) for path in _files_read(data)}
    with step("ingest", params, out, inputs, products=[manifest]) as run:
        found = sources.read(params)
        rules = _Rules(data)
        survey = _surveyed(found, rules)
        if found.listed:
            places.check_lists(run, data, found)
        names = name_classes(run, data, survey.named, survey.unnumbered)
        order = numbers(names)
        survey.labels |= {order[name] for name in survey.classes}
        _correct(run, survey, rules, names)
        _report_rejected(run, found, out)
        _need_classes(run, survey, names, found)
        if data.remap_labels:
            old = sorted(label for label in survey.labels if label >= 0)
            rules.remapped = {label: new for new, label in enumerate(old)}
            mapping = {str(old): new for old, new in rules.remapped.items()}
            write_json(run.product(out / "label_map.json"), mapping)
        tally = _Tally(real_groups=_real_groups(found, rules, survey))
        staged = run.product(manifest)
        rows = _finished(found, rules, survey, names, tally)
        manifests.write_all(rows if survey.in_order else _sorted(rows), staged)
        _report_splits(run, tally, out)
        _say(run, tally, len(survey.labels), staged)


def _files_read(data: Data) -> list[str]:
    listed = list(data.source.values()) if isinstance(data.source, dict) else [data.source]
    return [*listed, *filter(None, [data.class_names, data.corrections])]


class _Rules:
    """What the parameters say about each row by itself."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.kinds = [
            (pattern, kind)
            for globs, kind in ((data.synthetic, "synthetic"), (data.semi_synthetic, "semi_synthetic"))
            if (pattern := sources.matcher(globs))
        ]
        self.unlabeled = sources.matcher(data.unlabeled)
        self.group = _group_pattern(data)
        self.verdicts = _read_corrections(Path(data.corrections)) if data.corrections else {}
        self.judged = pa.array(sorted(self.verdicts), pa.string())  # paths that have a verdict
        self.corrected: dict[str, int | None] = {}  # new label by path; None: dropped
        self.remapped: dict[int, int] = {}

    def unlabel(self, columns: Columns) -> Columns:
        """Unlabelled rows, by their split or by the globs, have no class, whatever the source says."""
        free = equals(columns["split"], "unlabeled")
        if self.unlabeled:
            free = pc.or_(free, matches(self.unlabeled, columns["below"]))
        if not pc.any(free).as_py():
            return columns
        return {
            **columns,
            "split": put(columns["split"], free, "unlabeled"),
            "label": put(columns["label"], free, manifests.UNLABELED),
            "class_name": put(columns["class_name"], free, None),
        }

    def mark(self, columns: Columns) -> Columns:
        """Source from the globs, where the source itself says nothing, and group from the pattern."""
        source = columns["source"]
        for pattern, kind in self.kinds if source.null_count else []:
            unknown = pc.is_null(source)
            source = put(source, pc.and_(unknown, matches(pattern, columns["below"])), kind)
        columns = {**columns, "source": pc.fill_null(source, "real")}
        if self.group:
            search = self.group.search
            found = (search(below) for below in columns["below"].to_pylist())
            columns["group"] = pa.array([match[1] if match else None for match in found], pa.string())
        return columns


def _group_pattern(data: Data) -> re.Pattern[str] | None:
    """The pattern in ``data.group``; None where there is none, or where it is a column's name."""
    if data.group is None or "(" not in data.group:
        return None
    try:
        pattern = re.compile(data.group)
    except re.error as error:
        raise ConfigError(f"data.group: '{data.group}' is no regular expression ({error})") from None
    if pattern.groups != 1:
        raise ConfigError(f"data.group: '{data.group}' has {pattern.groups} captures, expected one")
    return pattern


@dataclass
class _Survey:
    """What the data as a whole says: everything by which one row decides about another."""

    named: dict[int, str | None] = field(default_factory=dict)  # first name of each label that is given
    unnumbered: set[str] = field(default_factory=set)  # classes that come without a label
    labels: set[int] = field(default_factory=set)  # of the rows as they will be, but for those judged
    classes: set[str] = field(default_factory=set)  # the same, of classes that come without a label
    splits: set[str | None] = field(default_factory=set)  # the same
    judged: list[tuple[str, str | None]] = field(default_factory=list)  # path and split, a row each
    rows: int = 0
    grouped: bool = False
    in_order: bool = True  # the paths rise from row to row

    @property
    def given(self) -> set[str | None]:
        """Splits that the source itself makes."""
        return self.splits - {None, "unlabeled"}


def _surveyed(found: Found, rules: _Rules) -> _Survey:
    survey = _Survey()
    last = None
    for columns, rejected in found.portions(SURVEYED):
        found.rejected += rejected
        path = columns["path"]
        if not len(path):
            continue
        survey.rows += len(path)
        above = last is None or path[0].as_py() > last
        rising = above and pc.all(pc.greater(path[1:], path[:-1]), min_count=0).as_py()  # one row rises
        survey.in_order &= rising
        last = path[-1].as_py()
        _remember_stores(path, rules.data)
        survey.grouped |= columns["group"].null_count < len(path)
        columns = rules.unlabel(columns)
        labels, unnumbered = _classes(columns)
        for label, name in labels.items():
            survey.named[label] = survey.named.get(label) or name
        survey.unnumbered |= unnumbered
        judged = pc.is_in(path, rules.judged) if len(rules.judged) else None
        if judged is not None and pc.any(judged).as_py():
            of_judged = kept({"path": path, "split": columns["split"]}, judged)
            survey.judged += zip(of_judged["path"].to_pylist(), of_judged["split"].to_pylist(), strict=True)
            columns = kept(columns, pc.invert(judged))
            labels, unnumbered = _classes(columns)
        survey.labels |= set(labels)
        survey.classes |= unnumbered
        survey.splits |= set(pc.unique(columns["split"]).to_pylist())
    group = rules.data.group
    if group is not None and rules.group is None and (group != "group" or not survey.grouped):
        raise RetortError(
            f"data.group: '{group}' is no pattern with one capture, and the source has no such "
            "column; write a pattern such as '(.*)_frame'"
        )
    return survey


def _remember_stores(paths: pa.StringArray, data: Data) -> None:
    remote = paths.filter(pc.starts_with(paths, "s3://"))
    if len(remote):
        for start in pc.unique(pc.replace_substring_regex(remote, r"(?s)^(s3://[^/]*).*", r"\1")).to_pylist():
            s3.remember_store(s3.split(start)[0], data.s3)


def _classes(columns: Columns) -> tuple[dict[int, str | None], set[str]]:
    """Of the labelled rows: labels with their first name (None: without), and names that have no label."""
    labelled = pc.invert(equals(columns["split"], "unlabeled"))
    of_class = kept({name: columns[name] for name in ("label", "class_name")}, labelled)
    label, name = of_class["label"], of_class["class_name"]
    unnumbered = set(pc.unique(name.filter(pc.is_null(label))).to_pylist()) if label.null_count else set()
    name = pc.if_else(pc.equal(name, ""), None, name)
    table = pa.table({"label": label, "name": name}).filter(pc.is_valid(label))
    first = table.group_by("label", use_threads=False).aggregate([("name", "first")])
    labels = dict(zip(first["label"].to_pylist(), first["name_first"].to_pylist(), strict=True))
    return labels, {name or "" for name in unnumbered}


def _correct(run: Run, survey: _Survey, rules: _Rules, names: dict[int, str]) -> None:
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
    run.find(
        "ingest.corrections", "info", rules.data.corrections,
        f"{counted(len(survey.judged), 'row')} corrected, {dropped:,} of them dropped.",
        measured=len(survey.judged),
    )  # fmt: skip
    if missing := sorted(set(rules.verdicts) - set(rules.corrected)):
        run.find(
            "ingest.corrections", "warning", rules.data.corrections,
            f"{counted(len(missing), 'path is', 'paths are')} not in the data, "
            f"such as {', '.join(missing[:3])}.",
            measured=len(missing), advice="Paths are those of the manifest, relative to data.root.",
        )  # fmt: skip


def _read_corrections(file: Path) -> dict[str, str | None]:
    """Each path's verdict: a class, or None to drop it.

    A first line with a cell ``path`` names the columns, wherever they stand; others are ignored. Without one,
    a line is ``path,class``, or ``path,drop``.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:  # a path may hold line breaks
            lines = [[sheet.text(cell) for cell in line] for line in csv.reader(text)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RetortError(f"{file}: cannot be read ({error}); check data.corrections") from None
    header = [cell.strip().lower() for cell in lines[0]] if lines else []
    columns = header if "path" in header else None
    if columns and not {"label", "drop"} & set(columns):
        raise RetortError(f"{file}, line 1: no column 'label' or 'drop' beside 'path'")
    verdicts: dict[str, str | None] = {}
    for number, cells in enumerate(lines[1 if columns else 0 :], start=2 if columns else 1):
        if not cells:
            continue
        named = dict(zip(columns or ["path", "label"], cells, strict=False))
        try:
            judged, verdict = _verdict(named)
        except ValueError as error:
            raise RetortError(f"{file}, line {number}: {error}") from None
        path = named.get("path", "")
        if judged and verdicts.setdefault(path, verdict) != verdict:
            raise RetortError(
                f"{file}, line {number}: a second verdict on {path}: {verdicts[path] or 'drop'}, "
                f"{verdict or 'drop'}"
            )
    return verdicts


def _verdict(named: dict[str, str]) -> tuple[bool, str | None]:
    """Whether a line judges, and its verdict.

    Raises:
        ValueError: saying what is wrong with the line.
    """
    label, drop = named.get("label", ""), named.get("drop", "").strip().lower()
    if drop in ("1", "true", "yes", "drop"):
        return True, None
    if drop not in ("", "0", "false", "no"):
        raise ValueError(f"'{drop}' in column drop; use 1 or 0")
    if label.strip():
        return True, label
    if drop:
        return False, None  # an explicit 'no'
    raise ValueError("expected 'path,label' or 'path,drop'")


def _real_groups(found: Found, rules: _Rules, survey: _Survey) -> pa.Array:
    """The groups that hold real images, in one more pass; none where nothing is grouped."""
    groups: set[str] = set()
    if rules.group or survey.grouped:
        for columns, _ in found.portions((*SURVEYED, "source")):
            columns = rules.mark(rules.unlabel(columns))
            real = pc.and_(pc.equal(columns["source"], "real"), columns["group"].is_valid())
            real = pc.and_(real, pc.invert(equals(columns["split"], "unlabeled")))
            groups |= set(pc.unique(columns["group"].filter(real)).to_pylist())
    return pa.array(sorted(groups), pa.string())


@dataclass
class _Tally:
    """Rows that were written, by split and source; synthetic ones that left validation or test; paths of rows
    whose source gave something else as their sha256, of images that could not be opened, and of synthetic
    ones whose group is held out."""

    real_groups: pa.Array  # groups with real images, of which some are held out
    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    moved: int = 0
    hashed_anew: list[str] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)  # path, and why it could not be opened
    held_out: list[str] = field(default_factory=list)

    def by_split(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for (split, _), count in self.rows.items():
            counts[split] += count
        return counts


def _finished(
    found: Found, rules: _Rules, survey: _Survey, names: dict[int, str], tally: _Tally
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
        columns = _split(columns, rules.data, survey.given, tally)
        made = pa.table({"split": columns["split"], "source": columns["source"]})
        counts = made.group_by(["split", "source"]).aggregate([([], "count_all")]).to_pylist()
        tally.rows.update({(one["split"], one["source"]): one["count_all"] for one in counts})
        yield pa.record_batch([columns[name] for name in manifests.SCHEMA.names], schema=manifests.SCHEMA)


def _corrected(columns: Columns, rules: _Rules, names: dict[int, str]) -> Columns:
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


def _digests(columns: Columns, tally: _Tally) -> Columns:
    """Hashes in small letters; what is no sha256 in hexadecimal is forgotten, and worked out then."""
    digests = columns["sha256"]
    usual = pc.fill_null(pc.match_substring_regex(digests, "^[0-9a-f]{64}$"), True)
    if pc.all(usual, min_count=0).as_py():
        return columns
    digests = pc.ascii_lower(digests)
    bad = pc.invert(pc.fill_null(pc.match_substring_regex(digests, "^[0-9a-f]{64}$"), True))
    tally.hashed_anew += columns["path"].filter(bad).to_pylist()
    return {**columns, "sha256": put(digests, bad, None)}


def _inspected(columns: Columns, root: str, etags: dict[str, str], tally: _Tally, where: str) -> Columns:
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


def _sorted(rows: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
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
            for batch in ordered.to_arrow_reader(sources.PORTION):
                yield batch.cast(manifests.SCHEMA)


def _split(columns: Columns, data: Data, given: set[str | None], tally: _Tally) -> Columns:
    """Real images into splits where the source has none; others are for training alone.

    Synthetic images of a group whose real ones are held out are left out: training on them would part the
    group, and only real images judge.
    """
    whole = not given or given == {"train"}
    split, source = columns["split"], columns["source"]
    free, real = equals(split, "unlabeled"), pc.equal(source, "real")
    judging = pc.is_in(split, pa.array(["val", "test"]))
    tally.moved += pc.sum(pc.and_(judging, pc.invert(pc.or_(real, free)))).as_py() or 0
    left = pc.is_null(split)
    hashed = whole or "val" not in given  # else real images stand where the source says
    if hashed:
        left = pc.or_(left, equals(split, "train"))
    beside = pc.and_(pc.and_(left, pc.invert(real)), pc.is_in(columns["group"], tally.real_groups))
    beside = pc.and_(beside, pa.scalar(hashed))
    left = pc.or_(pc.and_(left, real), beside)
    result = pc.if_else(pc.or_(free, real), split, "train")
    if not pc.any(left).as_py():
        return {**columns, "split": result}
    # a group goes by its name, so that it stays where it is when images join it
    group = by_value(columns["group"], _digest, pa.string())
    digest = pc.coalesce(group, columns["sha256"]).filter(left)
    assigned = put(
        pa.array(["train"] * len(digest)), digest.is_valid(), splits_of(digest.drop_null(), data.splits)
    )
    if not whole:  # its own test split stays as it is
        training = equals(split.filter(left), "train")
        assigned = put(assigned, pc.and_(training, equals(assigned, "test")), "train")
    columns = {**columns, "split": put(result, left, assigned)}
    held = pc.and_(beside, pc.not_equal(columns["split"], "train"))
    if not pc.any(held).as_py():
        return columns
    tally.held_out += columns["path"].filter(held).to_pylist()
    return kept(columns, pc.invert(held))


def _digest(group: str) -> str | None:
    return hashlib.sha256(group.encode()).hexdigest() if group else None


def _report_splits(run: Run, tally: _Tally, out: Path) -> None:
    moved, counts = tally.moved, tally.by_split()
    if held := tally.held_out:
        write_csv(out / "held_out.csv", ([path] for path in held))
        run.find(
            "ingest.synthetic", "warning", "; ".join(held[:3]),
            f"{counted(len(held), 'synthetic image is no row', 'synthetic images are no rows')} of "
            "the manifest: real images of their groups are in validation or test. All of them: held_out.csv.",
            measured=len(held), limit=0,
            advice="They would be of use if their originals trained; data.group says what belongs together.",
            row="4.1",
        )  # fmt: skip
    if moved:
        run.find(
            "ingest.synthetic", "warning", "validation and test",
            f"{counted(moved, 'synthetic image')} stood in validation or test, and "
            f"{'is' if moved == 1 else 'are'} for training now.",
            measured=moved, limit=0, advice="Only real images can say how good a classifier is.", row="4.1",
        )  # fmt: skip
    if anew := tally.hashed_anew:
        run.find(
            "ingest.sha256", "warning", "; ".join(anew[:3]),
            f"{counted(len(anew), 'row')} came with something in column sha256 that is none in "
            "hexadecimal; it was worked out from the images.",
            measured=len(anew), limit=0, advice="Leave the column out, or see what wrote it.",
        )  # fmt: skip
    if lost := tally.missing:
        run.find(
            "ingest.images", "warning", "; ".join(path for path, _ in lost[:3]),
            f"{counted(len(lost), 'image')} cannot be opened: "
            f"{lost[0][1]}{'; and others' if len(lost) > 1 else ''}.",
            measured=len(lost), limit=0,
            advice="validate puts them aside, and lists them; check the list and data.root.",
        )  # fmt: skip
    if not counts["val"]:
        run.find(
            "ingest.splits", "error", "split 'val'", "No image is for validation.", measured=0, limit=1,
            advice="Add images, name a split 'val', or raise data.splits.val.",
        )  # fmt: skip
    if not counts["train"]:
        run.find(
            "ingest.splits", "error", "split 'train'", "No image is for training.", measured=0, limit=1,
            advice="Add images, or lower data.splits.val and data.splits.test.",
        )  # fmt: skip
    if not counts["test"]:
        run.find(
            "ingest.splits", "info", "split 'test'",
            "The source has no test split: accuracy is known on validation alone, which decisions look at.",
        )  # fmt: skip


def _report_rejected(run: Run, found: Found, out: Path) -> None:
    unread = Counter({kind: count for kind, count in found.other_files.items() if kind in NOT_READ})
    if unread:
        run.find(
            "ingest.other_files", "warning", ", ".join(unread),
            f"{counted(unread.total(), 'image is', 'images are')} left out, "
            f"in formats that are not read: {_kinds(unread)}.",
            measured=unread.total(), limit=0,
            advice="Convert them to JPEG or PNG, and ingest again.",
        )  # fmt: skip
    if others := found.other_files - unread:
        run.find(
            "ingest.other_files", "info", "files",
            f"{counted(others.total(), 'file is no image by its', 'files are no images by their')} name: "
            f"{_kinds(others)}.",
            measured=others.total(),
        )  # fmt: skip
    if found.imageless:
        run.find(
            "ingest.other_files", "warning", "; ".join(list(found.imageless)[:3]),
            counted(
                len(found.imageless), "folder that should name a class holds files, but gives no image: ",
                "folders that should name a class hold files, but give no image: ",
            )
            + "; ".join(f"'{name}': {_kinds(kinds)}" for name, kinds in list(found.imageless.items())[:3])
            + ".",
            measured=len(found.imageless), limit=0,
            advice="Convert their images to JPEG or PNG, or move the folders out of the source.",
        )  # fmt: skip
    if not found.rejected:
        return
    reasons = Counter(why for _, why in found.rejected).most_common()
    write_csv(out / "rejected.csv", found.rejected)
    run.find(
        "ingest.rejected", "warning", "; ".join(where for where, _ in found.rejected[:3]),
        counted(
            len(found.rejected), "entry of the source is no row of the manifest: ",
            "entries of the source are no rows of the manifest: ",
        )
        + "; ".join(f"{why} ({count:,})" for why, count in reasons[:5])
        + ". All of them: rejected.csv.",
        measured=len(found.rejected), limit=0, advice="Mend these entries, or leave them out.", row="2.1",
    )  # fmt: skip
    run.page.table("Entries that could not be read", ["entry", "why"], found.rejected[:WORST])


def _kinds(extensions: Counter[str]) -> str:
    """The commonest five."""
    return ", ".join(f"{name or 'without one'} ({count:,})" for name, count in extensions.most_common(5))


def _need_classes(run: Run, survey: _Survey, names: dict[int, str], found: Found) -> None:
    if len(survey.labels) >= 2:
        return
    source = run.params.model_dump()["data"]["source"]
    if not survey.rows:
        where, why = found.rejected[0]
        raise RetortError(
            f"{source}: none of {counted(len(found.rejected), 'entry', 'entries')} can be used: "
            f"{where}: {why}"
        )
    only = next((f"'{names[label]}'" for label in survey.labels), "none")
    raise RetortError(
        f"{source}: a classifier needs at least two classes, found {len(survey.labels)} ({only}); "
        "expected class/image.jpg or split/class/image.jpg"
    )


def _say(run: Run, tally: _Tally, classes: int, file: Path) -> None:
    """Headline numbers: rows by split and source, and the data fingerprint."""
    fingerprint = manifests.fingerprint(file)
    rows, by_split = tally.rows.total(), tally.by_split()
    run.find(
        "ingest.rows", "info", "manifest",
        f"{counted(rows, 'image')} of {counted(classes, 'class', 'classes')}; "
        f"data fingerprint {fingerprint[:12]}.",
        measured=rows,
    )  # fmt: skip
    run.page.table(
        "Images by split and source",
        ["split", *manifests.SOURCES],
        [
            [split, *(tally.rows[split, source] for source in manifests.SOURCES)]
            for split in manifests.SPLITS
            if by_split[split]
        ],
    )
    run.tracker.summary({"rows": rows, "classes": classes})
    run.tracker.dataset("manifest", fingerprint, file, dict(by_split))

"""What the data as a whole says, and what the parameters say of each row."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from components.common.errors import ConfigError, RetortError
from components.common.object_store import split
from components.dataset import manifest as manifests
from components.dataset import s3
from components.dataset.columns import Columns, equals, kept, matches, put
from components.dataset.corrections import read_verdicts
from components.dataset.params import Data
from components.dataset.sources.found import Found, matcher

SURVEYED = ("path", "below", "label", "class_name", "split", "group")


class RowRules:
    """What the parameters say about each row by itself."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.kinds = [
            (pattern, kind)
            for globs, kind in ((data.synthetic, "synthetic"), (data.semi_synthetic, "semi_synthetic"))
            if (pattern := matcher(globs))
        ]
        self.unlabeled = matcher(data.unlabeled)
        self.group = _group_pattern(data)
        self.verdicts = read_verdicts(Path(data.corrections)) if data.corrections else {}
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
class Survey:
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


def surveyed(found: Found, rules: RowRules) -> Survey:
    """Read all rows once, a portion at a time.

    Raises:
        RetortError: when ``data.group`` is neither a pattern nor a column.
    """
    survey = Survey()
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
            s3.remember_store(split(start)[0], data.s3)


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


def real_groups(found: Found, rules: RowRules, survey: Survey) -> pa.Array:
    """The groups that hold real images, in one more pass; none where nothing is grouped."""
    groups: set[str] = set()
    if rules.group or survey.grouped:
        for columns, _ in found.portions((*SURVEYED, "source")):
            columns = rules.mark(rules.unlabel(columns))
            real = pc.and_(pc.equal(columns["source"], "real"), columns["group"].is_valid())
            real = pc.and_(real, pc.invert(equals(columns["split"], "unlabeled")))
            groups |= set(pc.unique(columns["group"].filter(real)).to_pylist())
    return pa.array(sorted(groups), pa.string())

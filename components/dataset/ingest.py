"""The step ``ingest``: whatever ``data.source`` is becomes one manifest, the same bytes each time."""

from __future__ import annotations

import csv
import hashlib
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa

from components.common.errors import ConfigError, RetortError
from components.common.step import Run, step
from components.common.storage import write_json, write_text
from components.dataset import manifest as manifests
from components.dataset import sources
from components.dataset.inspection import inspect_all
from components.dataset.params import Data, IngestParams
from components.dataset.sources import Found, Row
from components.dataset.splits import split_of

WORST = 10  # subjects that a report names one by one


def ingest(params: IngestParams, *, manifest: Path, out: Path) -> None:
    """Read ``data.source`` and write ``manifest``.

    Raises:
        RetortError: when there is nothing to read, or fewer than two classes.
    """
    data = params.data
    inputs = {path: Path(path) for path in _files_read(data)}
    with step("ingest", params, out, inputs) as run:
        found = sources.read(params)
        rows = found.rows
        _mark(rows, data)
        _group(rows, data)
        names = _named(rows, data)
        rows = _corrected(run, rows, data, names)
        mapping = _remapped(rows) if data.remap_labels else None
        _inspect(rows, data.root, found.etags)
        _split(run, rows, data)
        _report_rejected(run, found, out)
        _need_classes(run, rows, found)
        if mapping is not None:
            write_json(run.product(out / "label_map.json"), {str(old): new for old, new in mapping.items()})
        rows.sort(key=lambda row: (row.path, row.split or "", row.label or 0))
        staged = run.product(manifest)
        manifests.write(_table(rows), staged)
        _say(run, rows, staged)


def _files_read(data: Data) -> list[str]:
    listed = list(data.source.values()) if isinstance(data.source, dict) else [data.source]
    return [*listed, *filter(None, [data.class_names, data.corrections])]


def _mark(rows: list[Row], data: Data) -> None:
    """Source and unlabelled rows from the globs; what the source itself says comes first."""
    globs = (
        (sources.matcher(data.synthetic), "synthetic"),
        (sources.matcher(data.semi_synthetic), "semi_synthetic"),
    )
    unlabeled = sources.matcher(data.unlabeled)
    for row in rows:
        if row.source is None:
            row.source = next((kind for glob, kind in globs if glob and glob.fullmatch(row.below)), "real")
        if row.split == "unlabeled" or (unlabeled and unlabeled.fullmatch(row.below)):
            row.split, row.label, row.class_name = "unlabeled", manifests.UNLABELED, None


def _group(rows: list[Row], data: Data) -> None:
    """Fill ``group`` from the pattern in ``data.group``; a column's name keeps the manifest's column."""
    if data.group is None:
        return
    if "(" not in data.group:
        if data.group != "group" or all(row.group is None for row in rows):
            raise RetortError(
                f"data.group: '{data.group}' is no pattern with one capture, and the source has no such "
                "column; write a pattern such as '(.*)_frame'"
            )
        return
    try:
        pattern = re.compile(data.group)
    except re.error as error:
        raise ConfigError(f"data.group: '{data.group}' is no regular expression ({error})") from None
    if pattern.groups != 1:
        raise ConfigError(f"data.group: '{data.group}' has {pattern.groups} captures, expected one")
    for row in rows:
        match = pattern.search(row.below)
        row.group = match[1] if match else None


def _named(rows: list[Row], data: Data) -> dict[int, str]:
    """Give every labelled row its label and its class's name; returns the names by label.

    Class folders are numbered in the order of ``data.class_names``, else in the order of their names.
    """
    file = Path(data.class_names) if data.class_names else None
    listed = _read_names(file) if file else []
    labelled = [row for row in rows if row.split != "unlabeled"]
    without = sorted({row.class_name or "" for row in labelled if row.label is None})
    if unknown := [name for name in without if name not in listed] if listed else []:
        raise RetortError(f"{file}: class '{unknown[0]}' of the data is not in this file; add it as a line")
    order = {name: label for label, name in enumerate(listed or without)}
    names = dict(enumerate(listed))
    for row in labelled:
        if row.label is None:
            row.label = order[row.class_name or ""]
        if not row.class_name:
            row.class_name = names.get(row.label, str(row.label))
        names.setdefault(row.label, row.class_name)
    return names


def _read_names(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RetortError(f"{file}: cannot be read ({error}); check data.class_names") from None
    while lines and not lines[-1]:
        lines.pop()
    numbered = [line.split(maxsplit=1) for line in lines]
    if lines and all(len(p) == 2 and p[0] == str(number) for number, p in enumerate(numbered)):
        lines = [parts[1] for parts in numbered]  # '0 tench': the number is not part of the name
    if len(set(lines)) < len(lines):
        twice = Counter(lines).most_common(1)[0][0]
        raise RetortError(f"{file}: class '{twice}' stands there twice; every line names one class")
    return lines


def _corrected(run: Run, rows: list[Row], data: Data, names: dict[int, str]) -> list[Row]:
    """Apply ``data.corrections``: a row of that path gets another label, or goes."""
    if data.corrections is None:
        return rows
    verdicts = _read_corrections(Path(data.corrections))
    labels = {name: label for label, name in names.items()}
    kept = []
    met = set()
    for row in rows:
        verdict = verdicts.get(row.path)
        if verdict is None:
            kept.append(row)
            continue
        met.add(row.path)
        if verdict == "drop":
            continue
        label = labels.get(verdict)
        if label is None and verdict.isdecimal() and int(verdict) in names:
            label = int(verdict)
        if label is None:
            raise RetortError(f"{data.corrections}: no class '{verdict}' for {row.path}; use a name, or drop")
        row.label, row.class_name = label, names[label]
        row.split = None if row.split == "unlabeled" else row.split
        kept.append(row)
    run.find(
        "ingest.corrections", "info", data.corrections,
        f"{len(met):,} rows corrected, {len(rows) - len(kept):,} of them dropped.", measured=len(met),
    )  # fmt: skip
    if missing := sorted(set(verdicts) - met):
        run.find(
            "ingest.corrections", "warning", data.corrections,
            f"{len(missing):,} paths are not in the data, such as {', '.join(missing[:3])}.",
            measured=len(missing), advice="Paths are those of the manifest, relative to data.root.",
        )  # fmt: skip
    return kept


def _read_corrections(file: Path) -> dict[str, str]:
    """Path and verdict (a class, or 'drop') of each line."""
    try:
        lines = list(csv.reader(file.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RetortError(f"{file}: cannot be read ({error}); check data.corrections") from None
    header = [cell.strip().lower() for cell in lines[0]] if lines else []
    columns = header if header[:1] == ["path"] and set(header) <= {"path", "label", "drop"} else None
    verdicts: dict[str, str] = {}
    for number, cells in enumerate(lines[1 if columns else 0 :], start=2 if columns else 1):
        if not cells:
            continue
        named = dict(zip(columns or ["path", "label"], (cell.strip() for cell in cells), strict=False))
        drop = named.get("drop", "").lower()
        verdict = "drop" if drop in ("1", "true", "yes", "drop") else named.get("label", "")
        if not verdict and drop in ("0", "false", "no", ""):
            if columns and "drop" in columns and drop:
                continue  # an explicit 'no'
            raise RetortError(f"{file}, line {number}: expected 'path,label' or 'path,drop'")
        path = named["path"]
        if verdicts.setdefault(path, verdict) != verdict:
            raise RetortError(
                f"{file}, line {number}: a second verdict on {path}: {verdicts[path]}, {verdict}"
            )
    return verdicts


def _remapped(rows: list[Row]) -> dict[int, int]:
    """Number the labels 0..n-1 in their order; returns the new number of each old one."""
    old = sorted({row.label for row in rows if row.label is not None and row.label >= 0})
    mapping = {label: new for new, label in enumerate(old)}
    for row in rows:
        if row.label is not None and row.label >= 0:
            row.label = mapping[row.label]
    return mapping


def _inspect(rows: list[Row], root: str, etags: dict[str, str]) -> None:
    """Hashes and sizes of the rows whose source does not bring them."""
    unknown = [row for row in rows if row.sha256 is None]
    paths = list(dict.fromkeys(row.path for row in unknown))
    known = dict(zip(paths, inspect_all(root, paths, etags), strict=True))
    for row in unknown:
        seen = known[row.path]
        row.sha256, row.bytes, row.phash = seen.sha256, seen.bytes, seen.phash
        row.width, row.height = seen.width, seen.height


def _split(run: Run, rows: list[Row], data: Data) -> None:
    """Real images into splits where the source has none; others are for training alone."""
    given = {row.split for row in rows} - {None, "unlabeled"}
    whole = not given or given == {"train"}
    no_validation = bool(given) and "val" not in given
    moved = 0
    for row in rows:
        if row.split == "unlabeled":
            continue
        if row.source != "real":
            moved += row.split in ("val", "test")
            row.split = "train"
        elif row.split is None or (row.split == "train" and (whole or no_validation)):
            # a group goes by its name, so that it stays where it is when images join it
            digest = hashlib.sha256(row.group.encode()).hexdigest() if row.group else row.sha256
            split = split_of(digest, data.splits) if digest else "train"
            row.split = "train" if split == "test" and row.split == "train" and not whole else split
    if moved:
        run.find(
            "ingest.synthetic", "warning", "validation and test",
            f"{moved:,} synthetic images stood in validation or test; they are for training now.",
            measured=moved, limit=0, advice="Only real images can say how good a classifier is.", row="4.1",
        )  # fmt: skip
    counts = Counter(row.split for row in rows)
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
    if found.other_files:
        run.find(
            "ingest.other_files", "info", "files",
            f"{found.other_files:,} files are no images by their name.",
            measured=found.other_files,
        )  # fmt: skip
    if not found.rejected:
        return
    reasons = Counter(why for _, why in found.rejected).most_common()
    write_text(out / "rejected.csv", "".join(f'"{_quoted(a)}","{_quoted(b)}"\n' for a, b in found.rejected))
    run.find(
        "ingest.rejected", "warning", "; ".join(where for where, _ in found.rejected[:3]),
        f"{len(found.rejected):,} entries of the source are no rows of the manifest: "
        + "; ".join(f"{why} ({count:,})" for why, count in reasons[:5])
        + ". All of them: rejected.csv.",
        measured=len(found.rejected), limit=0, advice="Mend these entries, or leave them out.", row="2.1",
    )  # fmt: skip
    run.page.table("Entries that could not be read", ["entry", "why"], found.rejected[:WORST])


def _quoted(text: str) -> str:
    return text.replace('"', '""')


def _need_classes(run: Run, rows: list[Row], found: Found) -> None:
    labels = {row.label for row in rows if row.split != "unlabeled"}
    if len(labels) >= 2:
        return
    source = run.params.model_dump()["data"]["source"]
    if not rows:
        where, why = found.rejected[0]
        raise RetortError(f"{source}: none of {len(found.rejected):,} entries can be used: {where}: {why}")
    only = next((f"'{row.class_name}'" for row in rows if row.split != "unlabeled"), "none")
    raise RetortError(
        f"{source}: a classifier needs at least two classes, found {len(labels)} ({only}); "
        "expected class/image.jpg or split/class/image.jpg"
    )


def _table(rows: list[Row]) -> pa.Table:
    columns = {name: [getattr(row, name) for row in rows] for name in manifests.SCHEMA.names}
    return pa.table(columns, schema=manifests.SCHEMA)


def _say(run: Run, rows: list[Row], file: Path) -> None:
    """Headline numbers: rows by split and source, and the data fingerprint."""
    fingerprint = manifests.fingerprint(file)
    by_split = Counter(row.split or "" for row in rows)
    counts = Counter((row.split, row.source) for row in rows)
    classes = len({row.label for row in rows if row.split != "unlabeled"})
    run.find(
        "ingest.rows", "info", "manifest",
        f"{len(rows):,} images of {classes:,} classes; data fingerprint {fingerprint[:12]}.",
        measured=len(rows),
    )  # fmt: skip
    run.page.table(
        "Images by split and source",
        ["split", *manifests.SOURCES],
        [
            [split, *(counts[split, source] for source in manifests.SOURCES)]
            for split in manifests.SPLITS
            if by_split[split]
        ],
    )
    run.tracker.summary({"rows": len(rows), "classes": classes})
    run.tracker.dataset("manifest", fingerprint, file, dict(by_split))

"""What stands in ``data.source``: folders, list files, buckets, manifests, the embedded digits."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.common.errors import ConfigError, RetortError
from components.dataset import manifest, s3
from components.dataset.columns import Columns, by_value, equals, kept, matches
from components.dataset.images import EXTENSIONS, leaves_root
from components.dataset.params import Data, IngestParams

ALIASES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "unlabeled": "unlabeled",
    "unlabelled": "unlabeled",
}
TEXT = pa.string()
DEEPEST = 40  # folders below each other; deeper than any data set, short of what links can fake
HIGHEST_LABEL = 2**31 - 2  # so that the number of classes fits int32 as well


# a row on its way into the manifest; null: the source does not say. ``below`` is the path that globs and
# ``data.group`` are matched with: below the root, or below the prefix of a bucket
FOUND = pa.schema([*(field.with_nullable(True) for field in manifest.SCHEMA), pa.field("below", pa.string())])
PORTION = 1 << 18  # rows that are worked on at once
Rejected = list[tuple[str, str]]  # entries that could not become a row: (where, why)
Others = Counter[tuple[str, str]]  # files that are no images by their name: see _kind


@dataclass(slots=True)
class Row:
    """One image as folders, buckets and lists tell of it: the first columns of FOUND."""

    path: str
    below: str
    label: int | None = None
    class_name: str | None = None
    split: str | None = None
    source: str | None = None


@dataclass
class Found:
    """What a source holds. ``etags`` by s3:// path. A manifest's rows are read a portion at a time.

    ``other_files`` are no images by their name, counted by extension (lower case); ``imageless`` the same,
    of each class folder that gives no row.
    """

    rows: list[Row] = field(default_factory=list)
    rejected: Rejected = field(default_factory=list)
    other_files: Counter[str] = field(default_factory=Counter)
    imageless: dict[str, Counter[str]] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    table: Path | None = None  # of an existing manifest
    listed: bool = False  # in a list file: nobody has seen yet whether the images are there
    unlabeled: re.Pattern[str] | None = None

    def portions(self, names: Sequence[str] = FOUND.names) -> Iterator[tuple[Columns, Rejected]]:
        """Some columns of FOUND, at most PORTION rows at a time, and what of them could not be used."""
        if self.table:
            yield from _manifest_rows(self.table, names, self.unlabeled)
        else:
            told = [one.name for one in fields(Row)]
            for start in range(0, len(self.rows), PORTION):
                rows = self.rows[start : start + PORTION]
                yield (
                    {
                        name: pa.array([getattr(row, name) for row in rows], FOUND.field(name).type)
                        if name in told
                        else pa.nulls(len(rows), FOUND.field(name).type)
                        for name in names
                    },
                    [],
                )


def read(params: IngestParams) -> Found:
    """Read ``data.source``.

    Raises:
        RetortError: when it is missing, empty, or not what it seems.
    """
    data = params.data
    if isinstance(data.source, dict):
        return _lists(data, data.source)
    if data.source == "digits":
        from components.dataset import digits

        root = Path(data.root)
        digits.write(root, data.splits, params.general.seed)
        return _folder(data, root)
    if data.source.startswith("s3://"):
        return _bucket(data, data.source)
    place = Path(data.source)
    if place.is_dir():
        return _folder(data, place)
    if not place.exists():
        raise RetortError(
            f"{data.source}: no such folder or file; set data.source to a folder of images, a list file, "
            "s3://bucket/prefix, a manifest.parquet, or digits"
        )
    if place.suffix == ".parquet":
        return _manifest(data, place)
    return _lists(data, {"": data.source})


def encode(name: bytes) -> str:
    """A path as the manifest holds it: the name itself, percent-encoded where that could not be read back."""
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        return quote_from_bytes(name, safe="/ !$&()*+,;=:@-._~")
    # a name such as 'a%20b.png' would be taken for an encoded one
    return text if unquote_to_bytes(text) == name else text.replace("%", "%25")


def glob_regex(glob: str) -> str:
    """A glob as a regular expression over the whole path: ``*`` within a folder, ``**`` across folders."""
    parts = []
    for part in re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", glob, flags=re.DOTALL):
        if part == "**/":
            parts.append("(?:.*/)?")
        elif part == "**":
            parts.append(".*")
        elif part == "*":
            parts.append("[^/]*")
        elif part == "?":
            parts.append("[^/]")
        elif len(part) > 1:
            inside = part[1:-1].replace("\\", "\\\\")
            parts.append(f"[{'^' + inside[1:] if inside.startswith('!') else inside}]")
        else:
            parts.append(re.escape(part))
    return f"(?s:{''.join(parts)})"


def matcher(globs: Iterable[str]) -> re.Pattern[str] | None:
    """One pattern (for ``fullmatch``) of several globs; None when there are none."""
    patterns = [glob_regex(glob) for glob in globs]
    try:
        return re.compile("|".join(patterns)) if patterns else None
    except re.error as error:
        raise ConfigError(f"data: one of the globs {list(globs)} cannot be read ({error})") from None


def _folder(data: Data, folder: Path) -> Found:
    root, place = os.path.abspath(data.root), os.path.abspath(folder)  # noqa: PTH100 - links stay links
    if os.path.commonpath([root, place]) != root:
        raise RetortError(
            f"data.source: {folder} is not data.root ({data.root}) nor below it; set data.root to {folder}"
        )
    before = "" if root == place else os.path.relpath(place, root) + "/"
    found = Found()
    below = []
    no_images: Others = Counter()
    for name in walk(os.fsencode(place), found.rejected):
        if os.path.splitext(name)[1].lower() in {extension.encode() for extension in EXTENSIONS}:  # noqa: PTH122
            below.append(name)
        else:
            no_images[_kind(encode(name))] += 1
    if not below:
        raise RetortError(
            f"{folder}: no image in this folder ({', '.join(EXTENSIONS)}); put them in as class/image.jpg"
        )
    before_bytes = os.fsencode(before)
    _layout(data, found, [(encode(before_bytes + name), encode(name)) for name in below], no_images)
    return found


def walk(top: bytes, lost: Rejected) -> Iterator[bytes]:
    """Names of all ordinary files below ``top``, sorted; links are followed, but never in a circle.

    What leads to no file goes into ``lost``, with the reason. Hidden files and folders, and those that
    archivers add, are left out. A folder that may not be read is an error: silence would lose a class.
    """

    def below(folder: bytes, ancestors: tuple[tuple[int, int], ...]) -> Iterator[bytes]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise RetortError(f"{os.fsdecode(folder)!r}: {error.strerror}; it cannot be listed") from None
        for entry in entries:
            if entry.name.startswith(b".") or entry.name == b"__MACOSX":
                continue
            if entry.is_file(follow_symlinks=False):
                yield entry.path[len(top) + 1 :]
                continue
            try:
                status = entry.stat()
            except OSError as error:  # a link into the void, or to itself
                lost.append((encode(entry.path[len(top) + 1 :]), str(error.strerror).lower()))
                continue
            identity = (status.st_dev, status.st_ino)
            if stat.S_ISREG(status.st_mode):
                yield entry.path[len(top) + 1 :]
            elif not stat.S_ISDIR(status.st_mode):
                lost.append((encode(entry.path[len(top) + 1 :]), "not an ordinary file"))
            elif identity in above or identity in ancestors:
                lost.append((encode(entry.path[len(top) + 1 :]), "a link back to a folder above it"))
            elif len(ancestors) == DEEPEST:
                lost.append((encode(entry.path[len(top) + 1 :]), f"more than {DEEPEST} folders deep"))
            else:
                yield from below(entry.path, (*ancestors, identity))

    def of(folder: Path) -> tuple[int, int]:
        status = folder.stat()
        return status.st_dev, status.st_ino

    place = Path(os.fsdecode(top)).resolve()
    above = {of(folder) for folder in place.parents}  # apart from ancestors, whose number is the depth
    return below(top, (of(place),))


def _kind(below: str) -> tuple[str, str]:
    """Of a file that is no image: the folders that may name a split and a class, and its extension."""
    return "/".join(below.split("/")[:-1][:2]), os.path.splitext(below)[1].lower()  # noqa: PTH122


def _layout(data: Data, found: Found, files: list[tuple[str, str]], no_images: Others) -> None:
    """Rows from (path, path below the source): ``split/class/**`` or ``class/**``."""
    unlabeled = matcher(data.unlabeled)
    tops = {below.split("/", 1)[0] for _, below in files if "/" in below}
    splits = {ALIASES[top.lower()] for top in tops if top.lower() in ALIASES} - {"unlabeled"}
    # a class may be called 'train': it takes a second split, or no other folder, to be a split
    others = {top for top in tops if top.lower() not in ALIASES}
    by_split = "train" in splits and (len(splits) > 1 or not others)
    for path, below in files:
        parts = below.split("/")
        top = ALIASES.get(parts[0].lower()) if len(parts) > 1 else None
        if top == "unlabeled" or (unlabeled and unlabeled.fullmatch(below)):
            found.rows.append(Row(path, below, split="unlabeled"))
        elif by_split and top is None:
            found.rejected.append((path, "it lies in no split's folder"))
        elif len(parts) < (3 if by_split else 2):
            found.rejected.append((path, "it lies in no class's folder"))
        elif by_split:
            found.rows.append(Row(path, below, class_name=_name(parts[1]), split=top))
        else:
            found.rows.append(Row(path, below, class_name=_name(parts[0])))
    _count_others(found, no_images, by_split)


def _count_others(found: Found, no_images: Others, by_split: bool) -> None:
    """Count the files that are no images, and those of class folders that gave no row."""

    def class_folder(below: str) -> str | None:
        parts = below.split("/", 2)
        top = ALIASES.get(parts[0].lower())
        if not by_split or top == "unlabeled":
            return parts[0]
        return "/".join(parts[:2]) if top and len(parts) > 1 else None

    filled = {class_folder(row.below) for row in found.rows} if no_images else set()
    for (folders, extension), count in no_images.items():
        found.other_files[extension] += count
        folder = class_folder(folders)
        if folder and folder not in filled:
            found.imageless.setdefault(folder, Counter())[extension] += count


def _name(folder: str) -> str:
    """A class's name: its folder's, with what is not UTF-8 shown as such."""
    return unquote_to_bytes(folder).decode("utf-8", "backslashreplace") if "%" in folder else folder


def _bucket(data: Data, uri: str) -> Found:
    bucket, prefix = s3.split(uri)
    prefix = prefix if not prefix or prefix.endswith("/") else prefix + "/"
    s3.remember_store(bucket, data.s3)
    found = Found()
    files = []
    no_images: Others = Counter()
    for item in s3.listing(uri):
        below = item.key.removeprefix(prefix)
        parts = below.split("/")
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):  # as in walk
            continue
        if not below.lower().endswith(EXTENSIONS):
            no_images[_kind(encode(below.encode()))] += 1
        elif "" in parts:  # '//' would be a class without a name
            found.rejected.append((item.uri, "a folder in its key has no name"))
        else:
            files.append((item.uri, encode(below.encode())))
            found.etags[item.uri] = item.etag
    if not files and not found.rejected:
        raise RetortError(f"{uri}: no image below this prefix ({', '.join(EXTENSIONS)})")
    _layout(data, found, files, no_images)
    return found


def _lists(data: Data, lists: Mapping[str, str]) -> Found:
    if not Path(data.root).is_dir():
        raise RetortError(
            f"{data.root}: no such folder; set data.root to where the paths of the list files begin"
        )
    found = Found(listed=True)
    unlabeled = matcher(data.unlabeled)
    for key, name in lists.items():
        split = ALIASES.get(key.lower()) if key else None
        if key and split is None:
            raise ConfigError(f"data.source: unknown split '{key}'; use train, val, test or unlabeled")
        try:
            content = Path(name).read_bytes()
        except OSError as error:
            raise RetortError(f"{name}: {error.strerror}; check data.source") from None
        if b"\0" in content:
            raise RetortError(f"{name}: not a list file (it holds null bytes); expected 'path label' a line")
        before = len(found.rows) + len(found.rejected)
        for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
            text = line.strip(b"\r\t ")
            if text:
                row = parse_line(text, split, unlabeled)
                if isinstance(row, Row):
                    found.rows.append(row)
                else:
                    found.rejected.append((f"{name}, line {number}: {encode(text)}", row))
        if len(found.rows) + len(found.rejected) == before:
            raise RetortError(f"{name}: the list is empty; expected 'path label' a line")
    return found


def parse_line(line: bytes, split: str | None, unlabeled: re.Pattern[str] | None) -> Row | str:
    """A row of a list file, or why there is none. ``path label [source]``; a path may hold spaces.

    Fields stand apart by tabs, where there are any, else by spaces. In the list of unlabelled images,
    and for paths that ``data.unlabeled`` matches, the label may be left out.
    """
    separator = b"\t" if b"\t" in line else b" "
    parts = line.split(separator)
    source = None
    last = parts[-1].decode("ascii", "replace").strip().replace("-", "_")
    if len(parts) > 1 and last in manifest.SOURCES:
        source = last
        parts = parts[:-1]
    label: int | None = None
    given = parts[-1].strip()
    if len(parts) > 1 and re.fullmatch(rb"[+-]?\d+", given):
        # Python refuses to read thousands of digits; the first of them are out of range already
        size = int(given.lstrip(b"+-0")[:20] or b"0")
        label = -size if given.startswith(b"-") else size
        parts = parts[:-1]
    path = encode(separator.join(parts).strip())
    below = os.path.normpath(path) if "://" not in path else path
    if "://" not in path:
        if leaves_root(path):
            return "the path leads outside data.root"
        path = below
    elif not path.startswith("s3://"):
        return "only files and s3:// can be read"
    if split == "unlabeled" or (unlabeled and unlabeled.fullmatch(below)):
        return Row(path, below, split="unlabeled", source=source)
    if label is None:
        return "the label is missing or no whole number"
    if not 0 <= label <= HIGHEST_LABEL:
        shown = given.decode() if len(given) <= 20 else f"{given[:17].decode()}..."
        return f"the label {shown} is out of range"
    return Row(path, below, label=label, split=split, source=source)


def _manifest(data: Data, path: Path) -> Found:
    """An existing manifest: ``path`` and ``label`` must be there, the other columns may.

    Raises:
        RetortError: naming the column that is missing or of another kind.
    """
    with _open_table(path) as file:
        names = file.schema_arrow.names
        for name in ("path", "label"):
            if name not in names:
                raise RetortError(
                    f"{path}: column '{name}' is missing (found: {', '.join(names[:12]) or 'none'})"
                )
        for name in (name for name in manifest.SCHEMA.names if name in names):
            _cast(path, name, pa.array([], file.schema_arrow.field(name).type))
        if not file.metadata.num_rows:
            raise RetortError(f"{path}: the table has no rows; check data.source")
    return Found(table=path, unlabeled=matcher(data.unlabeled))


def _open_table(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, pre_buffer=False)  # reading ahead would hold a gigabyte more
    except (pa.ArrowInvalid, OSError) as error:
        raise RetortError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None


def _cast(path: Path, name: str, column: pa.Array) -> pa.Array:
    wanted = FOUND.field(name).type
    try:
        return column.cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise RetortError(
            f"{path}: column '{name}' is {column.type}, expected {wanted} ({str(error).splitlines()[0]})"
        ) from None


def _manifest_rows(
    path: Path, names: Sequence[str], unlabeled: re.Pattern[str] | None
) -> Iterator[tuple[Columns, Rejected]]:
    needed = {"path", "label", "split", "source", *names} - {"below"}
    start = 0
    with _open_table(path) as file:
        there = [name for name in FOUND.names if name in needed and name in file.schema_arrow.names]
        for batch in file.iter_batches(PORTION, columns=there):
            labels = batch.column("label")
            columns = {
                name: _cast(path, name, _in_range(labels) if name == "label" else batch.column(name))
                for name in there
            }
            for name in needed.difference(there):
                columns[name] = pa.nulls(len(batch), FOUND.field(name).type)
            columns["split"] = by_value(columns["split"], lambda text: ALIASES.get(text.lower(), text), TEXT)
            usable, rejected = _judged(path, columns, labels, start, unlabeled)
            usable["below"] = usable["path"]
            yield {name: usable[name] for name in names}, rejected
            start += len(batch)


def _in_range(labels: pa.Array) -> pa.Array:
    """Labels, null where an integer is none: beyond HIGHEST_LABEL, or below int32."""
    kind = labels.type
    if not pa.types.is_integer(kind) or kind.bit_width < 32:
        return labels
    beyond = pc.greater(labels, pa.scalar(HIGHEST_LABEL, kind))
    if pa.types.is_signed_integer(kind) and kind.bit_width > 32:
        beyond = pc.or_(beyond, pc.less(labels, pa.scalar(-(2**31), kind)))
    return pc.if_else(beyond, pa.scalar(None, kind), labels) if pc.any(beyond).as_py() else labels


def _judged(
    file: Path, columns: Columns, labels: pa.Array, start: int, unlabeled: re.Pattern[str] | None
) -> tuple[Columns, Rejected]:
    """The rows that can be used, and why each other one cannot.

    ``labels`` as the file has them, before ``_in_range``; ``start`` is the first row's number.
    """
    path, label, split, source = (columns[name] for name in ("path", "label", "split", "source"))
    no_path = pc.fill_null(pc.equal(path, ""), True)
    foreign = pc.and_(pc.match_substring(path, "://"), pc.invert(pc.starts_with(path, "s3://")))
    foreign = pc.fill_null(foreign, False)
    free = equals(split, "unlabeled")
    no_label = pc.and_(pc.fill_null(pc.less(label, 0), True), pc.invert(free))
    if unlabeled and pc.any(no_label).as_py():
        no_label = pc.and_(no_label, pc.invert(matches(unlabeled, pc.fill_null(path, ""))))
    no_split = pc.and_(split.is_valid(), pc.invert(pc.is_in(split, pa.array(manifest.SPLITS))))
    no_source = pc.and_(source.is_valid(), pc.invert(pc.is_in(source, pa.array(manifest.SOURCES))))
    bad = pc.or_(pc.or_(pc.or_(no_path, foreign), no_label), pc.or_(no_split, no_source))
    places = np.flatnonzero(bad)
    if not len(places):
        return columns, []
    rejected = []
    for place in places.tolist():
        where = f"{file}, row {start + place + 1}: {path[place]}"
        if no_path[place].as_py():
            rejected.append((where, "the path is missing"))
        elif foreign[place].as_py():
            rejected.append((where, "only files and s3:// can be read"))
        elif no_split[place].as_py():
            rejected.append((where, f"the split '{split[place]}' is unknown"))
        elif no_source[place].as_py():
            rejected.append((where, f"the source '{source[place]}' is unknown"))
        elif labels[place].is_valid and not label[place].is_valid:
            rejected.append((where, f"the label {labels[place]} is out of range"))
        else:
            rejected.append((where, "the label is missing or negative"))
    return kept(columns, pc.invert(bad)), rejected

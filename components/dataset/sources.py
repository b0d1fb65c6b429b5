"""What stands in ``data.source``, as rows: folders, list files, buckets, manifests, the embedded digits."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

import pyarrow as pa
import pyarrow.parquet as pq

from components.common.errors import ConfigError, RetortError
from components.dataset import manifest, s3
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
DEEPEST = 40  # folders below each other; deeper than any data set, short of what links can fake


@dataclass(slots=True)
class Row:
    """One image on its way into the manifest. None: the source does not say.

    ``below`` is the path that globs and ``data.group`` are matched with: below the root, or below the
    prefix of a bucket.
    """

    path: str
    below: str
    label: int | None = None
    class_name: str | None = None
    split: str | None = None
    source: str | None = None
    group: str | None = None
    width: int | None = None
    height: int | None = None
    bytes: int | None = None
    sha256: str | None = None
    phash: int | None = None


@dataclass
class Found:
    """The rows of a source, and what could not become one: (where, why). ``etags`` by s3:// path."""

    rows: list[Row] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    other_files: int = 0
    etags: dict[str, str] = field(default_factory=dict)


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
    for name in walk(os.fsencode(place)):
        if os.path.splitext(name)[1].lower() in {extension.encode() for extension in EXTENSIONS}:  # noqa: PTH122
            below.append(name)
        else:
            found.other_files += 1
    if not below:
        raise RetortError(
            f"{folder}: no image in this folder ({', '.join(EXTENSIONS)}); put them in as class/image.jpg"
        )
    before_bytes = os.fsencode(before)
    _layout(data, found, [(encode(before_bytes + name), encode(name)) for name in below])
    return found


def walk(top: bytes) -> Iterator[bytes]:
    """Names of all ordinary files below ``top``, sorted; links are followed, but never in a circle.

    Hidden files and folders, and those that archivers add, are left out. A folder that may not be read
    is an error: silence would lose a class.
    """

    def below(folder: bytes, ancestors: tuple[tuple[int, int], ...]) -> Iterator[bytes]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise RetortError(f"{os.fsdecode(folder)!r}: {error.strerror}; it cannot be listed") from None
        for entry in entries:
            if entry.name.startswith(b".") or entry.name == b"__MACOSX":
                continue
            if entry.is_file():
                yield entry.path[len(top) + 1 :]
            elif entry.is_dir():
                status = entry.stat()
                identity = (status.st_dev, status.st_ino)
                if identity not in ancestors and len(ancestors) < DEEPEST:
                    yield from below(entry.path, (*ancestors, identity))

    status = os.stat(top)  # noqa: PTH116
    return below(top, ((status.st_dev, status.st_ino),))


def _layout(data: Data, found: Found, files: list[tuple[str, str]]) -> None:
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


def _name(folder: str) -> str:
    """A class's name: its folder's, with what is not UTF-8 shown as such."""
    return unquote_to_bytes(folder).decode("utf-8", "backslashreplace") if "%" in folder else folder


def _bucket(data: Data, uri: str) -> Found:
    bucket, prefix = s3.split(uri)
    prefix = prefix if not prefix or prefix.endswith("/") else prefix + "/"
    s3.remember_store(bucket, data.s3)
    found = Found()
    files = []
    for item in s3.listing(uri):
        if item.key.lower().endswith(EXTENSIONS):
            files.append((item.uri, item.key.removeprefix(prefix)))
            found.etags[item.uri] = item.etag
        else:
            found.other_files += 1
    if not files:
        raise RetortError(f"{uri}: no image below this prefix ({', '.join(EXTENSIONS)})")
    _layout(data, found, files)
    return found


def _lists(data: Data, lists: Mapping[str, str]) -> Found:
    if not Path(data.root).is_dir():
        raise RetortError(
            f"{data.root}: no such folder; set data.root to where the paths of the list files begin"
        )
    found = Found()
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
    _remember_stores(data, found)
    return found


def _remember_stores(data: Data, found: Found) -> None:
    for bucket in {s3.split(row.path)[0] for row in found.rows if row.path.startswith("s3://")}:
        s3.remember_store(bucket, data.s3)


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
    if len(parts) > 1 and re.fullmatch(rb"[+-]?\d+", parts[-1].strip()):
        label = int(parts[-1])
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
    if not 0 <= label < 2**31 - 1:
        return f"the label {label} is out of range"
    return Row(path, below, label=label, split=split, source=source)


def _manifest(data: Data, path: Path) -> Found:
    """Rows of an existing manifest: ``path`` and ``label`` must be there, the other columns may."""
    table = read_columns(path)
    columns = {name: table[name].to_pylist() for name in table.column_names}
    found = Found()
    for index in range(table.num_rows):
        values = {name: column[index] for name, column in columns.items()}
        row = Row(below=values["path"], **values)
        if row.split is not None and row.split not in manifest.SPLITS:
            row.split = ALIASES.get(row.split.lower(), row.split)
        where = f"{path}, row {index + 1}: {row.path}"
        if not row.path:
            found.rejected.append((where, "the path is missing"))
        elif row.split is not None and row.split not in manifest.SPLITS:
            found.rejected.append((where, f"the split '{row.split}' is unknown"))
        elif row.source is not None and row.source not in manifest.SOURCES:
            found.rejected.append((where, f"the source '{row.source}' is unknown"))
        elif row.split != "unlabeled" and (row.label is None or row.label < 0):
            found.rejected.append((where, "the label is missing or negative"))
        else:
            found.rows.append(row)
    _remember_stores(data, found)
    return found


def read_columns(path: Path) -> pa.Table:
    """The columns of ``path`` that a manifest has, in the manifest's types.

    Raises:
        RetortError: naming the column that is missing or of another kind.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise RetortError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
    for name in ("path", "label"):
        if name not in table.column_names:
            raise RetortError(
                f"{path}: column '{name}' is missing (found: {', '.join(table.column_names[:12]) or 'none'})"
            )
    known = [name for name in manifest.SCHEMA.names if name in table.column_names]
    arrays = []
    for name in known:
        wanted = manifest.SCHEMA.field(name).type
        try:
            arrays.append(table[name].cast(wanted))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise RetortError(
                f"{path}: column '{name}' is {table[name].type}, expected {wanted} "
                f"({str(error).splitlines()[0]})"
            ) from None
    return pa.table(arrays, names=known)

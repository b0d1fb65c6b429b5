"""What a source of images holds, on its way into the manifest; and how its paths are matched."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from urllib.parse import quote_from_bytes, unquote_to_bytes

import pyarrow as pa

from components.common.errors import ConfigError
from components.dataset import manifest
from components.dataset.columns import Columns
from components.dataset.params import IngestParams

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
HIGHEST_LABEL = 2**31 - 2  # so that the number of classes fits int32 as well


# a row on its way into the manifest; null: the source does not say. ``below`` is the path that globs and
# ``data.group`` are matched with: below the root, or below the prefix of a bucket
FOUND = pa.schema([*(field.with_nullable(True) for field in manifest.SCHEMA), pa.field("below", pa.string())])
PORTION = 1 << 18  # rows that are worked on at once
Rejected = list[tuple[str, str]]  # entries that could not become a row: (where, why)


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
    """What a source holds. ``etags`` by s3:// path.

    ``other_files`` are no images by their name, counted by extension (lower case); ``imageless`` the same,
    of each class folder that gives no row.
    """

    rows: list[Row] = field(default_factory=list)
    rejected: Rejected = field(default_factory=list)
    other_files: Counter[str] = field(default_factory=Counter)
    imageless: dict[str, Counter[str]] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    listed: bool = False  # in a list file: nobody has seen yet whether the images are there

    def portions(self, names: Sequence[str] = FOUND.names) -> Iterator[tuple[Columns, Rejected]]:
        """Some columns of FOUND, at most PORTION rows at a time, and what of them could not be used."""
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


@dataclass(frozen=True)
class Reader:
    """Reads one kind of ``data.source``.

    Attributes:
        knows: whether a value of ``data.source`` is of that kind.
        read: what it holds; raises RetortError where it is missing, empty, or not what it seems.
    """

    knows: Callable[[str | dict[str, str]], bool]
    read: Callable[[IngestParams], Found]


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

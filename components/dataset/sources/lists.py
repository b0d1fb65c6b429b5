"""List files: ``path label`` a line, one file or one a split."""

from __future__ import annotations

import os
import re
from pathlib import Path

from components.common.errors import ConfigError, RetortError
from components.dataset import manifest
from components.dataset.images import leaves_root
from components.dataset.params import IngestParams
from components.dataset.sources.found import ALIASES, HIGHEST_LABEL, Found, Reader, Row, encode, matcher


def read(params: IngestParams) -> Found:
    """Rows of the lines of ``data.source``: a file, or files by split."""
    data = params.data
    lists = data.source if isinstance(data.source, dict) else {"": data.source}
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


READER = Reader(lambda source: isinstance(source, dict) or Path(source).exists(), read)

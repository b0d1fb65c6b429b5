"""A bucket: what lies below ``s3://bucket/prefix``, laid out as a folder is."""

from __future__ import annotations

from collections import Counter

from components.common.errors import RetortError
from components.common.object_store import split
from components.dataset import s3
from components.dataset.images import EXTENSIONS
from components.dataset.params import IngestParams
from components.dataset.sources.found import Found, Reader, encode
from components.dataset.sources.layout import Others, kind, lay_out


def read(params: IngestParams) -> Found:
    """Rows of the images below ``data.source``."""
    data, uri = params.data, str(params.data.source)
    bucket, prefix = split(uri)
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
            no_images[kind(encode(below.encode()))] += 1
        elif "" in parts:  # '//' would be a class without a name
            found.rejected.append((item.uri, "a folder in its key has no name"))
        else:
            files.append((item.uri, encode(below.encode())))
            found.etags[item.uri] = item.etag
    if not files and not found.rejected:
        raise RetortError(f"{uri}: no image below this prefix ({', '.join(EXTENSIONS)})")
    lay_out(data, found, files, no_images)
    return found


READER = Reader(lambda source: isinstance(source, str) and source.startswith("s3://"), read)

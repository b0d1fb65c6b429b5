"""What may stand in ``data.source``. One file a kind, registered here."""

from __future__ import annotations

from components.common.errors import RetortError
from components.dataset.params import IngestParams
from components.dataset.sources import bucket, digits, folder, lists, table
from components.dataset.sources.found import Found, Reader

# by name; the first that knows the source reads it
READERS: dict[str, Reader] = {
    "digits": digits.READER,
    "bucket": bucket.READER,
    "folder": folder.READER,
    "manifest": table.READER,
    "list": lists.READER,
}

__all__ = ["READERS", "Found", "Reader", "read"]


def read(params: IngestParams) -> Found:
    """Read ``data.source``.

    Raises:
        RetortError: when it is missing, empty, or not what it seems.
    """
    source = params.data.source
    for reader in READERS.values():
        if reader.knows(source):
            return reader.read(params)
    raise RetortError(
        f"{source}: no such folder or file; set data.source to a folder of images, a list file, "
        "s3://bucket/prefix, a manifest.parquet, or digits"
    )

"""The embedded digits: written below ``data.root``, and read as a folder."""

from __future__ import annotations

from pathlib import Path

from components.dataset.params import IngestParams
from components.dataset.sources.folder import read_folder
from components.dataset.sources.found import Found, Reader


def read(params: IngestParams) -> Found:
    """Write the digits where they are not there yet, and read them."""
    from components.dataset import digits

    root = Path(params.data.root)
    digits.write(root, params.data.splits, params.general.seed)
    return read_folder(params.data, root)


READER = Reader(lambda source: source == "digits", read)

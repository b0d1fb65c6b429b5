"""Caches that later runs use again: sealed with sizes and checksums when written, proved before use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.common.storage import write_json

SCHEMA_VERSION = 1
BLOCK = 1 << 20
SAMPLE = 256  # blocks of a large file that are read, evenly over it, where a sample is asked for


def checksum(path: Path, sampled: bool = False) -> str:
    """Hex sha256 of a file's content; ``sampled``: of a file above ``SAMPLE`` blocks, of that many of them.

    A sample costs the same for every size, and finds what is missing, shifted or was never written; not
    every changed byte.
    """
    blocks = -(-path.stat().st_size // BLOCK)
    if not sampled or blocks <= SAMPLE:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for i in range(SAMPLE):
            file.seek(i * (blocks - 1) // (SAMPLE - 1) * BLOCK)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def write(path: Path, files: Sequence[Path], sampled: bool = False) -> None:
    """Write the seal of some files, by their names, into ``path``."""
    sealed = {
        file.name: {"bytes": file.stat().st_size, "sha256": checksum(file, sampled)} for file in sorted(files)
    }
    write_json(path, {"schema_version": SCHEMA_VERSION, "sampled": sampled, "files": sealed})


def fault(path: Path, folder: Path) -> str | None:
    """What is wrong with the files in ``folder`` that the seal ``path`` names, in words; None: nothing."""
    try:
        seal: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name, expected in seal["files"].items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            size = file.stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size:,} bytes instead of {expected['bytes']:,}"
            if checksum(file, seal["sampled"]) != expected["sha256"]:
                return f"{name} is not what was written: its checksum is another"
    except OSError as error:
        return f"{error.filename or path.name}: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{path.name} is damaged"
    return None

"""What became of the rows that were read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pyarrow as pa


@dataclass
class Tally:
    """Rows that were written, by split and source; synthetic ones that left validation or test; paths of rows
    whose source gave something else as their sha256, of images that could not be opened, and of synthetic
    ones whose group is held out."""

    real_groups: pa.Array  # groups with real images, of which some are held out
    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    moved: int = 0
    hashed_anew: list[str] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)  # path, and why it could not be opened
    held_out: list[str] = field(default_factory=list)

    def by_split(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for (split, _), count in self.rows.items():
            counts[split] += count
        return counts

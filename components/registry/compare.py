"""Is the challenger better than the champion? Pure rules over recalls per class on the same images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MIN_IMAGES = 20  # validation images below which the recall of one class says nothing
ROUNDING = 1e-9


@dataclass(frozen=True)
class Row:
    """One class: its validation images, both recalls (0..1; None: the model does not know the class)."""

    name: str
    images: int
    champion: float | None
    challenger: float | None
    judged: bool
    worse: bool


@dataclass(frozen=True)
class Comparison:
    """Top-1 of both over the classes that both know, and the rows, worst change first."""

    champion: float
    challenger: float
    tolerance: float
    rows: list[Row]

    @property
    def worse(self) -> list[Row]:
        return [row for row in self.rows if row.worse]

    @property
    def as_accurate(self) -> bool:
        return self.challenger >= self.champion - self.tolerance - ROUNDING

    @property
    def better(self) -> bool:
        """Top-1 not lower, beyond the tolerance, and no judged class lower, beyond the class tolerance."""
        return self.as_accurate and not self.worse


def compare(
    champion: Mapping[str, float],
    challenger: Mapping[str, float],
    images: Mapping[str, int],
    tolerance: float,
    class_tolerance: float,
) -> Comparison:
    """Compare two models by recall per class, measured on the same validation images.

    Args:
        champion, challenger: recall by class name, 0..1, for the classes that each knows.
        images: validation images by class name. A class with fewer than ``MIN_IMAGES`` is not judged alone,
            its images count in top-1 all the same.
        tolerance, class_tolerance: what top-1, and the recall of a class, may be lower by.
    """
    rows = []
    for name in sorted({*champion, *challenger}):
        old, new, count = champion.get(name), challenger.get(name), images.get(name, 0)
        judged = old is not None and count >= MIN_IMAGES
        lower = old is not None and (new or 0.0) < old - class_tolerance - ROUNDING
        rows.append(Row(name, count, old, new, judged, judged and lower))
    rows.sort(key=lambda row: ((row.challenger or 0.0) - (row.champion or 0.0), row.name))
    shared = [row for row in rows if row.champion is not None and row.challenger is not None and row.images]
    total = sum(row.images for row in shared) or 1
    return Comparison(
        champion=sum((row.champion or 0.0) * row.images for row in shared) / total,
        challenger=sum((row.challenger or 0.0) * row.images for row in shared) / total,
        tolerance=tolerance,
        rows=rows,
    )

"""Is the challenger better than the champion? Pure rules over recalls per class on the same images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MIN_IMAGES = 20  # validation images below which the recall of one class says nothing
ROUNDING = 1e-9
FIRST = "it is the first: nothing to compare with"  # why a version without a champion becomes one


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
    def in_common(self) -> bool:
        """Whether there are images of a class that both know: else there is nothing to compare."""
        return any(_shared(row) for row in self.rows)

    @property
    def more_classes(self) -> int:
        """Classes with images that only the challenger knows."""
        return sum(
            row.champion is None and row.challenger is not None and row.images > 0 for row in self.rows
        )

    @property
    def equal(self) -> bool:
        return abs(self.challenger - self.champion) <= ROUNDING

    @property
    def better(self) -> bool:
        """Whether the challenger takes over.

        No judged class may be lower beyond the class tolerance. Top-1 must be higher; or equal, if it knows
        more classes; or, where a tolerance says that this is good enough, not lower by more than that.
        """
        if not self.in_common or self.worse:
            return False
        tie = self.equal and not self.tolerance and not self.more_classes
        return self.as_accurate and not tie


def _shared(row: Row) -> bool:
    return row.champion is not None and row.challenger is not None and row.images > 0


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
    shared = [row for row in rows if _shared(row)]
    total = sum(row.images for row in shared) or 1
    return Comparison(
        champion=sum((row.champion or 0.0) * row.images for row in shared) / total,
        challenger=sum((row.challenger or 0.0) * row.images for row in shared) / total,
        tolerance=tolerance,
        rows=rows,
    )


def reason(comparison: Comparison) -> str:
    """Why a challenger becomes champion, or stays what it is."""
    measured = f"top-1 {comparison.challenger:.2%} against {comparison.champion:.2%}"
    if not comparison.in_common:
        return "not comparable: there is no validation image of a class that both know"
    if not comparison.as_accurate:
        allowed = f", {comparison.tolerance:.2%} lower is allowed" if comparison.tolerance else ""
        return f"not better: {measured}{allowed}"
    if comparison.worse:
        return f"not better: it loses recall of '{comparison.worse[0].name}' ({measured} in all)"
    if not comparison.equal and comparison.challenger > comparison.champion:
        return f"better: {measured}"
    if comparison.tolerance:
        return (
            f"as good as registry.tolerance asks for: {measured}, {comparison.tolerance:.2%} lower is allowed"
        )
    if comparison.more_classes:
        return f"equal on the classes that both know, and it knows {comparison.more_classes} more: {measured}"
    return f"not better: equal, {measured}"


def verdict(version: int, alias: str, champion: int | None, why: str) -> str:
    """``v2, challenger (champion stays v1): why``: what became of a version, in one line."""
    because = f" because {why}" if why == FIRST else f": {why}" if why else ""
    if alias == "champion":
        return f"v{version}, champion{because}"
    stays = f" (champion {'stays' if alias else 'is'} v{champion})" if champion is not None else ""
    return f"v{version}, {alias or 'neither champion nor challenger'}{stays}{because}"

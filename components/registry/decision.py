"""Does the challenger become champion? A pure rule over what both answered for the same images.

Top-1 is decided by a paired 95 % interval, and each slice by an exact test, corrected for how many were
looked at: docs/registry.md says why, and what a tolerance of 0 means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.common.progress import counted
from components.registry.slices import CLASS, MIN_IMAGES, Slice, named, searched
from components.training.paired import Difference, difference, no_worse

FIRST = "it is the first: nothing to compare with"  # why a version without a champion becomes one
ALPHA = 0.05  # how likely one of all slices is called worse, where none is
SMALLER = 0.9  # share of the champion's bytes, or of its time, from which that is a gain
ROUNDING = 1e-9


@dataclass(frozen=True)
class Outcomes:
    """What both models said of n images whose class the champion knows.

    Attributes:
        classes: names, str [n].
        champion, challenger: bool [n], whether it was right.
        groups: int64 [n], which images err together; None: each stands alone.
        frozen: bool [n], images of the champion's own validation split; None: no such split is known.
        columns: more by which images are told apart, [n] each: names, or numbers.
    """

    classes: NDArray[Any]
    champion: NDArray[np.bool_]
    challenger: NDArray[np.bool_]
    groups: NDArray[np.int64] | None = None
    frozen: NDArray[np.bool_] | None = None
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def value(self) -> NDArray[np.float64]:
        """1 where the challenger alone is right, -1 where the champion alone is, else 0; float64 [n]."""
        return self.challenger.astype(np.float64) - self.champion.astype(np.float64)


@dataclass(frozen=True)
class Limits:
    """What a challenger may lose, and within what it counts as equal: see section ``registry``."""

    tolerance: float = 0.0
    class_tolerance: float = 0.05
    equal_within: float = 0.01
    latency_tolerance: float = 0.5


@dataclass(frozen=True)
class Latency:
    """The challenger's time for one image, over the champion's, round by round in one process.

    ``low`` and ``high`` are the 10th and 90th percentile over rounds.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Facts:
    """What else is known of both.

    Attributes:
        lost: classes that only the champion knows.
        gained: classes that only the challenger knows, and recognises better than by chance.
        size: bytes of the challenger's file over those of the champion's.
        latency: of one over the other; None: not measured.
        budget_ms, p50_ms: ``benchmark.latency_budget_ms``, and what was measured; None: no budget.
    """

    lost: Sequence[str] = ()
    gained: Sequence[str] = ()
    size: float = 1.0
    latency: Latency | None = None
    budget_ms: float | None = None
    p50_ms: float | None = None


@dataclass(frozen=True)
class Row:
    """One slice: its images, both recalls 0..1, and the chance of such a loss where there is none.

    ``chance`` is corrected for all slices that were looked at (Holm).
    """

    column: str
    name: str
    images: int
    champion: float
    challenger: float
    chance: float
    worse: bool


@dataclass(frozen=True)
class Refusal:
    """Why a challenger is not promoted: the rule, what it is about, and the reason."""

    rule: str
    subject: str
    reason: str
    measured: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Decision:
    """What was decided, and all that it was decided by.

    Attributes:
        champion, challenger: top-1 on the images.
        difference: of top-1, challenger minus champion.
        rows: slices, the greatest losses first.
        refusals: empty when it is promoted.
        few: classes of too few images to be judged alone.
    """

    promoted: bool
    reason: str
    images: int
    champion: float
    challenger: float
    difference: Difference
    rows: list[Row]
    refusals: list[Refusal]
    few: list[str]


def decide(outcomes: Outcomes, limits: Limits, facts: Facts | None = None, seed: int = 0) -> Decision:
    """Decide about a challenger.

    It is promoted when nothing refuses it and the lower end of its difference in top-1 is above minus
    ``tolerance``; or above minus ``equal_within`` where it is not shown to be worse, and is smaller, faster
    or knows more classes.

    Args:
        seed: of the halves in which slices are searched for and confirmed.
    """
    facts = facts or Facts()
    if not len(outcomes):
        why = "not comparable: there is no validation image of a class that both know"
        nothing = Refusal("registry.better", "validation images", why)
        refusals = [nothing, *_lost(facts)]
        return Decision(False, why, 0, 0.0, 0.0, Difference(0.0, -1.0, 1.0), [], refusals, [])
    value = outcomes.value
    before, now = float(outcomes.champion.mean()), float(outcomes.challenger.mean())
    found = difference(value, outcomes.groups)
    rows = judge(outcomes, limits.class_tolerance, seed)
    counts = dict(zip(*np.unique(outcomes.classes.astype(str), return_counts=True), strict=True))
    few = [str(name) for name, count in counts.items() if count < MIN_IMAGES]
    measured = f"top-1 {now:.2%} against {before:.2%}, {found}"
    accepted, why = _in_all(found, measured, limits, facts)
    refusals = [*_lost(facts), *_slow(facts, limits, better=found.low > 0)]
    if not accepted:
        limit = before - limits.tolerance
        refusals.append(Refusal("registry.better", "top-1", why, measured=now, limit=limit))
    refusals += [*_worse(rows, limits), *_frozen(outcomes)]
    reason = why if not refusals or not accepted else f"not better: {refusals[0].reason} ({measured} in all)"
    return Decision(not refusals, reason, len(outcomes), before, now, found, rows, refusals, few)


def _in_all(found: Difference, measured: str, limits: Limits, facts: Facts) -> tuple[bool, str]:
    """Whether top-1 is good enough, and why."""
    if found.low > 0:
        return True, f"better: {measured}"
    if limits.tolerance and found.low > -limits.tolerance - ROUNDING:
        allowed = f"{limits.tolerance:.2%} lower is allowed"
        return True, f"as good as registry.tolerance asks for: {measured}, {allowed}"
    gains = _gains(facts)
    if gains and found.low > -limits.equal_within - ROUNDING and found.high >= 0:
        return True, f"equal within {limits.equal_within:.2%}, and {' and '.join(gains)}: {measured}"
    if found.value == 0 and found.high < limits.equal_within:
        return False, f"not better: equal, {measured}"
    if found.value <= 0:
        return False, f"not better: {measured}"
    beyond = f"{limits.tolerance:.2%} lower is allowed" if limits.tolerance else "that may be chance"
    return False, f"not better beyond doubt: {measured}; {beyond}"


def _gains(facts: Facts) -> list[str]:
    """What a challenger of equal accuracy has over the champion."""
    gains = []
    if facts.gained:
        gains.append(f"it knows {counted(len(facts.gained), 'class', 'classes')} more")
    if facts.size <= SMALLER:
        gains.append(f"it is smaller ({facts.size:.0%} of the bytes)")
    if facts.latency is not None and facts.latency.high <= SMALLER:
        gains.append(f"it is faster ({facts.latency.value:.0%} of the time)")
    return gains


def _lost(facts: Facts) -> list[Refusal]:
    if not facts.lost:
        return []
    more = f" and {len(facts.lost) - 1} more of the champion's classes" if len(facts.lost) > 1 else ""
    first = f"class '{facts.lost[0]}'"
    return [Refusal("registry.class", first, f"it does not know {first}{more}", 0.0)]


def _slow(facts: Facts, limits: Limits, better: bool) -> list[Refusal]:
    """Beyond the latency budget; or where there is none, slower than the champion by more than is allowed.

    A model that is not better may not be slower at all, beyond the tenth that makes a faster one.
    """
    if facts.budget_ms is not None:
        if facts.p50_ms is None or facts.p50_ms <= facts.budget_ms:
            return []
        why = f"its p50 of {facts.p50_ms:.3g} ms is over benchmark.latency_budget_ms, {facts.budget_ms:g} ms"
        return [Refusal("registry.latency", "latency", why, facts.p50_ms, facts.budget_ms)]
    allowed = 1 + limits.latency_tolerance if better else 1 / SMALLER
    if facts.latency is None or facts.latency.low <= allowed:
        return []
    low, high = facts.latency.low, facts.latency.high
    why = f"it takes {facts.latency.value:.2f} times as long as the champion ({low:.2f} to {high:.2f}), " + (
        f"and registry.latency_tolerance allows {allowed:.2f}" if better else "and is not more accurate"
    )
    return [Refusal("registry.latency", "latency", why, facts.latency.value, allowed)]


def _frozen(outcomes: Outcomes) -> list[Refusal]:
    """Worse beyond doubt on the champion's own validation split: new rows may be what misleads."""
    if outcomes.frozen is None or not outcomes.frozen.any() or outcomes.frozen.all():
        return []
    rows = outcomes.frozen
    groups = None if outcomes.groups is None else outcomes.groups[rows]
    found = difference(outcomes.value[rows], groups)
    if found.high >= 0:
        return []
    why = f"it is worse on the champion's own validation split: {found}, {int(rows.sum()):,} images"
    return [Refusal("registry.frozen", "the champion's validation split", why, found.value, 0.0)]


def _worse(rows: Sequence[Row], limits: Limits) -> list[Refusal]:
    """The worst of the classes that are worse, and of the other slices, with how many more there are."""
    refusals = []
    kinds = (
        ("registry.class", "recall of", "more class", "more classes"),
        ("registry.slice", "accuracy in", "more slice", "more slices"),
    )
    for rule, lost, one, several in kinds:
        found = [row for row in rows if row.worse and (row.column == CLASS) == (rule == "registry.class")]
        if not found:
            continue
        worst = found[0]
        more = f", and {counted(len(found) - 1, one, several)}" if len(found) > 1 else ""
        why = (
            f"it loses {lost} {worst.name}: {worst.challenger:.1%}, the champion's {worst.champion:.1%}, "
            f"{worst.images:,} images; {limits.class_tolerance:.1%} lower is allowed{more}"
        )
        limit = worst.champion - limits.class_tolerance
        refusals.append(Refusal(rule, f"{worst.name}{more}", why, worst.challenger, limit))
    return refusals


def judge(outcomes: Outcomes, class_tolerance: float, seed: int = 0) -> list[Row]:
    """Every slice of both models' answers, the greatest losses first.

    A slice is worse when it loses more than ``class_tolerance`` and so great a loss is no chance: by
    ``paired.no_worse``, at ``ALPHA`` over all slices together (Holm, "A simple sequentially rejective
    multiple test procedure", 1979, which holds however slices overlap).
    """
    columns = {CLASS: outcomes.classes, **outcomes.columns}
    if outcomes.groups is not None and "group" not in columns:
        columns["group"] = outcomes.groups.astype(str)
    value = outcomes.value
    slices = named(columns)
    slices += searched(columns, value, slices, outcomes.groups, seed)
    chances = holm([_chance(one, value, outcomes.groups) for one in slices])
    rows = []
    for one, chance in zip(slices, chances, strict=True):
        before = float(outcomes.champion[one.rows].mean())
        now = float(outcomes.challenger[one.rows].mean())
        worse = chance < ALPHA and before - now > class_tolerance + ROUNDING
        rows.append(Row(one.column, one.name, int(one.rows.sum()), before, now, chance, worse))
    return sorted(rows, key=lambda row: (not row.worse, row.challenger - row.champion, row.name))


def _chance(one: Slice, value: NDArray[np.float64], groups: NDArray[np.int64] | None) -> float:
    return no_worse(value[one.rows], None if groups is None else groups[one.rows])


def holm(chances: Sequence[float]) -> list[float]:
    """p-values corrected for their number, by Holm's step-down method; in the order given."""
    order = np.argsort(chances, kind="stable")
    steps = np.asarray(chances, np.float64)[order] * np.arange(len(chances), 0, -1)
    result = np.empty(len(chances))
    result[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return [float(chance) for chance in result]


def verdict(version: int, alias: str, champion: int | None, why: str) -> str:
    """``v2, challenger (champion stays v1): why``: what became of a version, in one line."""
    because = f" because {why}" if why == FIRST else f": {why}" if why else ""
    if alias == "champion":
        return f"v{version}, champion{because}"
    stays = f" (champion {'stays' if alias else 'is'} v{champion})" if champion is not None else ""
    return f"v{version}, {alias or 'neither champion nor challenger'}{stays}{because}"

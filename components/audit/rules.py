"""The three rules for synthetic images, measured: blow-up, recognisability, degradation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from components.audit.counts import Counts
from components.audit.features import gradients, shaken
from components.audit.params import AuditParams
from components.audit.probe import Discriminant, Folded, Moments, standardised
from components.audit.rows import Rows
from components.audit.suspects import Sample, sample
from components.common.findings import Level
from components.step import StepContext

if TYPE_CHECKING:
    from numpy.typing import NDArray

WORST = 10  # classes that a report names one by one
COPIES = 4  # shaken copies of each real image
SURELY = 2.326  # standard deviations: 99 in 100, one-sided
DROP = 0.03  # of recall: a smaller loss is no degradation, however sure
SURE = 0.01  # chance of naming any class that did not degrade
TRIED = 5  # classes whose synthetic images are tried alone, as the cause of a degradation
TOLD_APART = 0.8  # AUC from which a domain gap is named
PAIRS = 10  # images of each kind that a domain gap needs
LEAST = 0.1  # weight of synthetic images that nobody recognises
HARM = 0.5  # weight of synthetic images by which a class degrades


@dataclass
class Class:
    """What was measured of a class with synthetic or semi-synthetic images; shares 0..1, None: not known."""

    place: int
    made: int
    to_median: float  # 0: no other class has images
    blown_up: bool = False
    looked_at: int = 0
    recognised: float | None = None
    beyond_chance: float | None = None  # the same, less what chance gives
    unrecognisable: bool = False
    weight: float = 1.0  # of its synthetic images in the plan
    real_recall: float | None = None  # without synthetic images, out of fold
    with_made: float | None = None  # with them
    harmful: bool = False  # a class degrades by its synthetic images
    auc: float | None = None

    @property
    def named(self) -> bool:
        """Whether a rule warns of it."""
        return self.blown_up or self.unrecognisable or self.harmful


def blow_up(run: StepContext, counts: Counts, limit: float) -> list[Class]:
    """Rule 1. Every class with synthetic images; ``synthetic.blow_up`` for those that they blow up."""
    total, made = counts.total, counts.made
    ordered = np.sort(total[total > 0])
    classes = []
    for c in np.flatnonzero(made).tolist():
        median = _median_without(ordered, int(total[c]))
        one = Class(c, int(made[c]), float(made[c] / median) if median else 0.0)
        one.blown_up = one.to_median > limit
        if one.blown_up:
            one.weight = _enough(float(counts.train[c, 0]), median) / one.made
        classes.append(one)
    blown = sorted((one for one in classes if one.blown_up), key=lambda one: (-one.to_median, one.place))
    for one in blown[:WORST]:
        run.add_finding(
            "synthetic.blow_up", "warning", f"class '{counts.names[one.place]}'",
            f"{one.made:,} synthetic images beside {counts.train[one.place, 0]:,} real ones are "
            f"{one.to_median:.1f} x the median size of the other classes.",
            measured=one.to_median, limit=limit,
            advice="The plan gives its synthetic images less weight (sampling.by_source).", row="4.1",
        )  # fmt: skip
    _rest(run, "synthetic.blow_up", "warning", len(blown), "are blown up by synthesis")
    return classes


def _enough(real: float, median: float) -> float:
    """Rows that a blown-up class's synthetic images count as, together.

    As many as fill the class up to the median of the others, or as it has real ones, whichever is more.
    """
    return max(median - real, min(real, median), 1.0)


def _median_without(ordered: NDArray[np.int64], size: int) -> float:
    """The median of ascending sizes, one entry of value ``size`` left out; 0 when nothing else is there."""
    place = int(np.searchsorted(ordered, size))
    n = len(ordered) - 1
    if n < 1:
        return 0.0
    low, high = ((n - 1) // 2, n // 2)
    return float(ordered[low + (low >= place)] + ordered[high + (high >= place)]) / 2


def _rest(run: StepContext, rule: str, level: Level, count: int, what: str) -> None:
    """Beyond WORST subjects: how many there are, and where all of them stand."""
    if count > WORST:
        run.add_finding(
            rule, level, f"{count:,} classes",
            f"{count:,} classes {what}: {WORST} are named, all of them stand in classes.parquet.",
            measured=count, row="4.1",
        )  # fmt: skip


def recognisable(
    run: StepContext,
    params: AuditParams,
    counts: Counts,
    rows: Rows,
    classes: list[Class],
    shrinkage: float,
    real_told: NDArray[np.int64],
) -> list[Sample]:
    """Rule 2: does what knows only real images recognise a class's synthetic ones?

    Two discriminants look: one at backbone and gradients, one at the gradients of shaken copies of the real
    images (few real images of a class show few of its shapes). An image that either recognises counts, less
    what chance gives two tries (``_beyond_chance``).
    No more is asked of synthetic images than of real ones: some classes look like others.

    Args:
        real_told: int64, what the rest of the judging rows take each of them for.
    """
    number = len(counts.labels)
    place = rows.place[rows.judging]
    known = np.unique(place)
    if len(known) < 2:
        return []
    made = np.flatnonzero(~rows.real)
    of_class = _by_class(rows.place[made], number)
    told = _real_only(rows, number, shrinkage)(rows.vectors[made]).argmax(axis=1)
    also = _by_gradients(params, rows, made, number, shrinkage)
    right = (told == rows.place[made]) | (also == rows.place[made])
    images = np.bincount(place, minlength=number)
    recall = np.bincount(place, weights=real_told == place, minlength=number) / np.maximum(images, 1)
    samples = []
    limits: dict[int, float] = {}
    for one in classes:
        mine = of_class[one.place]
        one.looked_at = len(mine)
        if not len(mine) or one.place not in known:
            continue
        one.recognised = int(right[mine].sum()) / len(mine)
        one.beyond_chance = _beyond_chance(told[mine], also[mine], one.place, len(known))
        limits[one.place] = min(params.audit.recognisable_recall, float(recall[one.place]))
        one.unrecognisable = _upper(one.beyond_chance * len(mine), len(mine)) < limits[one.place]
        if one.unrecognisable:
            # where two tries by chance alone would reach the limit, their hits say nothing
            of_chance = _of_two_tries(len(known)) >= params.audit.recognisable_recall
            share = min(one.recognised, one.beyond_chance) if of_chance else one.recognised
            one.weight *= max(share, LEAST)
            samples += [
                sample("synthetic.recognisable", counts, rows, int(made[i]), int(told[i]))
                for i in mine[~right[mine]]
            ]
    named = [one for one in classes if one.unrecognisable]
    named.sort(key=lambda one: (one.beyond_chance, one.place))
    for one in named[:WORST]:
        mine = rows.place[made] == one.place
        taken = np.bincount(told[mine & (told != one.place)], minlength=number)
        rather = f"; most others it takes for '{counts.names[int(taken.argmax())]}'" if taken.any() else ""
        run.add_finding(
            "synthetic.recognisable", "warning", f"class '{counts.names[one.place]}'",
            f"Classifiers that know only real images recognise {one.recognised:.0%} of {one.looked_at:,} "
            f"synthetic images ({one.beyond_chance:.0%} beyond chance, of {len(known):,} classes)"
            f"{rather}.",
            measured=one.beyond_chance, limit=limits[one.place],
            advice="Look at them (samples.parquet lists them) and make better ones. The plan gives them less "
            "weight; audit.drop_suspects: true leaves the unrecognised ones out.",
            row="4.1",
        )  # fmt: skip
    _rest(
        run, "synthetic.recognisable", "warning", len(named), "have synthetic images that are not recognised"
    )
    return samples


def _by_class(place: NDArray[np.int64], number: int) -> list[NDArray[np.int64]]:
    """Where each class stands, in order, of every class."""
    order = np.argsort(place, kind="stable")
    return np.split(order, np.cumsum(np.bincount(place, minlength=number))[:-1])


def _beyond_chance(told: NDArray[np.int64], also: NDArray[np.int64], place: int, classes: int) -> float:
    """The share that one classifier alone would recognise if it did as much better than chance, 0..1.

    How often either says the class, less how often either says another one, on the average of those: for
    images that show nothing these are alike. One classifier whose recall is r does better than chance by
    ``r - (1 - r) / (classes - 1)``; that is solved for r.
    """
    hits = float(((told == place) | (also == place)).mean())
    either = (told != place).astype(np.float64) + ((also != place) & (also != told))
    better = hits - float(either.mean()) / (classes - 1)
    return float(np.clip(better * (1 - 1 / classes) + 1 / classes, 0.0, 1.0))


def _of_two_tries(classes: int) -> float:
    """Share of images that one of two guesses gets right."""
    return 1 - (1 - 1 / classes) ** 2


def _real_only(rows: Rows, number: int, shrinkage: float) -> Discriminant:
    chosen = rows.judging
    return Discriminant(Moments.of(rows.vectors[chosen], rows.place[chosen], number), shrinkage)


def _by_gradients(
    params: AuditParams, rows: Rows, made: NDArray[np.int64], number: int, shrinkage: float
) -> NDArray[np.int64]:
    """The classes that gradients alone say, int64 [made], learnt from shaken copies of real images."""
    learnt, place = rows.small[rows.judging], rows.place[rows.judging]
    copies = np.concatenate([learnt, shaken(learnt, COPIES, params.general.seed)])
    places = np.concatenate([place, np.repeat(place, COPIES)])
    everything = gradients(np.concatenate([copies, rows.small[made]]))
    lines = standardised(everything, np.arange(len(everything)) < len(copies))
    fitted = Discriminant(Moments.of(lines[: len(copies)], places, number), shrinkage)
    return fitted(lines[len(copies) :]).argmax(axis=1)


def _upper(hits: float, count: int) -> float:
    """Upper limit of a share, one-sided 99 % (Wilson, 1927)."""
    share, z = hits / count, SURELY
    middle = share + z * z / (2 * count)
    return float(
        (middle + z * np.sqrt(share * (1 - share) / count + z * z / (4 * count**2))) / (1 + z * z / count)
    )


def degradation(
    run: StepContext,
    counts: Counts,
    rows: Rows,
    classes: list[Class],
    shrinkage: float,
    judged: Folded,
    real_told: NDArray[np.int64],
) -> list[Sample]:
    """Rule 3: is a class's recall on real held-out images lower with synthetic images than without?

    The same folds of real images (training and validation), judged by what learnt from real images alone,
    and by what learnt from the synthetic ones too, weighed as in the plan. A class is named when an exact
    McNemar test is sure of it among all classes (Holm, 1979), and it lost more than DROP of its recall.

    Args:
        judged: the judging rows.
        real_told: int64, what the rest of them take each for, without synthetic images.
    """
    from scipy.stats import binomtest

    number = len(counts.labels)
    place = judged.places
    before = real_told == place
    told = judged.scores(shrinkage, _made(counts, rows, classes)).argmax(axis=1)
    after = told == place
    by_place = {one.place: one for one in classes}
    images, *counted = (
        np.bincount(place[of], minlength=number)
        for of in (slice(None), before, after, before & ~after, ~before & after)
    )
    tests = []
    for c in np.flatnonzero(images).tolist():
        right, then, lost, won = (int(count[c]) for count in counted)
        recall, with_made = right / int(images[c]), then / int(images[c])
        if c in by_place:
            by_place[c].real_recall, by_place[c].with_made = recall, with_made
        chance = float(binomtest(lost, lost + won, alternative="greater").pvalue) if lost > won else 1.0
        tests.append((chance, c, recall, with_made))
    samples = []
    named = 0
    for rank, (chance, c, recall, with_made) in enumerate(sorted(tests)):
        if chance * (len(tests) - rank) > SURE:  # step-down: from here on nothing is sure
            break
        if recall - with_made <= DROP:
            continue
        named += 1
        culprit = _culprit(judged, counts, rows, classes, c, before, told, shrinkage)
        again = culprit.harmful  # by it another class degraded already
        if not again:
            culprit.harmful = True
            culprit.weight *= HARM
        made = np.flatnonzero(~rows.real & (rows.place == culprit.place))
        seen_as = _real_only(rows, number, shrinkage)(rows.vectors[made]).argmax(axis=1)
        odd = made[seen_as != culprit.place]
        commonest = int(np.bincount(seen_as[seen_as != culprit.place], minlength=number).argmax())
        samples += [
            sample("synthetic.degradation", counts, rows, int(row), int(suggested))
            for row, suggested in zip(odd, seen_as[seen_as != culprit.place], strict=True)
            if not again
        ]
        if named > WORST:
            continue
        of = "" if culprit.place == c else f" of '{counts.names[culprit.place]}'"
        looks = f", most of them like '{counts.names[commonest]}'" if len(odd) else ""
        run.add_finding(
            "synthetic.degradation", "warning", f"class '{counts.names[c]}'",
            f"Recall of its real held-out images falls from {recall:.1%} to {with_made:.1%} when synthetic "
            f"images{of} are added (McNemar, p = {chance:.1g}). {len(odd):,} of {len(made):,} of those look "
            f"like another class to a classifier of real images{looks}.",
            measured=with_made, limit=recall,
            advice="Look for noise and hard samples among them (samples.parquet), or raise this class's "
            "weight (audit.distribution). The plan halves the weight of those synthetic images.",
            row="4.1",
        )  # fmt: skip
    _rest(run, "synthetic.degradation", "warning", named, "degrade when synthetic images are added")
    return samples


def _culprit(
    judged: Folded,
    counts: Counts,
    rows: Rows,
    classes: list[Class],
    degraded: int,
    before: NDArray[np.bool_],
    told: NDArray[np.int64],
    shrinkage: float,
) -> Class:
    """The class whose synthetic images alone cost the class ``degraded`` most of its recall.

    Tried are its own, and those of the classes that its lost images are taken for most.
    """
    mine = judged.places == degraded
    taken = np.bincount(told[mine & before & (told != degraded)], minlength=len(counts.labels))
    seen = np.unique(rows.place[~rows.real])
    able = [one for one in classes if one.place in seen]
    able.sort(key=lambda one: (one.place != degraded, -taken[one.place], one.place))

    def kept(one: Class) -> int:
        alone = judged.scores(shrinkage, _made(counts, rows, [one])).argmax(axis=1)
        return int((alone == judged.places)[mine].sum())

    return min(able[:TRIED], key=kept)


def _made(counts: Counts, rows: Rows, classes: list[Class]) -> Moments:
    """Moments of the synthetic images, weighed as the plan weighs them beside the real ones.

    Where only some images of a group were looked at, they stand for all of it.
    """
    learnt = np.bincount(rows.place[rows.real & (rows.split == "train")], minlength=len(counts.labels))
    total: Moments | None = None
    for one in classes:
        mine = ~rows.real & (rows.place == one.place)
        seen = int(mine.sum())
        if not seen:
            continue
        of_real = max(counts.train[one.place, 0] / max(learnt[one.place], 1), 1.0)
        moments = Moments.of(rows.vectors[mine], rows.place[mine], len(counts.labels))
        moments = moments * (one.weight * one.made / seen / of_real)
        total = moments if total is None else total + moments
    assert total is not None, "called where there are synthetic images"
    return total


def domain_gap(run: StepContext, counts: Counts, rows: Rows, classes: list[Class], shrinkage: float) -> None:
    """``synthetic.domain_gap``: how well real and synthetic images of a class are told apart, out of fold."""
    from sklearn.metrics import roc_auc_score

    trained = rows.split == "train"
    named = []
    for one in classes:
        mine = np.flatnonzero(trained & (rows.place == one.place))
        is_made = (~rows.real[mine]).astype(np.int64)
        if min(is_made.sum(), (1 - is_made).sum()) < PAIRS:
            continue
        scores = Folded(rows.vectors[mine], is_made, 2, 0).scores(shrinkage)
        one.auc = float(roc_auc_score(is_made, scores[:, 1] - scores[:, 0]))
        if one.auc >= TOLD_APART:
            named.append(one)
    named.sort(key=lambda one: (-(one.auc or 0), one.place))
    for one in named[:WORST]:
        run.add_finding(
            "synthetic.domain_gap", "info", f"class '{counts.names[one.place]}'",
            f"A probe tells its synthetic images from its real ones: AUC {one.auc:.2f} (0.5 is chance).",
            measured=one.auc, limit=TOLD_APART,
            advice="The closer synthetic images come to real ones, the more they teach.", row="4.1",
        )  # fmt: skip
    _rest(
        run,
        "synthetic.domain_gap",
        "info",
        len(named),
        "have synthetic images that can be told apart",
    )


def same_order(run: StepContext, counts: Counts, classes: list[Class]) -> None:
    """Rule 2's first half: synthetic images of the same order as the other classes need no balancing."""
    named = [one for one in classes if not one.named]
    real = counts.train[:, 0] + counts.val + counts.test
    for one in named[:WORST]:
        if not real[one.place]:
            tried = "It has no real image: nothing can say whether they are recognisable, or judge the class."
        elif one.recognised is None:
            tried = "Whether they are recognisable was not tried."
        else:
            tried = f"A classifier of real images recognises {one.recognised:.0%} of them."
        run.add_finding(
            "synthetic.same_order", "info", f"class '{counts.names[one.place]}'",
            f"{one.made:,} synthetic images are {one.to_median:.1f} x the median size of the other classes: "
            f"of the same order, so they need no balancing. {tried}",
            measured=one.to_median, row="4.1",
        )  # fmt: skip
    _rest(run, "synthetic.same_order", "info", len(named), "have synthetic images of the same order")

"""Suspect labels: real images whose given label is rather wrong than right.

Two models that err in different ways must agree: a discriminant (components/audit/probe.py), which a class
of several kinds of images or an image far from all others misleads, and the nearest images of each class
(components/audit/neighbours.py). Alone, the first one calls 1 to 9 % of right labels suspect on such classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from components.audit.counts import Counts
from components.audit.probe import Calibration
from components.audit.rows import Rows
from components.common.progress import counted
from components.step import StepContext

if TYPE_CHECKING:
    from numpy.typing import NDArray

WORST = 10  # files that a report names one by one
FEWEST = 10  # real training images of a class below which the probe cannot know it
DOUBTED = 0.4  # probability of being wrong from which a label is suspect
TIE = 1e-9  # relative difference that rounding may make of none: then the given label stands
FEW = 0.005  # share of suspect labels up to which they are a note, not a warning


@dataclass(frozen=True)
class Sample:
    """One file that a person should look at; ``suggested`` is the label that the probe would give it."""

    rule: str  # labels.suspect, synthetic.recognisable or hard
    path: str
    label: int
    class_name: str
    split: str
    source: str
    suggested: str
    probability: float | None = None  # of the given label, 0..1, where it was worked out


def sample(
    rule: str, counts: Counts, rows: Rows, row: int, suggested: int, probability: float | None = None
) -> Sample:
    """The row as a sample; ``suggested`` is the position of a class."""
    place = int(rows.place[row])
    return Sample(
        rule, rows.path[row], int(counts.labels[place]), counts.names[place], rows.split[row],
        rows.source[row], counts.names[suggested], probability,
    )  # fmt: skip


@dataclass(frozen=True)
class Judgement:
    """What two models say of the labels of n real images.

    Attributes:
        best: int64 [n], the class that both together take for the likeliest.
        suspect: bool [n], together they hold the label for wrong with a probability of DOUBTED or more, and
            each alone prefers ``best`` to it.
        given: float64 [n], probability of the given label.
        wrong: float64 [n], probability that it is wrong.
        known: bool [C], classes with enough training images to be judged.
        unsure: bool [C], classes most of whose training images seem to be of others: they are not judged.
    """

    best: NDArray[np.int64]
    suspect: NDArray[np.bool_]
    given: NDArray[np.float64]
    wrong: NDArray[np.float64]
    known: NDArray[np.bool_]
    unsure: NDArray[np.bool_]


def judge(
    scores: NDArray[np.float64],
    near: NDArray[np.float64],
    places: NDArray[np.int64],
    trained: NDArray[np.bool_],
) -> Judgement | None:
    """Judge labels by a discriminant's scores and by the closeness of each class, both float64 [n, C].

    How much either counts, and how many labels are wrong, follows from the training rows alone: what the
    labels of other rows are changes no verdict on these. None: fewer than two classes can be told apart.

    Args:
        places: int64 [n], the given classes.
        trained: bool [n], training rows; neither model has learnt from the row itself.
    """
    number = scores.shape[1]
    images = np.bincount(places[trained], minlength=number)
    known = images >= FEWEST
    if known.sum() < 2:
        return None
    learnt = trained & known[places]
    fitted = Calibration.of([scores[learnt], near[learnt]], places[learnt])
    probabilities = fitted.probabilities([scores, near])
    rows = np.arange(len(places))
    given = probabilities[rows, places]
    best = probabilities.argmax(axis=1)
    best = np.where(given >= probabilities[rows, best] * (1 - TIE), places, best)
    wrong = fitted.wrong(given)
    suspect = (best != places) & (wrong > DOUBTED) & known[places]
    for one in (scores, near):
        by = one[rows, best]
        suspect &= by > one[rows, places] + TIE * np.abs(np.where(np.isfinite(by), by, 0.0))
    # where most images of a class seem to be of another one, it is the models that do not know the class
    unsure = 2 * np.bincount(places[suspect & trained], minlength=number) > images
    return Judgement(best, suspect & ~unsure[places], given, wrong, known, unsure)


def suspects(
    run: StepContext, counts: Counts, rows: Rows, real: NDArray[np.int64], judged: Judgement | None
) -> list[Sample]:
    """``labels.suspect``: real images whose given label is rather wrong than right; hard ones beside them.

    Training rows first, in a finding of their own. What is suspect in validation and test is listed for a
    person: no plan leaves it out.

    Args:
        real: int64 [n], the rows that were judged.
    """
    if judged is None:
        run.add_finding(
            "labels.suspect", "info", "labels",
            f"No label was judged: fewer than two classes have {FEWEST} real training images to learn from.",
            measured=0, limit=0, row="4.1",
        )  # fmt: skip
        return []
    given = rows.place[real]
    trained = rows.split[real] == "train"
    order = np.lexsort((np.round(judged.given, 12), ~trained))
    differ = judged.best != given
    samples = [
        sample(
            "labels.suspect" if judged.suspect[i] else "hard", counts, rows, int(real[i]),
            int(judged.best[i]), float(f"{judged.given[i]:.6g}"),
        )
        for i in order[differ[order]]
    ]  # fmt: skip
    by_mistake = float((1 - judged.wrong[judged.suspect & trained]).sum())
    found = [one for one in samples if one.rule == "labels.suspect"]
    mine = [one for one in found if one.split == "train"]
    _say(run, counts, judged, mine, given[trained], float(differ[trained].mean()), by_mistake)
    others = [one for one in found if one.split != "train"]
    if others:
        number = int((~trained).sum())
        mistaken = float((1 - judged.wrong[judged.suspect & ~trained]).sum())
        run.add_finding(
            "labels.suspect", "info", ", ".join(one.path for one in others[:WORST]),
            f"In validation and test, {len(others):,} of {number:,} real images are rather of another class "
            f"than their label says, by what was learnt from training images ({expected(mistaken)}): "
            f"{_shown(others)}. They are listed for a person; the plan leaves them as they are.",
            measured=len(others), limit=0,
            advice="Look at them in samples.parquet: a wrong label there makes every score wrong.",
            row="4.1",
        )  # fmt: skip
    return samples


def _say(
    run: StepContext,
    counts: Counts,
    judged: Judgement,
    found: list[Sample],
    given: NDArray[np.int64],
    differ: float,
    by_mistake: float,
) -> None:
    """The finding on training rows: how many, how many of them by mistake, which classes were not judged."""
    unjudged = _unjudged(counts, judged, given)
    judgeable = int((judged.known & ~judged.unsure)[given].sum())
    if not found:
        run.add_finding(
            "labels.suspect", "info", "labels",
            f"No label of {judgeable:,} real training images is suspect. Both models together recognise "
            f"{1 - differ:.1%} of {len(given):,}; the others are in samples.parquet." + unjudged,
            measured=0, limit=0, row="4.1",
        )  # fmt: skip
        return
    share = len(found) / len(given)
    run.add_finding(
        "labels.suspect", "warning" if share > FEW else "info", ", ".join(one.path for one in found[:WORST]),
        f"{len(found):,} of {judgeable:,} real training images ({share:.1%}) are rather of another class "
        f"than their label says ({expected(by_mistake)}): {_shown(found)}. A discriminant and the nearest "
        "images of each class, which have not seen the image itself, both prefer that class. All of them: "
        "samples.parquet." + unjudged,
        measured=len(found), limit=0,
        advice="Look at them; proposed_corrections.csv, edited, is what data.corrections reads. "
        "audit.drop_suspects: true leaves them out of training.",
        row="4.1",
    )  # fmt: skip


def expected(by_mistake: float) -> str:
    """How many of a list of suspects are expected to have the right label, in words."""
    if by_mistake < 1:
        return "fewer than 1 of them expected to be right after all"
    return f"about {by_mistake:.0f} of them expected to be right after all"


def _shown(found: list[Sample]) -> str:
    shown = "; ".join(f"{one.path} ({one.class_name}, rather {one.suggested})" for one in found[:3])
    return shown + (" and others" if len(found) > 3 else "")


def _unjudged(counts: Counts, judged: Judgement, given: NDArray[np.int64]) -> str:
    """Which classes have no suspect labels because nothing could be said of them."""
    there = np.bincount(given, minlength=len(counts.labels)) > 0
    places = np.flatnonzero(there & (~judged.known | judged.unsure)).tolist()
    if not places:
        return ""
    shown = ", ".join(f"'{counts.names[c]}'" for c in places[:WORST]) + (", ..." if places[WORST:] else "")
    return (
        f" Of {counted(len(places), 'class', 'classes')} ({shown}) no label is called suspect, for want of "
        f"{FEWEST} real training images, or because the probe takes most of them for others."
    )

"""Suspect labels: real images whose given label is rather wrong than right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from components.audit.counts import Counts
from components.audit.rows import Rows
from components.common.step import Run

if TYPE_CHECKING:
    from numpy.typing import NDArray

WORST = 10  # files that a report names one by one
FEWEST = 10  # real images of a class below which the probe cannot know it
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


def suspects(
    run: Run,
    counts: Counts,
    rows: Rows,
    real: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    below: float,
) -> list[Sample]:
    """``labels.suspect``: real images whose given label is rather wrong than right; hard ones beside them.

    Ranked by cleanlab's self-confidence (Kuan and Mueller, "Model-agnostic label quality scoring", 2022).

    Args:
        real: int64 [n], the rows that are judged.
        probabilities: float64 [n, C], calibrated, by models that have not seen the row.
        below: the given label's probability below which it is suspect.
    """
    from cleanlab.rank import get_label_quality_scores

    given = rows.place[real]
    there, given_there = np.unique(given, return_inverse=True)
    quality = get_label_quality_scores(
        given_there, _normalised(probabilities[:, there]), method="self_confidence", adjust_pred_probs=False
    )
    best = probabilities.argmax(axis=1)
    wrong = best != given
    suspect = wrong & (quality < below)
    # where most images of a class seem to be of another one, it is the probe that does not know the class
    number = len(counts.labels)
    images, doubted = np.bincount(given, minlength=number), np.bincount(given[suspect], minlength=number)
    unknown = (doubted > 0) & ((images < FEWEST) | (2 * doubted > images))
    suspect &= ~unknown[given]
    unjudged = _unjudged([counts.names[c] for c in np.flatnonzero(unknown).tolist()])
    order = np.argsort(quality, kind="stable")
    samples = [
        sample(
            "labels.suspect" if suspect[i] else "hard",
            counts,
            rows,
            int(real[i]),
            int(best[i]),
            float(f"{quality[i]:.6g}"),
        )
        for i in order[wrong[order]]
    ]
    found = [sample for sample in samples if sample.rule == "labels.suspect"]
    if not found:
        run.find(
            "labels.suspect", "info", "labels",
            f"No label of {len(real):,} real images is suspect. The probe recognises "
            f"{1 - wrong.mean():.1%} of them; the other {int(wrong.sum()):,} are in samples.parquet."
            + unjudged,
            measured=0, limit=0, row="4.1",
        )  # fmt: skip
        return samples
    share = len(found) / len(real)
    shown = "; ".join(f"{one.path} ({one.class_name}, rather {one.suggested})" for one in found[:3])
    run.find(
        "labels.suspect", "warning" if share > FEW else "info", ", ".join(one.path for one in found[:WORST]),
        f"{len(found):,} of {len(real):,} real images ({share:.1%}) are rather of another class than their "
        f"label says: {shown}{'; ...' if len(found) > 3 else ''}. All of them: samples.parquet."
        + unjudged,
        measured=len(found), limit=0,
        advice="Look at them; proposed_corrections.csv, edited, is what data.corrections reads. "
        "audit.drop_suspects: true leaves them out of training.",
        row="4.1",
    )  # fmt: skip
    return samples


def _unjudged(names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(f"'{name}'" for name in names[:WORST]) + (", ..." if len(names) > WORST else "")
    return (
        f" Of {len(names):,} classes ({shown}) no label is called suspect: they have fewer than {FEWEST} "
        "real images, or the probe takes most of them for others."
    )


def _normalised(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    return probabilities / probabilities.sum(axis=1, keepdims=True)

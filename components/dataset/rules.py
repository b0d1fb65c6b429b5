"""The rules of single rows: what ``validate`` looks for, says, and does with a row that breaks one."""

from __future__ import annotations

from dataclasses import dataclass

from components.common.findings import Level
from components.dataset import manifest as manifests

SMALLEST_SIDE = 8  # pixels
LONGEST = 20  # times the shorter side
EVAL = "split in ('val', 'test')"


@dataclass(frozen=True)
class Rule:
    """A rule that a row of the manifest, or its image, may break. Every case stands in ``findings.parquet``.

    Attributes:
        one, several: what is said of one such row, and of more.
        advice: what happens to them, and the way out.
        row: of the FAQ.
        keep: whether they stay; else they are quarantined.
        condition: SQL over the manifest ``m`` that is true of a row that breaks it; empty: code finds it
            (``content.py``) and adds to the table ``cases``.
        detail: what is wrong with a row that meets ``condition``.
        total: what Great Expectations calls the number of cases; empty: it looks at the rows by itself.
    """

    one: str
    several: str
    advice: str
    row: str = ""
    level: Level = "warning"
    keep: bool = False
    condition: str = ""
    detail: str = ""
    total: str = ""


CASES = {
    "manifest.path": Rule(
        one="row has no path",
        several="rows have no path",
        advice="They are quarantined: mend the manifest.",
        condition="path is null or path = ''",
        detail="the path is empty",
    ),
    "manifest.split": Rule(
        one="row has an unknown split",
        several="rows have an unknown split",
        advice="They are quarantined: use train, val, test or unlabeled.",
        condition=f"split is null or split not in {manifests.SPLITS}",
        detail="the split is unknown",
    ),
    "manifest.source": Rule(
        one="row has an unknown source",
        several="rows have an unknown source",
        advice="They are quarantined: use real, synthetic or semi_synthetic.",
        condition=f"source is null or source not in {manifests.SOURCES}",
        detail="the source is unknown",
    ),
    "labels.missing": Rule(
        one="labelled row has no label",
        several="labelled rows have no label",
        advice="They are quarantined: name their class.",
        row="2.1",
        condition="split <> 'unlabeled' and (label is null or label < 0)",
        detail="the label is missing",
    ),
    "labels.unlabeled": Rule(
        one="unlabelled row carries a label",
        several="unlabelled rows carry a label",
        advice="Use -1 in the split unlabeled.",
        row="2.1",
        condition="split = 'unlabeled' and label <> -1",
        detail="an unlabelled row has a label",
    ),
    "image.unreadable": Rule(
        one="image cannot be decoded",
        several="images cannot be decoded",
        advice="They are quarantined: mend or replace these files.",
        total="unreadable",
    ),
    "image.bomb": Rule(
        one="image is too large to be decoded safely",
        several="images are too large to be decoded safely",
        advice="They are quarantined: shrink them.",
        total="bombs",
    ),
    "image.changed": Rule(
        one="image changed since ingest",
        several="images changed since ingest",
        advice="They are quarantined: run 'retort ingest' again.",
    ),
    "image.size": Rule(
        one=f"image is smaller than {SMALLEST_SIDE} pixels or {LONGEST} times as long as wide",
        several=f"images are smaller than {SMALLEST_SIDE} pixels or {LONGEST} times as long as wide",
        advice="They stay: look whether they are what they should be.",
        keep=True,
    ),
    "duplicates.exact": Rule(
        one="row repeats the content of another",
        several="rows repeat the content of another row",
        advice="They stay: each counts as often.",
        keep=True,
        total="exact_duplicates",
    ),
    "duplicates.near": Rule(
        one="image is a near-duplicate of another",
        several="images are near-duplicates of another",
        advice="They stay: each counts as often.",
        keep=True,
        total="near_duplicates",
    ),
    "duplicates.labels": Rule(
        one="image stands there again, or nearly so, with another label",
        several="images stand there again, or nearly so, with another label",
        advice="They stay: decide with data.corrections which label is right.",
        row="2.1",
        keep=True,
        total="contradicting_labels",
    ),
    "leakage.exact": Rule(
        one="training or unlabelled row also stands in validation or test",
        several="training or unlabelled rows also stand in validation or test",
        advice="They are quarantined. A lower score than before is a correction, not a loss.",
        row="B3",
        total="exact_leaks",
    ),
    "leakage.near": Rule(
        one="training or unlabelled row is a near-duplicate of a validation or test image",
        several="training or unlabelled rows are near-duplicates of validation or test images",
        advice="They are quarantined. A lower score than before is a correction, not a loss.",
        row="B3",
        total="near_leaks",
    ),
    "leakage.synthetic": Rule(
        one="synthetic row stands in validation or test",
        several="synthetic rows stand in validation or test",
        advice="They are quarantined: only real images judge.",
        row="4.1",
        condition=f"{EVAL} and source <> 'real'",
        detail="only real images can judge a classifier",
    ),
}
# reported, never removed
KEPT = tuple(name for name, rule in CASES.items() if rule.keep)

"""Suspect labels: two models must agree, on classes that one alone misjudges; and which rows decide."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.audit.neighbours import closeness
from components.audit.plan_schema import Plan
from components.audit.probe import Folded, compressed, standardised
from components.audit.suspects import FEWEST, Judgement, judge
from tests.components.audit.conftest import Audits

CLASSES, EACH, MODES, DIMENSIONS, FREEDOM = 10, 120, 3, 24, 3


def heavy_tailed(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors float64 [n, D'] of classes with three modes each and the tails of Student's t, and classes."""
    random = np.random.default_rng(seed)
    places = np.repeat(np.arange(CLASSES), EACH)
    centres = random.normal(size=(CLASSES, MODES, DIMENSIONS)) * 1.7
    mode = random.integers(MODES, size=len(places))
    tails = np.sqrt(random.chisquare(FREEDOM, size=(len(places), 1)) / FREEDOM)
    vectors = centres[places, mode] + random.normal(size=(len(places), DIMENSIONS)) / tails
    everything = np.ones(len(places), bool)
    return compressed(standardised(vectors.astype(np.float32), everything), everything), places


def judged(vectors: np.ndarray, places: np.ndarray) -> Judgement:
    everything = np.ones(len(places), bool)
    _, scores = Folded(vectors, places, CLASSES, 0).best()
    found = judge(scores, closeness(vectors, everything, places, CLASSES), places, everything)
    assert found is not None
    return found


@pytest.mark.parametrize("seed", [1, 2])
def test_right_labels_of_classes_with_modes_and_heavy_tails_are_not_suspect(seed: int) -> None:
    vectors, places = heavy_tailed(seed)
    assert judged(vectors, places).suspect.mean() <= 0.005


def test_wrong_labels_of_such_classes_are_found_and_the_false_ones_estimated() -> None:
    random = np.random.default_rng(0)
    vectors, places = heavy_tailed(3)
    bad = random.random(len(places)) < 0.03
    given = np.where(bad, (places + random.integers(1, CLASSES, len(places))) % CLASSES, places)
    found = judged(vectors, given)
    hits = int((found.suspect & bad).sum())
    false = int((found.suspect & ~bad).sum())
    assert hits >= 0.8 * found.suspect.sum()
    assert hits >= 0.6 * bad.sum()
    assert (found.best[found.suspect & bad] == places[found.suspect & bad]).mean() > 0.9
    expected = float((1 - found.wrong[found.suspect]).sum())
    assert abs(expected - false) <= 4, "a handful of 30"


def test_copies_under_two_names_are_a_tie_and_no_suspects() -> None:
    """Exactly the same vectors in both classes: nothing is nearer than the other, whatever rounding says."""
    vectors = np.repeat(np.random.default_rng(0).normal(size=(20, 8)), 6, axis=0)
    places = np.arange(len(vectors)) % 2
    everything = np.ones(len(vectors), bool)
    near = closeness(vectors, everything, places, 2)
    copies = near[np.arange(len(places)), 1 - places]
    assert np.ptp(copies) == 0, "all copies are equally near"
    _, scores = Folded(vectors, places, 2, 0).best()
    found = judge(scores, near, places, everything)
    assert found is not None
    assert not found.suspect.any()


def test_few_images_are_not_judged() -> None:
    vectors, places = heavy_tailed(1)
    few = np.flatnonzero((places < 1) | (np.arange(len(places)) % EACH < FEWEST - 1))
    places = places[few]
    everything = np.ones(len(few), bool)
    _, scores = Folded(vectors[few], places, CLASSES, 0).best()
    near = closeness(vectors[few], everything, places, CLASSES)
    assert judge(scores, near, places, everything) is None, "only one class has enough"


VERDICTS = """
import sys
import numpy as np
from tests.components.audit.test_suspects import heavy_tailed, judged, CLASSES
vectors, places = heavy_tailed(5)
random = np.random.default_rng(1)
bad = random.random(len(places)) < 0.05
found = judged(vectors, np.where(bad, (places + 1) % CLASSES, places))
np.save(sys.argv[1], np.stack([found.suspect, found.best, found.wrong]))
"""


def test_verdicts_do_not_hang_on_the_processor(tmp_path: Path) -> None:
    found = []
    for kind in ("Haswell", "Nehalem"):
        file = tmp_path / f"{kind}.npy"
        subprocess.run(
            [sys.executable, "-c", VERDICTS, str(file)],
            env={**os.environ, "OPENBLAS_CORETYPE": kind, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
            cwd=Path(__file__).parents[3],
        )
        found.append(np.load(file))
    assert (found[0][:2] == found[1][:2]).all()
    assert np.abs(found[0][2] - found[1][2]).max() < 1e-3


def relabelled(split: str) -> Any:
    """What gives every row of a split some other digit, by its content."""

    def change(row: dict[str, Any]) -> dict[str, Any]:
        if row["split"] != split:
            return row
        label = (row["label"] + 1 + int(row["sha256"][:8], 16) % 9) % 10
        return {**row, "label": label, "class_name": str(label)}

    return change


def outcome(audits: Audits) -> tuple[Plan, list[str], list[dict[str, Any]]]:
    """The plan, what is said of training rows, and the files listed of them."""
    audits.imbalance()
    found = audits.synthetic(audit={"drop_suspects": True})
    plan = audits.plan(audit={"drop_suspects": True})
    said = [
        one.message
        for findings in found.values()
        for one in findings
        if not one.message.startswith("In validation and test")
    ]
    listed = [row for row in audits.samples() if row["split"] == "train"]
    return plan.model_copy(update={"manifest": ""}), said, listed


def test_labels_of_test_rows_decide_nothing(cached: Audits) -> None:
    before = outcome(cached)
    cached.change(relabelled("test"))
    assert outcome(cached) == before


def test_labels_of_validation_rows_change_no_verdict_on_training_rows(cached: Audits) -> None:
    cached.change(lambda row: row if row["source"] == "real" else None)
    first = outcome(cached)
    cached.change(relabelled("val"))
    assert outcome(cached) == first, "nor the plan: without synthetic images validation judges nothing"

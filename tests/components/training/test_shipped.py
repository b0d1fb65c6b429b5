"""Which network is shipped, and what is claimed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from components.common.params import StepParams
from components.step import StepContext
from components.tracking.tracker import Tracker
from components.training import shipped
from components.training.control import Trained
from components.training.shipped import Pair, choose, find_gain

ACTUAL = np.repeat([0, 1], [80, 20])
NONE = np.empty(0, dtype=np.int64)


def network(wrong: int, seed: int = 0, of: int = 0) -> Trained:
    """Wrong on the first images of a class, turned by ``seed``."""
    said = ACTUAL.copy()
    places = np.flatnonzero(np.equal(ACTUAL, of))
    said[np.roll(places, seed)[:wrong]] = 1 - of
    return Trained({}, [], {"val": said, "test": NONE}, 0, 32)


def found(pairs: list[Pair], tmp_path: Path) -> tuple[str, str, float]:
    params = StepParams()
    run = StepContext("distill", params, tmp_path, Tracker("distill", params.registry))
    find_gain(run, {"val": ACTUAL, "test": NONE}, pairs)
    (finding,) = run.report.findings
    return finding.level, finding.message, finding.measured


def test_rare_classes_are_not_paid_for_top1() -> None:
    """Nine of ten images are of one class: who knows little else is right more often, and not better."""
    actual = np.repeat(np.arange(6), [900, 20, 20, 20, 20, 20])

    def knows(head: int, tail: int) -> Trained:
        said = actual.copy()
        said[head:900] = 1
        for label in range(1, 6):
            said[np.flatnonzero(actual == label)[tail:]] = 0
        return Trained({}, [], {"val": said, "test": NONE}, 0, 32)

    found = choose("better", actual, [Pair(7, knows(891, 6), knows(774, 17))])
    assert found.net == "control"
    assert "although its top-1 is lower beyond chance (92.10% top-1 with the teacher, 85.90%" in found.why


@pytest.mark.parametrize(
    ("student", "control", "kept", "why"),
    [
        (30, 5, "control", "better beyond chance (70.00% top-1 with the teacher, 95.00% without it)"),
        (5, 30, "student", "better beyond chance"),
        (5, 4, "control", "the noise does not tell them apart"),
        (4, 5, "student", "the noise does not tell them apart"),
        (5, 5, "student", "its score on validation is the same"),
    ],
)
def test_the_better_one_is_shipped(student: int, control: int, kept: str, why: str) -> None:
    found = choose("better", ACTUAL, [Pair(7, network(student), network(control))])
    assert (found.net, found.seed) == (kept, 7)
    assert why in found.why
    assert ("WITHOUT the teacher" in found.why) is (kept == "control")


def test_macro_recall_counts_where_top_1_is_level() -> None:
    """Both wrong on 5 images: of the common class, or of the rare one."""
    assert choose("better", ACTUAL, [Pair(7, network(5, of=1), network(5, of=0))]).net == "control"


def test_a_person_may_keep_the_student() -> None:
    kept = choose("student", ACTUAL, [Pair(7, network(30), network(5))])
    assert kept.net == "student"
    assert "distill.keep is student" in kept.why


def test_without_a_control_the_student_is_all_there_is() -> None:
    assert choose("better", ACTUAL, [Pair(7, network(30), None)]).net == "student"


def test_of_several_seeds_the_kind_is_chosen_by_all_and_the_network_by_its_score() -> None:
    pairs = [Pair(7, network(4), network(9)), Pair(8, network(2), network(1)), Pair(9, network(3), None)]
    kept = choose("better", ACTUAL, pairs)
    assert (kept.net, kept.seed) == ("student", 8), "the best control, 1 wrong, is of the kind that is worse"


def test_one_training_says_nothing_of_distilling(tmp_path: Path) -> None:
    level, message, measured = found([Pair(7, network(30), network(5))], tmp_path)
    assert level == "warning"
    assert measured == pytest.approx(-0.25)
    assert "differ by -25.0 points" in message
    assert "with 1 seed that says nothing of distilling as such" in message


def test_three_seeds_say_what_distilling_gains(tmp_path: Path) -> None:
    pairs = [Pair(seed, network(4, seed), network(24 + seed, seed)) for seed in (0, 1, 2)]
    level, message, measured = found(pairs, tmp_path)
    assert level == "info"
    assert measured == pytest.approx(0.21)
    assert message.startswith("distilling gains +21.0 points (95 % interval +")
    assert "over 3 seeds and 100 validation images" in message


def test_a_control_that_failed_is_left_out(tmp_path: Path) -> None:
    pairs = [Pair(7, network(4), network(24)), Pair(8, network(3), None)]
    assert "with 1 seed" in found(pairs, tmp_path)[1]
    assert shipped.choose("better", ACTUAL, pairs).seed == 7, "of the trainings that can be compared"

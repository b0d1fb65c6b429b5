"""The rule by which a challenger becomes champion, on outcomes that were made up."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from components.registry.decision import FIRST, Facts, Latency, Limits, Outcomes, decide, holm
from components.registry.decision import verdict as line


def outcomes(lost: int, won: int, count: int = 1000, **more: Any) -> Outcomes:
    """``count`` images of ten classes, evenly; the losses first, then the gains, all others right in both."""
    champion, challenger = np.ones(count, bool), np.ones(count, bool)
    challenger[:lost] = False
    champion[lost : lost + won] = False
    classes = np.array([f"class {row % 10}" for row in range(count)])
    return Outcomes(classes, champion, challenger, **more)


def reason(made: Outcomes, facts: Facts | None = None, **limits: float) -> str:
    return decide(made, Limits(**limits), facts).reason


def promoted(made: Outcomes, facts: Facts | None = None, **limits: float) -> bool:
    return decide(made, Limits(**limits), facts).promoted


def test_without_a_tolerance_a_challenger_must_be_better_beyond_chance() -> None:
    assert promoted(outcomes(lost=5, won=25))
    assert reason(outcomes(5, 25)).startswith("better: top-1 99.50% against 97.50%, +2.0 points")
    assert not promoted(outcomes(lost=10, won=15)), "more right than the champion, but that may be chance"
    assert reason(outcomes(10, 15)).startswith("not better beyond doubt: top-1")
    assert not promoted(outcomes(0, 0))
    assert reason(outcomes(0, 0)).startswith("not better: equal, top-1 100.00% against 100.00%")
    assert reason(outcomes(30, 3)).startswith("not better: top-1 97.00% against 99.70%")


def test_a_tolerance_is_a_margin_that_the_whole_interval_keeps() -> None:
    assert promoted(outcomes(3, 3), tolerance=0.01)
    assert "as good as registry.tolerance asks for" in reason(outcomes(3, 3), tolerance=0.01)
    assert not promoted(outcomes(12, 3), tolerance=0.01), "0.9 points less, and it may be more"
    assert not promoted(outcomes(3, 3, count=100), tolerance=0.01), "a hundred images cannot show it"


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (Facts(size=0.5), "equal within 1.00%, and it is smaller (50% of the bytes)"),
        (Facts(latency=Latency(0.6, 0.55, 0.7)), "equal within 1.00%, and it is faster (60% of the time)"),
        (Facts(gained=["fox"]), "equal within 1.00%, and it knows 1 class more"),
    ],
)
def test_of_equals_the_smaller_the_faster_or_the_one_of_more_classes_wins(facts: Facts, said: str) -> None:
    assert promoted(outcomes(2, 2), facts)
    assert reason(outcomes(2, 2), facts).startswith(said)
    assert not promoted(outcomes(8, 0), facts), "0.8 points less, beyond doubt: that is no equal"
    assert not promoted(outcomes(2, 2, count=100), facts), "too few images to call them equal"


def test_a_tenth_is_no_gain_where_rounds_differ_by_more() -> None:
    assert not promoted(outcomes(0, 0), Facts(latency=Latency(0.85, 0.6, 1.1)))
    assert not promoted(outcomes(0, 0), Facts(size=0.95))


def test_what_is_slower_is_refused_unless_a_budget_allows_it() -> None:
    better, slow = outcomes(5, 50), Latency(1.9, 1.8, 2.0)
    assert not promoted(better, Facts(latency=slow))
    assert promoted(better, Facts(latency=slow), latency_tolerance=1.0)
    assert promoted(better, Facts(latency=slow, budget_ms=10, p50_ms=8))
    over = decide(better, Limits(), Facts(budget_ms=10, p50_ms=11))
    assert [refusal.rule for refusal in over.refusals] == ["registry.latency"]
    assert "over benchmark.latency_budget_ms, 10 ms" in over.reason
    equal = Facts(latency=Latency(1.3, 1.2, 1.4))
    assert not promoted(outcomes(2, 2), equal, tolerance=0.01), "no better, and slower by a third"
    assert promoted(better, equal)


def test_no_class_may_be_lost_however_much_is_gained() -> None:
    champion, challenger = np.zeros(1000, bool), np.ones(1000, bool)
    classes = np.array([f"class {row % 10}" for row in range(1000)])
    lost = classes == "class 4"
    champion[lost], challenger[lost] = True, False
    decision = decide(Outcomes(classes, champion, challenger), Limits(tolerance=0.5))
    assert not decision.promoted
    assert decision.reason.startswith(
        "not better: it loses recall of class 'class 4': 0.0%, the champion's 100"
    )
    assert (decision.refusals[0].rule, decision.refusals[0].subject) == ("registry.class", "class 'class 4'")
    assert decision.rows[0].worse


def test_chance_losses_of_a_class_are_no_reason_and_great_ones_are() -> None:
    """Ten classes of 100 images: five losses of one class are likely somewhere, fifteen are not."""
    gains = np.array([row for row in range(500, 700) if row % 10 != 3])

    def with_losses(lost: int) -> bool:
        champion, challenger = np.ones(1000, bool), np.ones(1000, bool)
        champion[gains] = False
        challenger[np.arange(lost) * 10 + 3] = False
        return promoted(Outcomes(np.array([f"c{row % 10}" for row in range(1000)]), champion, challenger))

    assert with_losses(5)
    assert not with_losses(15)


def test_rare_classes_are_judged_together() -> None:
    """All classes of ten images are lost, and the common one gains: the sum is better, the model is not."""
    names = np.array(["common"] * 900 + [f"rare {row // 10}" for row in range(100)])
    champion, challenger = np.arange(1000) >= 300, np.arange(1000) < 900
    decision = decide(Outcomes(names, champion, challenger), Limits())
    assert decision.difference.low > 0
    assert not decision.promoted
    assert "class: 10 values of fewer than 30 images" in decision.reason
    assert decision.few == [f"rare {row}" for row in range(10)]


def test_a_class_that_the_challenger_does_not_know_is_no_gain_for_anyone() -> None:
    assert not promoted(outcomes(0, 100), Facts(lost=["dog", "cat"]))
    assert reason(outcomes(0, 100), Facts(lost=["dog", "cat"])).startswith(
        "not better: it does not know class 'dog' and 1 more of the champion's classes"
    )


def test_without_an_image_nothing_is_decided() -> None:
    nothing = decide(Outcomes(np.array([]), np.zeros(0, bool), np.zeros(0, bool)), Limits(tolerance=1.0))
    assert not nothing.promoted
    assert "not comparable" in nothing.reason


def test_one_class_alone_can_be_judged() -> None:
    champion, challenger = np.arange(500) >= 40, np.arange(500) >= 5
    assert promoted(Outcomes(np.array(["only"] * 500), champion, challenger))


def test_images_of_one_group_are_one_witness() -> None:
    """Twenty gains of four patients tell less than twenty of twenty: here, nothing."""
    groups = np.arange(1000)
    assert promoted(outcomes(0, 20, groups=groups))
    groups = groups // 5
    assert promoted(outcomes(0, 80, groups=groups))
    assert not promoted(outcomes(0, 20, groups=groups // 4))
    assert not promoted(outcomes(0, 200, groups=np.zeros(1000, int))), "one group: others may differ"


def test_a_loss_in_dark_images_is_found() -> None:
    rng = np.random.default_rng(1)
    brightness = rng.uniform(0, 255, 2000)
    champion, challenger = rng.random(2000) < 0.7, rng.random(2000) < 0.95
    dark = brightness < 40
    champion[dark], challenger[dark] = True, rng.random(dark.sum()) < 0.6
    classes = rng.integers(0, 10, 2000).astype(str)
    decision = decide(Outcomes(classes, champion, challenger, columns={"brightness": brightness}), Limits())
    assert decision.difference.low > 0
    assert decision.refusals[0].rule == "registry.slice"
    assert any(row.worse and row.column == "brightness" for row in decision.rows)


def test_a_loss_that_no_column_names_alone_is_searched_for() -> None:
    """Small images of one class, a twentieth of all: each half of them is enough to see it."""
    rng = np.random.default_rng(2)
    side, classes = rng.integers(20, 200, 4000).astype(float), rng.integers(0, 4, 4000).astype(str)
    champion, challenger = rng.random(4000) < 0.7, rng.random(4000) < 0.97
    hit = (side < 56) & (classes == "2")
    champion[hit], challenger[hit] = True, False
    named = decide(Outcomes(classes, champion, challenger, columns={"side": side}), Limits())
    assert any(row.worse and row.column == "found" and "2" in row.name for row in named.rows)


def test_a_search_through_chance_finds_nothing() -> None:
    """Equal models, many columns: what a search finds in one half is not there in the other."""
    worse = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        columns = {f"column {number}": rng.random(600) for number in range(5)}
        champion, challenger = rng.random(600) < 0.8, rng.random(600) < 0.8
        made = Outcomes(rng.integers(0, 5, 600).astype(str), champion, challenger, columns=columns)
        worse += any(row.worse for row in decide(made, Limits(class_tolerance=0.0), seed=seed).rows)
    assert worse <= 5, "5 % of 40 are two; more than five have a chance of 1.4 %"


def test_new_images_do_not_outvote_the_champions_own() -> None:
    frozen = np.arange(1000) < 600
    made = outcomes(30, 0, frozen=frozen)
    made.champion[700:900] = False
    decision = decide(made, Limits())
    assert decision.difference.low > 0
    assert [refusal.rule for refusal in decision.refusals] == ["registry.frozen"]


def test_corrected_chances_are_those_of_closed_testing() -> None:
    """Holm is Bonferroni closed: the greatest Bonferroni p of all sets that an hypothesis is in."""
    for seed in range(20):
        chances = np.random.default_rng(seed).random(5) ** 3
        sets = [set(chosen) for size in range(1, 6) for chosen in combinations(range(5), size)]
        closed = [
            max(min(1.0, len(one) * min(chances[place] for place in one)) for one in sets if own in one)
            for own in range(5)
        ]
        assert holm(list(chances)) == pytest.approx(closed)
    assert holm([]) == []


def test_what_became_of_a_version_in_one_line() -> None:
    assert line(1, "champion", 1, FIRST) == "v1, champion because it is the first: nothing to compare with"
    assert line(2, "champion", 2, "better: a") == "v2, champion: better: a"
    assert line(2, "challenger", 1, "not better: a") == "v2, challenger (champion stays v1): not better: a"
    assert line(2, "", 3, "") == "v2, neither champion nor challenger (champion is v3)"

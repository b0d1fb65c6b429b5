"""The rules by which a challenger becomes champion."""

from __future__ import annotations

from components.registry.compare import FIRST, compare, reason
from components.registry.compare import verdict as line

IMAGES = {"cat": 100, "dog": 100, "owl": 4}
CHAMPION = {"cat": 0.9, "dog": 0.8, "owl": 1.0}


def verdict(challenger: dict[str, float], tolerance: float = 0.0, class_tolerance: float = 0.05) -> bool:
    return compare(CHAMPION, challenger, IMAGES, tolerance, class_tolerance).better


def test_a_tie_is_not_better_unless_a_tolerance_says_so() -> None:
    assert not verdict(CHAMPION)
    assert not verdict({"cat": 0.8, "dog": 0.9, "owl": 1.0}, tolerance=0.0), "equal in all, not by class"
    assert verdict(CHAMPION, tolerance=0.01)
    assert verdict({**CHAMPION, "dog": 0.81})
    assert not verdict({**CHAMPION, "dog": 0.79})
    assert verdict({**CHAMPION, "dog": 0.79}, tolerance=0.01)


def test_the_reason_says_better_only_of_what_is() -> None:
    def said(challenger: dict[str, float], tolerance: float = 0.0) -> str:
        return reason(compare(CHAMPION, challenger, IMAGES, tolerance, 0.05))

    assert said(CHAMPION) == "not better: equal, top-1 85.29% against 85.29%"
    assert said({**CHAMPION, "dog": 0.81}) == "better: top-1 85.78% against 85.29%"
    assert said({**CHAMPION, "dog": 0.79}) == "not better: top-1 84.80% against 85.29%"
    assert said({**CHAMPION, "dog": 0.79}, 0.01).startswith("as good as registry.tolerance asks for")
    assert said({**CHAMPION, "cat": 1.0, "dog": 0.7}).startswith("not better: it loses recall of 'dog'")
    grown = compare(CHAMPION, {**CHAMPION, "fox": 0.5}, {**IMAGES, "fox": 50}, 0.0, 0.05)
    assert reason(grown).startswith("equal on the classes that both know, and it knows 1 more")


def test_what_became_of_a_version_in_one_line() -> None:
    assert line(1, "champion", 1, FIRST) == "v1, champion because it is the first: nothing to compare with"
    assert line(2, "champion", 2, "better: a") == "v2, champion: better: a"
    assert line(2, "challenger", 1, "not better: a") == "v2, challenger (champion stays v1): not better: a"
    assert line(2, "", 3, "") == "v2, neither champion nor challenger (champion is v3)"


def test_models_without_a_class_in_common_are_not_compared() -> None:
    other = compare({"a": 1.0}, {"b": 1.0}, {"b": 50}, 0.0, 0.05)
    assert not other.better
    assert "not comparable" in reason(other)


def test_a_class_may_lose_no_more_than_its_tolerance() -> None:
    assert verdict({"cat": 0.85, "dog": 0.95, "owl": 1.0})
    assert not verdict({"cat": 0.84, "dog": 0.95, "owl": 1.0})


def test_a_class_with_few_images_is_not_judged_alone() -> None:
    few = compare(CHAMPION, {"cat": 0.95, "dog": 0.8, "owl": 0.25}, IMAGES, 0.0, 0.05)
    assert few.better
    assert [(row.name, row.judged) for row in few.rows] == [("owl", False), ("dog", True), ("cat", True)]


def test_new_classes_are_welcome_and_lost_ones_are_not() -> None:
    grown = compare(CHAMPION, {**CHAMPION, "fox": 0.1}, {**IMAGES, "fox": 50}, 0.0, 0.05)
    assert grown.better
    assert not compare(CHAMPION, {**CHAMPION, "fox": 0.1}, IMAGES, 0.0, 0.05).better, "none of it has images"
    assert grown.champion == grown.challenger, "top-1 is taken over the classes that both know"
    assert not verdict({"cat": 1.0, "owl": 1.0})

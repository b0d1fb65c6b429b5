"""The rules by which a challenger becomes champion."""

from __future__ import annotations

from components.registry.compare import compare

IMAGES = {"cat": 100, "dog": 100, "owl": 4}
CHAMPION = {"cat": 0.9, "dog": 0.8, "owl": 1.0}


def verdict(challenger: dict[str, float], tolerance: float = 0.0, class_tolerance: float = 0.05) -> bool:
    return compare(CHAMPION, challenger, IMAGES, tolerance, class_tolerance).better


def test_as_good_is_good_enough_and_lower_is_not() -> None:
    assert verdict(CHAMPION)
    assert not verdict({**CHAMPION, "dog": 0.79})
    assert verdict({**CHAMPION, "dog": 0.79}, tolerance=0.01)


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
    assert grown.champion == grown.challenger, "top-1 is taken over the classes that both know"
    assert not verdict({"cat": 1.0, "owl": 1.0})

"""What would help most: told from what was measured; real trainings with planted causes are told apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from components.common.page import Page
from components.training import advice
from components.training.advice import Asked, Facts


def asked(recall: float, classes: int = 10, images: int = 100) -> Asked:
    """Of each class as many are recognised; it is unsure about the others."""
    actual = np.repeat(np.arange(classes), images)
    wrong = np.tile(np.arange(images) >= recall * images, classes)
    return Asked(actual, np.where(wrong, (actual + 1) % classes, actual), np.where(wrong, 0.5, 0.9))


def known(reached: float, fitted: float, recalls: list[float] | None = None, **more: Any) -> Facts:
    rows = [
        {"epoch": i, "val_macro_recall": recall, "val_loss": 1.0, "train_top1": recall}
        for i, recall in enumerate(recalls or [reached] * 8)
    ]
    names = [f"class {i}" for i in range(10)]
    values: dict[str, Any] = {"counts": np.full(10, 100), "steps": 1000, "rate": 0.02, "usual": 0.025} | more
    return Facts("teacher", rows, asked(reached), asked(fitted), names, **values)


def first(facts: Facts) -> str:
    return next((one.cause for one in advice.advise(facts)), "")


def test_what_is_perfect_needs_no_advice() -> None:
    assert advice.advise(known(1.0, 1.0)) == []


@pytest.mark.parametrize(
    ("facts", "cause"),
    [
        (known(0.6, 1.0), "more labels"),
        (known(0.6, 1.0, pool=5000), "unlabelled images"),
        (known(0.6, 1.0, pool=5000, used=1000), "more labels"),
        (known(0.5, 0.5, [0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5], steps=200), "more epochs"),
        (known(0.5, 0.5, steps=10_000), "larger network"),
        (known(0.5, 0.5, rate=1e-6), "rate too low"),
    ],
)
def test_the_first_advice_is_what_the_numbers_say(facts: Facts, cause: str) -> None:
    assert first(facts) == cause


def test_it_is_said_in_the_report_on_the_page_and_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    found: list[dict[str, Any]] = []
    page = Page()

    def find(rule: str, level: str, subject: str, message: str, **values: Any) -> None:
        found.append({"rule": rule, "level": level, "message": message, **values})

    run: Any = SimpleNamespace(name="finetune", find=find, page=page)
    advice.tell(run, known(0.6, 1.0))
    assert found[0]["rule"] == "train.advice"
    assert found[0]["level"] == "info"
    assert "macro recall 60.0% on validation, 100.0% on images it learnt from" in found[0]["message"]
    assert "more labels, twice as many first of class" in capsys.readouterr().err
    assert page.sections[0]["title"] == "What would help the teacher most"

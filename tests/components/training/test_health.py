"""When training makes no sense any more, and which epoch is kept."""

from typing import Any

import numpy as np
import pytest

from components.training import health


def row(loss: float, top1: float, recall: float | None = None) -> dict[str, Any]:
    return {"val_loss": loss, "val_top1": top1, "val_macro_recall": top1 if recall is None else recall}


@pytest.mark.parametrize(
    ("first", "loss", "top1", "flat"),
    [
        (2.303, 2.301, 0.1, True),  # stuck at ln 10, guessing
        (2.303, 2.301, 0.5, False),  # it recognises half of them: it learns
        (2.303, 1.5, 0.1, False),  # the loss moves
        (4.5, 4.0, 0.1, False),  # far above guessing, but on its way
        (1.9, 1.9, 0.1, False),  # better than naming every class's share
        (4.1, 4.3, 0.1, True),  # worse than guessing, and it stays there
        (0.02, 0.02, 0.99, False),  # nothing left to learn
    ],
)
def test_flat_means_no_better_than_guessing(first: float, loss: float, top1: float, flat: bool) -> None:
    assert health.looks_flat(first, row(loss, top1), np.arange(100) % 10) is flat


def test_a_rare_class_that_is_told_apart_is_no_flat_loss_however_close_top1_is_to_guessing() -> None:
    labels = np.repeat([0, 1], [95, 5])
    told_apart = row(0.21, 0.93, recall=0.5 * (90 / 95 + 3 / 5))  # 90 of 95, and 3 of 5
    assert not health.looks_flat(0.2, told_apart, labels)
    assert health.looks_flat(0.2, row(0.21, 0.95, recall=0.5), labels), "all of them called the large class"


@pytest.mark.parametrize(
    ("top1s", "epochs", "steps", "stops"),
    [
        ([0.1], 3, 40, False),  # the second epoch must show something
        ([0.1, 0.1], 3, 40, True),
        ([0.1, 0.1], 10, 2, False),  # four steps on a small data set
        ([0.6, 0.1], 10, 40, False),  # it learnt; one bad epoch
        ([0.6, 0.1], 2, 40, True),  # ... that is the last
        ([0.1], 1, 2, True),
    ],
)
def test_training_stops_when_it_is_past_hope(
    top1s: list[float], epochs: int, steps: int, stops: bool
) -> None:
    rows = [row(4.0 + epoch, top1) for epoch, top1 in enumerate(top1s)]
    assert health.learns_nothing(rows, epochs, steps, np.arange(100) % 10) is stops


def test_the_epoch_with_the_highest_macro_recall_is_kept_and_of_equals_the_surest() -> None:
    better = health.Choice.better
    assert better(row(1.0, 0.5), None)
    assert better(row(2.0, 0.4, recall=0.6), row(1.0, 0.9, recall=0.5)), "top-1 does not decide"
    assert better(row(0.9, 0.5), row(1.0, 0.5))
    assert not better(row(1.0, 0.5), row(1.0, 0.5)), "the first of two alike"


@pytest.mark.parametrize(
    ("recalls", "ends"),
    [([0.5, 0.6, 0.6], False), ([0.5, 0.4, 0.4], True), ([0.5, 0.4, 0.6, 0.5], False), ([0.5], False)],
)
def test_a_phase_ends_after_so_many_epochs_without_a_better_one(recalls: list[float], ends: bool) -> None:
    rows = [row(1.0, recall) for recall in recalls]
    assert health.Choice(2).ends(rows) is ends
    assert not health.Choice(None).ends(rows)

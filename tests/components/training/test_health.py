"""When training makes no sense any more, and which epoch is kept."""

from typing import Any

import numpy as np
import pytest

from components.training import health, losses
from components.training.losses.focal import Focal
from components.training.watch import Sums


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


# --- within an epoch --------------------------------------------------------------------------------------

TEN = health.Guessing(0.1, 2.3026)


def watched(values: list[float], tops: list[float], ratio: float = 1.0, guessing: Any = TEN) -> int | None:
    """The step, of 32 images each, at which something is found; None: never."""
    pulse = health.Pulse(guessing, ratio, warmup=10)
    for step, (loss, top1) in enumerate(zip(values, tops, strict=True), 1):
        if pulse(1, Sums(32 * loss, 32 * top1, 32, 32)):
            return step
    return None


def test_a_loss_that_explodes_is_found_within_twenty_steps_of_it() -> None:
    assert watched([2.4] * 20 + [60.0] * 40, [0.1] * 60) in range(21, 41)
    assert watched([2.4] * 60, [0.1] * 60) is None
    assert watched([0.2] * 30 + [0.5] * 30, [0.95] * 60) is None, "a trained network, disturbed for a while"
    assert watched([0.2] * 30 + [9.0] * 30, [0.95] * 30 + [0.11] * 30) is not None, "... and destroyed"


def test_a_network_at_chance_above_what_guessing_costs_went_astray() -> None:
    assert watched([2.6, 2.7] * 100, [0.1] * 200) == 110, "a hundred steps after the warm-up"
    assert watched([2.6, 2.7] * 100, [0.14] * 200) is None, "some images are recognised"


def test_a_slow_start_is_none() -> None:
    plateau = [2.303, 2.302] * 300
    assert watched(plateau, [0.1] * 600) is None
    assert watched(plateau, [0.1] * 600, ratio=50) is not None, "at fifty times the usual rate it is no start"
    falling = [4.0 - 1.5 * step / 600 for step in range(600)]
    assert watched(falling, [0.1] * 600, ratio=50) is None
    many = health.Guessing(0.001, 6.9078)
    assert watched([7.2 - step / 1500 for step in range(400)], [0.001] * 400, guessing=many) is None
    rare = health.Guessing(0.95, 0.1985)
    assert watched([0.24, 0.22] * 200, [0.95] * 400, guessing=rare) is None, "most are of the large class"


def test_what_guessing_costs_is_worked_out_with_the_plans_own_loss() -> None:
    shares = np.array([0.5, 0.25, 0.25])
    assert health.guessing(losses.CrossEntropy(), shares).loss == pytest.approx(1.5 * np.log(2), abs=1e-3)
    focal = health.guessing(Focal(2.0), np.full(4, 0.25))
    assert focal.loss == pytest.approx(0.75**2 * np.log(4), rel=1e-5)
    assert health.guessing(None, shares) == health.Guessing(0.5, None)
    assert health.guessing(losses.CrossEntropy(), np.full(100_000, 1e-5)).loss == pytest.approx(
        11.513, abs=1e-3
    )


def setting(**more: Any) -> health.Setting:
    values: dict[str, Any] = {
        "who": "teacher", "optimizer": "sgd", "rate": 0.02, "usual": 0.025, "images": 64, "warmup": 0.5,
        "clip": None, "loaded": True, "half": False, "augment": "light",
    }  # fmt: skip
    return health.Setting(**{**values, **more})


@pytest.mark.parametrize(
    ("change", "finite", "first"),
    [
        ({"rate": 1.298}, True, "(1) the rate: 1.298 is 52 times as high as usual"),
        ({"rate": 1e-5}, True, "(1) the rate: 1e-05 is very low"),
        ({"warmup": 0.0}, True, "(1) no warm-up"),
        ({"loaded": False}, True, "(1) no trained weights"),
        ({}, False, "(1) single large gradients"),
        ({"clip": 1.0, "half": True}, False, "(1) bf16"),
    ],
)
def test_likely_causes_are_said_in_order(change: dict[str, Any], finite: bool, first: str) -> None:
    assert setting(**change).causes(finite).startswith(f"Likely causes, in order: {first}")


def test_rates_go_with_the_batch_as_they_are_published() -> None:
    assert health.usual_rate("sgd", 64) == pytest.approx(0.025)
    assert health.usual_rate("adamw", 1024) == pytest.approx(1e-3)
    assert health.usual_rate("adamw", 64) == pytest.approx(2.5e-4), "with the square root"

"""The parts of the training loop that need no cluster."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from components.audit.plan import Plan, read_plan
from components.models.params import LearningRate, Optimizer
from components.training import driver, engine
from components.training.distill import labelled_rate
from components.training.params import Distill, DistillParams


def test_cosine_rises_then_falls_to_zero() -> None:
    lr = LearningRate(initial=0.1, schedule="cosine")
    rates = [engine.rate(lr, step, 101, 4) for step in range(101)]
    assert rates[:4] == pytest.approx([0.02, 0.04, 0.06, 0.08])
    assert max(rates) == rates[4] == 0.1
    assert rates[-1] < 0.001
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize(
    ("asked", "epochs", "given"), [(0.5, 1, 0.5), (5.0, 1, 0.5), (0.5, 4, 0.5), (0.0, 1, 0.0)]
)
def test_the_short_finetune_warms_up_anew_and_for_half_of_it_at_most(
    asked: float, epochs: int, given: float
) -> None:
    long = LearningRate(initial=0.002, warmup_epochs=asked)
    short = labelled_rate(long, Distill(finetune_epochs=epochs, finetune_lr=0.1))
    assert short.initial == pytest.approx(0.0002)
    assert short.warmup_epochs == given
    steps = 20 * epochs
    rates = [engine.rate(short, step, steps, 20 * short.warmup_epochs) for step in range(steps)]
    assert max(rates) == pytest.approx(short.initial, rel=0.1)
    assert rates[-1] < short.initial / 10  # it comes down again within the phase
    assert (rates[0] < short.initial / 5) == (given > 0)


def test_step_and_constant_schedules() -> None:
    step = LearningRate(initial=1.0, schedule="step")
    assert [engine.rate(step, at, 90, 0) for at in (0, 29, 31, 59, 61, 89)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    assert engine.rate(LearningRate(initial=0.3, schedule="constant"), 80, 90, 0) == 0.3


def test_weight_decay_spares_biases_and_norms() -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    decayed, spared = engine.make_optimizer(module, Optimizer(weight_decay=0.1)).param_groups
    assert [p.ndim for p in decayed["params"]] == [4]
    assert decayed["weight_decay"] == 0.1
    assert len(spared["params"]) == 3
    assert spared["weight_decay"] == 0.0


def test_a_row_drawn_again_is_counted() -> None:
    assert engine.occurrence(np.array([5, 3, 5, 5, 3, 8])).tolist() == [0, 0, 1, 2, 1, 0]


def test_macro_recall_is_the_mean_over_classes_that_occur() -> None:
    actual, predicted = np.array([0, 0, 0, 0, 2]), np.array([0, 0, 0, 1, 1])
    assert engine.macro_recall(actual, predicted) == pytest.approx((0.75 + 0) / 2)


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
    labels = np.arange(100) % 10
    assert engine.looks_flat(first, loss, top1, labels) is flat


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
    rows = [{"val_loss": 4.0 + epoch, "val_top1": top1} for epoch, top1 in enumerate(top1s)]
    assert engine.learns_nothing(rows, epochs, steps, np.arange(100) % 10) is stops


def test_batch_norms_forget_other_images_within_few_steps() -> None:
    few, many = (torch.nn.Sequential(torch.nn.BatchNorm2d(1)).train() for _ in range(2))
    engine.forget_within(few, 5)
    engine.forget_within(many, 500)
    for _ in range(5):
        few(torch.full((2, 1, 1, 1), 100.0))
    assert float(few[0].running_mean) == pytest.approx(100, rel=0.002)
    assert many[0].momentum == 0.1, "long trainings are as they were"


def make_job(data: SimpleNamespace, params: DistillParams, start: Path | None) -> engine.Job:
    return driver.make_job(
        params, params.teacher, params.ray, params.data, data.manifest, read_plan(data.plan), start,
        (engine.Phase("finetune", "teacher", 3, params.teacher.lr),),
    )  # fmt: skip


def test_checkpoints_belong_to_exactly_one_job(
    data: SimpleNamespace, params: DistillParams, weights: Path
) -> None:
    job = make_job(data, params, weights / "teacher.safetensors")
    assert make_job(data, params, weights / "teacher.safetensors").key() == job.key()
    others = [
        replace(job, seed=4),
        replace(job, start=None),
        replace(job, workers=3),
        replace(job, plan=Plan()),
        replace(job, optimizer=Optimizer(momentum=0.8)),
        replace(job, phases=(engine.Phase("finetune", "teacher", 4, params.teacher.lr),)),
    ]
    assert len({job.key(), *(other.key() for other in others)}) == len(others) + 1


def test_the_same_seed_gives_the_same_network(
    data: SimpleNamespace, params: DistillParams, weights: Path
) -> None:
    def head(seed: int, start: Path | None) -> list[torch.Tensor]:
        return list(engine.create_network(params.student.arch, 4, start, seed).state_dict().values())

    start = weights / "student.safetensors"
    torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(head(1, start), head(1, start), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(head(1, start), head(2, start), strict=True))

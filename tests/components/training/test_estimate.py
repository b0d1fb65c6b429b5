"""Estimates: of what, not how long (tests assert no times)."""

import pytest
import torch

from components.common.errors import RetortError
from components.training import estimate
from components.training.estimate import START_SECONDS, Speed
from tests.components.training.conftest import ARCH, SIZE


def test_a_network_is_measured_as_it_trains() -> None:
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    speed = estimate.measure(ARCH, SIZE, 4, 1, budget=0.5)
    assert speed.training > 0
    assert speed.inference > 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state), "no random number of a person's is taken"


def test_an_unknown_network_is_named() -> None:
    with pytest.raises(RetortError, match="efficientnet_lite9"):
        estimate.measure("efficientnet_lite9", SIZE, 4, 1)


def test_one_step_is_timed_however_long_it_is() -> None:
    taken: list[int] = []
    estimate._step_seconds(lambda: taken.append(1), budget=0.0)
    assert taken == [1, 1], "one to warm up"
    taken.clear()
    estimate._step_seconds(lambda: taken.append(1), budget=60.0)
    assert len(taken) == 1 + estimate.MOST_STEPS


def test_all_the_work_of_a_run_is_counted() -> None:
    common = {"training": 1000, "validation": 200, "test": 100, "teacher_epochs": 5, "student_epochs": 4}
    speeds = {"teacher": Speed(100, 300), "student": Speed(200, 600)}
    alone = estimate.seconds(**common, **speeds, crops=2, finetune_epochs=1, control=False)
    assert alone["finetune"] == pytest.approx(START_SECONDS + 5 * (10 + 200 / 300) + 1)
    assert alone["check"] == pytest.approx(200 / 300)
    student = 5 * (5 + 200 / 600) + 300 / 600
    assert alone["distill"] == pytest.approx(START_SECONDS + 2000 / 300 + student)

    beside = estimate.seconds(**common, **speeds, crops=2, finetune_epochs=1, control=True)
    assert beside["distill"] == alone["distill"]
    assert beside["check"] - alone["check"] == pytest.approx(START_SECONDS + student), "the control"

    fed = estimate.seconds(**common, **speeds, crops=2, finetune_epochs=1, control=False, gpu=True)
    started = estimate.GPU_START_SECONDS - START_SECONDS
    assert fed["finetune"] - alone["finetune"] == pytest.approx(started)

    more = estimate.seconds(**common, **speeds, crops=2, control=False, unlabelled=600, chosen=100)
    extra = (600 + 2 * 100) / 300 + 4 * 100 / 200
    assert more["distill"] - alone["distill"] == pytest.approx(extra), "the pool is asked once, too"

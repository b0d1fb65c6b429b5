"""A worker that stalls is found and named; one that is slow, or lost, is not taken for one."""

from __future__ import annotations

from typing import Any

import pytest

from components.common.errors import RetortError
from components.training.stall import Stall


class Job:
    """Workers that say what they do, at times that a test sets."""

    def __init__(self, minutes: float = 10, workers: int = 2) -> None:
        self.now = 1000.0
        self.stall = Stall(minutes, lambda: self.now)
        self.doing: dict[int, dict[str, Any]] = {}
        self.since: dict[int, float] = {}
        for rank in range(workers):
            self.at(rank, "starting")

    def at(self, rank: int, what: str, usual: float | None = None) -> None:
        count = self.doing[rank]["count"] + 1 if rank in self.doing else 0
        self.doing[rank] = {
            "rank": rank,
            "node": f"node-{rank}",
            "what": what,
            "usual": usual,
            "count": count,
        }
        self.since[rank] = self.now

    def pass_time(self, seconds: float, silent: tuple[int, ...] = ()) -> None:
        for _ in range(int(seconds / 5)):
            self.now += 5
            for rank, event in self.doing.items():
                if rank not in silent:
                    self.stall.hear({**event, "age": self.now - self.since[rank]})
            self.stall.need_moving()


def test_a_worker_that_waits_for_its_images_is_named_and_so_are_those_that_wait_for_it() -> None:
    job = Job()
    for step in range(5):
        for rank in (0, 1):
            job.at(rank, f"finetune, epoch 2, step {step}: images", 1.0)
            if (step, rank) != (4, 1):
                job.at(rank, f"finetune, epoch 2, step {step}: results", 1.0)
        job.pass_time(5)
    with pytest.raises(RetortError) as caught:
        job.pass_time(3600)
    assert caught.value.rule == "train.stalled"
    assert "worker 1 on node-1 stalled: at 'finetune, epoch 2, step 4: images' for 10 min" in str(
        caught.value
    )
    assert "and 1 other waits for it (ray.stall_minutes: 10)" in str(caught.value)
    assert "the same command goes on from there" in str(caught.value)
    assert job.now < 1000 + 660, "not after hours"


def test_slow_steps_are_no_stall_and_neither_is_what_may_take_long() -> None:
    job = Job()
    job.pass_time(3000)  # decoding
    for rank in (0, 1):
        job.at(rank, "a step", 120.0)
    job.pass_time(2000)
    with pytest.raises(RetortError, match="all 2 workers stalled: at 'a step' for 40 min"):
        job.pass_time(1000)


def test_those_that_wait_while_another_decodes_have_not_stalled() -> None:
    """Worker 1 waits for the pictures that worker 0 decodes, for hours."""
    job = Job()
    for part in range(30):
        job.at(0, f"decoding images, {256 * part:,} of 20,000,000")
        job.pass_time(600)
    job.pass_time(3000)
    with pytest.raises(RetortError, match=r"stalled: .*\(ray.stall_minutes: 10\)"):
        job.pass_time(1000)  # now nobody gets on


def test_a_worker_that_is_frozen_says_nothing() -> None:
    job = Job()
    for rank in (0, 1):
        job.at(rank, "a step", 1.0)
    job.pass_time(60)
    with pytest.raises(
        RetortError, match=r"worker 1 on node-1 stalled.* and not answering, and 1 other waits"
    ):
        for step in range(300):
            job.at(0, f"step {step}", 1.0) if step < 3 else None
            job.pass_time(5, silent=(1,))


def test_workers_that_are_replaced_have_not_stalled() -> None:
    job = Job()
    for rank in (0, 1):
        job.at(rank, "a step", 1.0)
    job.pass_time(60)
    job.pass_time(7200, silent=(0, 1))  # a node is lost, and the cluster has no other one for hours
    job.doing.clear()
    job.at(0, "starting")
    job.pass_time(20)
    job.at(1, "starting")
    job.pass_time(600)


def test_one_worker_alone() -> None:
    job = Job(minutes=1, workers=1)
    job.at(0, "a step", 0.1)
    with pytest.raises(RetortError, match=r"the worker on node-0 stalled: at .a step. for 1 min \(ray.stall"):
        job.pass_time(100)

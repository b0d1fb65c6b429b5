"""Batches, whatever the way they come: the same bytes, in order, in every epoch; faults as what they are."""

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import psutil
import pytest
import torch

from components.common.errors import ChangedError, RetortError
from components.dataset import images
from components.training.augmentation import NO_AUGMENT, Augment
from components.training.inputs.feed import Feed, Way, open_feed, shm_needed
from components.training.inputs.index import open_index
from components.training.inputs.pictures import Part, open_store
from components.training.sampling import Draw

SIZE = 32
CPU = torch.device("cpu")
WAYS: tuple[Way, ...] = get_args(Way)
DECODED = ("card", "memory", "processes")
IN_THE_STEP = ("memory", "threads")  # on a CPU


def part(data: SimpleNamespace, way: str, source: str = "square", split: str = "train") -> Part:
    limit = None if way in DECODED else 0
    store = open_store(open_index(data.manifest), data.root, SIZE, source, limit=limit)  # type: ignore[arg-type]
    return store.part(split)


def feed(of: Part, way: str, recipe: str = "flip") -> Feed:
    return open_feed(of, Augment(recipe, 7, SIZE), CPU, 2 if way == "processes" else 0, threads=2, way=way)  # type: ignore[arg-type]


def draws(of: Part, epoch: int, sizes: Sequence[int] = (5, 3, 7, 1)) -> list[Draw]:
    rng = np.random.default_rng(epoch)
    return [
        Draw(rng.choice(of.rows, size).astype(np.int64), rng.integers(NO_AUGMENT, 3, size), 2 * size)
        for size in sizes
    ]


def test_every_way_gives_the_same_bytes(data: SimpleNamespace) -> None:
    for recipe, source in (("flip", "square"), ("standard", "canvas"), ("none", "square")):
        expected: list[torch.Tensor] = []
        for way in WAYS:
            of = part(data, way, source)
            with feed(of, way, recipe) as batches:
                for epoch in range(2):
                    wanted = draws(of, epoch)
                    found = list(batches(wanted))
                    assert [batch.draw for batch in found] == wanted
                    assert all(batch.pixels.shape == (len(batch.draw.rows), 3, SIZE, SIZE) for batch in found)
                    assert all(batch.pixels.dtype == torch.uint8 for batch in found)
                    expected += [batch.pixels for batch in found] if way == WAYS[0] else []
                    same = expected[epoch * len(wanted) :]
                    for batch, pixels in zip(found, same, strict=False):
                        assert torch.equal(batch.pixels, pixels), (recipe, way)


def test_pictures_that_are_judged_are_those_of_production(data: SimpleNamespace) -> None:
    for way in WAYS:
        of = part(data, way, "canvas", "val")
        rows = of.rows.astype(np.int64)
        with feed(of, way, "standard") as batches:
            (batch,) = batches([Draw(rows, np.full(len(rows), NO_AUGMENT), len(rows))])
            for pixels, row in zip(batch.pixels, rows.tolist(), strict=True):
                expected = images.load_rgb(data.root, data.paths[row], SIZE).transpose(2, 0, 1)
                assert np.array_equal(pixels.numpy(), expected)


def test_the_way_is_chosen_by_what_there_is(data: SimpleNamespace) -> None:
    said: list[str] = []

    def chosen(of: str, num_workers: int) -> str:
        augment = Augment("none", 7, SIZE)
        open_feed(part(data, of), augment, CPU, num_workers, threads=2, say=said.append).close()
        return said.pop()

    assert chosen("memory", 0) == "112 images of 32 px, 344.1 KB decoded, from a memory map, in the step"
    assert chosen("memory", 2) == "112 images of 32 px, from a memory map by 2 loader processes"
    assert chosen("threads", 0) == "112 images of 32 px, decoded by 2 threads in the step"
    assert chosen("threads", 1) == "112 images of 32 px, decoded by 1 loader process"


@pytest.mark.parametrize("way", WAYS)
def test_what_else_a_draw_needs_comes_with_it(data: SimpleNamespace, way: str) -> None:
    asked: list[str] = []

    def extra(draw: Draw) -> dict[str, np.ndarray]:
        asked.append(threading.current_thread().name)
        return {"row": draw.rows.copy(), "half": np.stack([draw.rows, draw.views], 1).astype(np.float16)}

    of = part(data, way)
    with feed(of, way) as batches:
        for batch in batches(draws(of, 0), extra):
            assert batch.extra["row"].tolist() == batch.draw.rows.tolist()
            assert batch.extra["half"].dtype == torch.float16
            assert batch.extra["half"].shape == (len(batch.draw.rows), 2)
    aside = {"MainThread"} if way in IN_THE_STEP else {"feed"}
    assert set(asked) == aside, "in the feeding thread, where there is one"


@pytest.mark.parametrize("way", [way for way in WAYS if way not in IN_THE_STEP])
def test_work_begins_before_the_first_batch_is_asked_for(data: SimpleNamespace, way: str) -> None:
    """So that validation is ready when the epoch's last step is done."""
    of, begun = part(data, way), threading.Event()

    def seen() -> Iterator[Draw]:
        for draw in draws(of, 0):
            begun.set()
            yield draw

    with feed(of, way) as batches:
        waiting = batches(seen())
        assert begun.wait(10)
        assert len(list(waiting)) == 4


def test_processes_stay_from_epoch_to_epoch(data: SimpleNamespace) -> None:
    of = part(data, "processes")

    def children() -> set[int]:
        return {child.pid for child in psutil.Process().children(recursive=True)}

    before = children()
    batches = feed(of, "processes")
    assert len(list(batches(draws(of, 0)))) == 4
    first = children() - before
    assert len(first) >= 2
    assert len(list(batches(draws(of, 1)))) == 4
    assert children() - before == first
    batches.close()
    assert not (children() - before) & first


@pytest.mark.parametrize("way", WAYS)
def test_an_epoch_that_is_left_half_way_does_not_disturb_the_next(data: SimpleNamespace, way: str) -> None:
    of = part(data, way)
    with feed(of, way) as batches:
        expected = [batch.pixels for batch in batches(draws(of, 1))]
        left = batches(draws(of, 0, [4] * 30))
        next(left)
        again = list(batches(draws(of, 1)))
        assert [batch.draw.rows.tolist() for batch in again] == [d.rows.tolist() for d in draws(of, 1)]
        assert all(torch.equal(a.pixels, b) for a, b in zip(again, expected, strict=True))
        assert next(left, None) is None or way in IN_THE_STEP
    assert not [thread for thread in threading.enumerate() if thread.name == "feed"], "no thread is left"


@pytest.mark.parametrize("way", ["threads", "processes"])
@pytest.mark.parametrize("fault", ["exchanged", "gone"])
def test_faults_reach_the_loop_as_what_they_are(data: SimpleNamespace, way: str, fault: str) -> None:
    of = part(data, "threads")
    good, bad = of.rows[:4].astype(np.int64), of.rows[4:8].astype(np.int64)
    path = Path(data.root) / data.paths[bad[1]]
    if fault == "exchanged":
        path.write_bytes((Path(data.root) / data.paths[bad[1] + 10]).read_bytes())
    else:
        path.unlink()
    with feed(of, way) as batches:
        found = batches([Draw(rows, np.zeros(4, np.int64), 4) for rows in (good, bad, good)])
        assert next(found).pixels.shape == (4, 3, SIZE, SIZE)
        if fault == "exchanged":
            with pytest.raises(ChangedError, match=rf"image\.changed: {data.paths[bad[1]]} ") as told:
                next(found)
            assert told.value.rule == "image.changed"
        else:
            with pytest.raises(RetortError, match=rf"{data.paths[bad[1]]}: .*run 'retort validate' again"):
                next(found)
        again = list(batches([Draw(good, np.zeros(4, np.int64), 4)]))
        assert len(again) == 1, "the feed goes on with what is whole"


@pytest.mark.parametrize("way", WAYS)
def test_what_the_draws_raise_reaches_the_loop(data: SimpleNamespace, way: str) -> None:
    of = part(data, way)

    def failing() -> Iterator[Draw]:
        yield draws(of, 0)[0]
        raise RetortError("no more rows")

    with feed(of, way) as batches, pytest.raises(RetortError, match="no more rows"):
        list(batches(failing()))


def test_a_loader_process_that_was_killed_is_named(data: SimpleNamespace) -> None:
    of = part(data, "processes")
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    batches = feed(of, "processes")
    found = batches(draws(of, 0, [4] * 200))
    next(found)
    for child in psutil.Process().children(recursive=True):
        if child.pid not in before:
            child.send_signal(signal.SIGKILL)
    with pytest.raises(RetortError, match=r"a loader process ended .*lower num_workers"):
        list(found)
    batches.close()


def test_a_feed_takes_nothing_from_torchs_random_stream(data: SimpleNamespace) -> None:
    """Dropout draws from it: a run that is resumed has to find it as it was."""
    of = part(data, "processes")
    with feed(of, "processes") as batches:
        torch.manual_seed(5)
        before = torch.get_rng_state()
        list(batches(draws(of, 0)))
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("way", ["memory", "threads"])
def test_waiting_is_counted(data: SimpleNamespace, way: str) -> None:
    of = part(data, way)

    def slow() -> Iterator[Draw]:
        for draw in draws(of, 0):
            time.sleep(0.05)
            yield draw

    with feed(of, way) as batches:
        waited = [batch.waited for batch in batches(slow())]
        assert min(waited) > 0
        assert sum(waited) > 0.9 * 0.05 * len(waited), "the loop did nothing else"
        assert batches.remedy.startswith("Set train.num_workers to some of the cores")


def test_shared_memory_that_loader_processes_need() -> None:
    # 2 workers x 4 processes x 4 batches (2 ready, one in work, one in use), each of 64 images
    assert shm_needed(224, 64, 4, 2) == 2 * 4 * 4 * 64 * 3 * 224 * 224
    assert shm_needed(224, 64, 0, 2) == 0

"""What an epoch draws: counts, order, and the split over workers."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.audit.plan_schema import LeaveOut, Plan, Sampling
from components.common.errors import RetortError
from components.dataset import manifest
from components.training import sampling
from components.training.inputs.index import Index


def table(rows: list[tuple[str, int, str, str]]) -> Index:
    columns = {name: [row[i] for row in rows] for i, name in enumerate(["path", "label", "split", "source"])}
    empty = {"bytes": [None] * len(rows), "sha256": [None] * len(rows)}
    fields = [manifest.SCHEMA.field(name) for name in (*columns, *empty)]
    return Index.from_table(pa.table({**columns, **empty}, schema=pa.schema(fields)))


def epochs(index: sampling.Columns, plan: Plan, unlabelled: list[int] | None = None, seed: int = 1,
           repeats: int = 1) -> sampling.Epochs:  # fmt: skip
    rows = sampling.training_rows(index, plan)
    weights = sampling.Weights(index, rows, plan)
    return sampling.Epochs(index, rows, weights, np.array(unlabelled or [], dtype=int), seed, repeats)


def drawn(made: sampling.Epochs, number: int = 0, size: int = 16, **how: bool) -> np.ndarray:
    draws = made.draws(number, size, 1, 0, lambda number, before: number + before, **how)
    return np.concatenate([draw.rows for draw in draws])


LONG_TAIL = table(
    [(f"a{i}", 0, "train", "real") for i in range(90)]
    + [(f"b{i}", 1, "train", "synthetic" if i % 2 else "real") for i in range(10)]
    + [("v", 0, "val", "real"), ("t", 1, "test", "real"), ("u", -1, "unlabeled", "real")]
)


def counts(plan: Plan, seed: int = 1) -> tuple[int, int]:
    labels = LONG_TAIL.labels[drawn(epochs(LONG_TAIL, plan, seed=seed))]
    return int((labels == 0).sum()), int((labels == 1).sum())


def test_without_a_plan_every_row_is_taken_once() -> None:
    made = epochs(LONG_TAIL, Plan())
    for epoch in range(3):
        assert sorted(drawn(made, epoch)) == list(range(100))
    assert not np.array_equal(drawn(made, 0), drawn(made, 1))


def test_class_weights_give_the_wanted_distribution() -> None:
    # weights that make both classes equally likely: 90 * 0.5 = 10 * 4.5 = 45 expected of 90
    plan = Plan(sampling=Sampling(by_class={0: 0.5, 1: 4.5}))
    for seed in range(20):
        assert counts(plan, seed) in {(50, 50), (49, 51), (51, 49)}


def test_each_row_comes_as_often_as_expected_give_or_take_one() -> None:
    rng = np.random.default_rng(0)
    weights = rng.uniform(0, 5, 300)
    expected = weights / weights.sum() * 1000
    for seed in range(5):
        drawn = np.bincount(sampling.draw(weights, 1000, seed), minlength=300)
        assert (np.abs(drawn - expected) < 1).all()


def test_source_weights_hold_within_their_class_only() -> None:
    plan = Plan(sampling=Sampling(by_source={1: {"synthetic": 0.0}}))
    rows = sampling.training_rows(LONG_TAIL, plan)
    assert sampling.Weights(LONG_TAIL, rows, plan)(rows).sum() == 95
    taken = drawn(epochs(LONG_TAIL, plan))
    assert len(taken) == 100
    assert {LONG_TAIL.source_names[code] for code in LONG_TAIL.sources[taken]} == {"real"}


def test_class_and_source_weights_multiply_for_the_rows_that_they_name() -> None:
    plan = Plan(
        sampling=Sampling(by_class={1: 3.0, 7: 9.0}, by_source={1: {"synthetic": 0.5}, 7: {"real": 0}})
    )
    rows = sampling.training_rows(LONG_TAIL, plan)
    weights = sampling.Weights(LONG_TAIL, rows, plan)(rows)
    assert (weights[0], weights[90], weights[91]) == (1.0, 3.0, 1.5), "label 7 has no rows"


def test_rows_left_out_are_never_drawn() -> None:
    plan = Plan(leave_out=[LeaveOut(path=f"a{i}", finding="labels.suspect") for i in range(5)])
    rows = sampling.training_rows(LONG_TAIL, plan)
    assert rows.min() == 5
    assert len(rows) == 95


def test_a_plan_that_leaves_nothing_is_refused() -> None:
    everything = [LeaveOut(path=LONG_TAIL.path(row), finding="x") for row in range(len(LONG_TAIL))]
    with pytest.raises(RetortError, match="leaves out all"):
        sampling.training_rows(LONG_TAIL, Plan(leave_out=everything))
    zero = Plan(sampling=Sampling(by_class={0: 0.0, 1: 0.0}))
    with pytest.raises(RetortError, match="all weights are zero"):
        epochs(LONG_TAIL, zero)


def test_every_stretch_holds_the_classes_in_their_shares() -> None:
    labels = np.array([0] * 80 + [1] * 20)
    order = sampling.spread(labels, 5, 1)
    assert sorted(order) == list(range(100))
    for start in range(0, 100, 20):
        assert abs((labels[order[start : start + 20]] == 1).sum() - 4) <= 1
    assert not np.array_equal(order, sampling.spread(labels, 5, 2)), "another epoch, another order"
    assert np.array_equal(order, sampling.spread(labels, 5, 1))


def test_classes_of_one_size_do_not_follow_one_another_in_one_order() -> None:
    labels = np.repeat(np.arange(100), 20)  # 20 images of each of 100 classes
    order = labels[sampling.spread(labels, 3)]
    neighbours: set[tuple[int, int]] = set()
    for start in range(0, len(order), 8):
        batch = order[start : start + 8]
        neighbours |= {(a, b) for a in batch.tolist() for b in batch.tolist() if a < b}
    # 250 batches of 28 pairs, of 4,950: in random order 1 - (1 - 1/4950)^7000 = 76 % meet; with one random
    # number a class it is one in ten
    assert len(neighbours) / 4950 > 0.6


@pytest.mark.parametrize(("count", "workers", "size"), [(100, 2, 16), (101, 3, 8), (7, 2, 16), (1400, 4, 32)])
def test_workers_share_an_epoch_without_loss_or_repetition(count: int, workers: int, size: int) -> None:
    index = table([(f"a{i}", i % 3, "train", "real") for i in range(count)])
    made = epochs(index, Plan())
    shares = [list(made.draws(0, size, workers, rank, lambda n, before: before)) for rank in range(workers)]
    steps = list(zip(*shares, strict=True))
    assert len(steps) == sampling.steps_per_epoch(count, size, workers)
    for step in steps:
        sizes = [len(draw.rows) for draw in step]
        assert max(sizes) <= size
        assert max(sizes) - min(sizes) <= 1
        assert {draw.total for draw in step} == {sum(sizes)}
    taken = np.concatenate([draw.rows for step in steps for draw in step])
    assert np.array_equal(taken, drawn(made, size=size)), "together they take the draw in its order"


@pytest.mark.parametrize("block", [1_000_000, 40])
@pytest.mark.parametrize("repeats", [1, 3])
def test_an_epoch_in_blocks_holds_what_it_should(
    block: int, repeats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "BLOCK", block)
    rows = [(f"a{i}", i % 7, "train", "real") for i in range(301)]
    index = table([*rows, *((f"u{i}", -1, "unlabeled", "real") for i in range(60))])
    unlabelled = list(range(301, 361))
    made = epochs(index, Plan(sampling=Sampling(by_class={0: 2.0})), unlabelled, repeats=repeats)
    weights = np.where(np.arange(301) % 7 == 0, 2.0, 1.0)
    taken = drawn(made, with_unlabelled=True)
    assert len(taken) == 361 == made.count(True, False)
    times = np.bincount(taken, minlength=361)
    if repeats == 1:
        assert (times[301:] == 1).all()
        expected = weights * 301 / weights.sum()
        # within a block each comes as often as expected, give or take one; blocks differ in their weights
        assert (np.abs(times[:301] - expected) < 1.3).all()
    else:
        assert set(times.tolist()) <= {0, 1, 2, 3, 6}
        assert (times[301:] > 0).sum() == pytest.approx(20, abs=2), "a third of them, three times each"
    assert len(drawn(made, match_budget=True)) == 361
    assert (drawn(made, match_budget=True) < 301).all()
    how = {"with_unlabelled": True}
    views = [np.stack([d.rows, d.views]) for d in made.draws(2, 16, 1, 0, lambda n, b: n + b * 10, **how)]
    pairs = np.concatenate(views, axis=1).T
    assert len(np.unique(pairs, axis=0)) == 361, "no view of a row comes twice in an epoch"
    for skip in (1, 5, len(views) - 1):
        rest = made.draws(2, 16, 1, 0, lambda n, b: n + b * 10, skip=skip, **how)
        for draw, whole in zip(rest, views[skip:], strict=True):
            assert np.array_equal(np.stack([draw.rows, draw.views]), whole)


@pytest.mark.parametrize(
    ("count", "workers", "size", "kept"), [(301, 2, 16, 300), (64, 1, 16, 64), (67, 3, 8, 63)]
)
def test_batches_of_one_size_leave_out_fewer_rows_than_there_are(
    count: int, workers: int, size: int, kept: int
) -> None:
    made = epochs(table([(f"a{i}", i % 3, "train", "real") for i in range(count)]), Plan())
    taken: list[set[int]] = []
    for epoch in (0, 1):
        shares = [
            list(made.draws(epoch, size, workers, rank, lambda n, b: b, even=True)) for rank in range(workers)
        ]
        assert len({len(draw.rows) for share in shares for draw in share}) == 1
        rows = np.concatenate([draw.rows for share in shares for draw in share])
        assert len(rows) == kept == sampling.even_count(count, size, workers)
        taken.append(set(range(count)) - set(rows.tolist()))
    assert taken[0] != taken[1] or kept == count, "others are left out in the next epoch"


@given(st.integers(1, 3000), st.integers(0, 2**31))
def test_a_permutation_without_a_list_is_one(count: int, seed: int) -> None:
    found = sampling.permuted(np.arange(count, dtype=np.uint64), count, seed)
    assert np.array_equal(np.sort(found), np.arange(count))


def test_such_a_permutation_is_no_regular_pattern() -> None:
    found = sampling.permuted(np.arange(100_000, dtype=np.uint64), 100_000, 3)
    assert abs(np.corrcoef(np.arange(100_000), found)[0, 1]) < 0.01
    steps = np.diff(found)
    assert len(np.unique(steps)) > 50_000
    low = np.bincount(found[:10_000] // 10_000, minlength=10)  # of the first tenth: from everywhere
    assert (np.abs(low - 1000) < 5 * np.sqrt(900)).all()


def test_a_row_drawn_again_is_counted() -> None:
    assert sampling.occurrence(np.array([5, 3, 5, 5, 3, 8])).tolist() == [0, 0, 1, 2, 1, 0]


def test_too_few_rows_for_the_workers() -> None:
    with pytest.raises(RetortError, match="3 training rows are too few for 2 Ray workers"):
        sampling.need_rows(3, 2)

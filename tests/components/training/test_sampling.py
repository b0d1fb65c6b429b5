"""What an epoch draws: counts, order, and the split over workers."""

import numpy as np
import pyarrow as pa
import pytest

from components.audit.plan import LeaveOut, Plan, Sampling
from components.common.errors import RetortError
from components.training import sampling


def table(rows: list[tuple[str, int, str, str]]) -> pa.Table:
    return pa.table(
        {
            name: [row[i] for row in rows]
            for i, name in enumerate(["path", "label", "split", "source"])
        }
    )  # fmt: skip


LONG_TAIL = table(
    [(f"a{i}", 0, "train", "real") for i in range(90)]
    + [(f"b{i}", 1, "train", "synthetic" if i % 2 else "real") for i in range(10)]
    + [("v", 0, "val", "real"), ("t", 1, "test", "real"), ("u", -1, "unlabeled", "real")]
)


def counts(plan: Plan, seed: int = 1) -> tuple[int, int]:
    rows = sampling.training_rows(LONG_TAIL, plan)
    drawn = rows[sampling.draw(sampling.weights(LONG_TAIL, rows, plan), len(rows), seed)]
    labels = LONG_TAIL["label"].to_numpy()[drawn]
    return int((labels == 0).sum()), int((labels == 1).sum())


def test_without_a_plan_every_row_is_taken_once() -> None:
    rows = sampling.training_rows(LONG_TAIL, Plan())
    for epoch in range(3):
        drawn = sampling.draw(sampling.weights(LONG_TAIL, rows, Plan()), len(rows), 7, epoch)
        assert sorted(rows[drawn]) == list(range(100))


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
    weights = sampling.weights(LONG_TAIL, rows, plan)
    assert weights.sum() == 95
    drawn = rows[sampling.draw(weights, len(rows), 3)]
    assert "synthetic" not in set(LONG_TAIL["source"].take(pa.array(drawn)).to_pylist())


def test_class_and_source_weights_multiply_for_the_rows_that_they_name() -> None:
    plan = Plan(
        sampling=Sampling(by_class={1: 3.0, 7: 9.0}, by_source={1: {"synthetic": 0.5}, 7: {"real": 0}})
    )
    rows = sampling.training_rows(LONG_TAIL, plan)
    weights = dict(zip(LONG_TAIL["path"].to_pylist(), sampling.weights(LONG_TAIL, rows, plan), strict=False))
    assert (weights["a0"], weights["b0"], weights["b1"]) == (1.0, 3.0, 1.5), "label 7 has no rows"


def test_weights_are_a_look_up_however_many_classes() -> None:
    labels = np.random.default_rng(0).integers(0, 100_000, 1_000_000).astype(np.int32)
    many = pa.table({"label": labels, "source": pa.repeat("real", len(labels))})
    wanted = np.random.default_rng(1).uniform(0.5, 2, 100_000)
    plan = Plan(sampling=Sampling(by_class=dict(enumerate(wanted.tolist()))))
    assert np.array_equal(sampling.weights(many, np.arange(len(labels)), plan), wanted[labels])


def test_rows_left_out_are_never_drawn() -> None:
    plan = Plan(leave_out=[LeaveOut(path=f"a{i}", finding="labels.suspect") for i in range(5)])
    rows = sampling.training_rows(LONG_TAIL, plan)
    assert rows.min() == 5
    assert len(rows) == 95


def test_a_plan_that_leaves_nothing_is_refused() -> None:
    everything = [LeaveOut(path=path, finding="x") for path in LONG_TAIL["path"].to_pylist()]
    with pytest.raises(RetortError, match="leaves out all"):
        sampling.training_rows(LONG_TAIL, Plan(leave_out=everything))
    zero = Plan(sampling=Sampling(by_class={0: 0.0, 1: 0.0}))
    with pytest.raises(RetortError, match="all weights are zero"):
        sampling.weights(LONG_TAIL, sampling.training_rows(LONG_TAIL, zero), zero)


def test_every_stretch_holds_the_classes_in_their_shares() -> None:
    labels = np.array([0] * 80 + [1] * 20)
    order = sampling.spread(labels, 5, 1)
    assert sorted(order) == list(range(100))
    for start in range(0, 100, 20):
        assert abs((labels[order[start : start + 20]] == 1).sum() - 4) <= 1
    assert not np.array_equal(order, sampling.spread(labels, 5, 2)), "another epoch, another order"
    assert np.array_equal(order, sampling.spread(labels, 5, 1))


@pytest.mark.parametrize(("count", "workers", "size"), [(100, 2, 16), (101, 3, 8), (7, 2, 16), (1400, 4, 32)])
def test_workers_share_an_epoch_without_loss_or_repetition(count: int, workers: int, size: int) -> None:
    rows = np.random.default_rng(0).permutation(count)
    shares = [sampling.batches(rows, size, workers, rank) for rank in range(workers)]
    steps = list(zip(*shares, strict=True))
    assert len(steps) == sampling.steps_per_epoch(count, size, workers)
    for step in steps:
        sizes = [len(batch) for batch, _ in step]
        assert max(sizes) <= size
        assert max(sizes) - min(sizes) <= 1
        assert {everyone for _, everyone in step} == {sum(sizes)}
    taken = np.concatenate([batch for step in steps for batch, _ in step])
    assert np.array_equal(taken, rows), "together the workers take the draw in its order"


def test_too_few_rows_for_the_workers() -> None:
    with pytest.raises(RetortError, match="3 training rows are too few for 2 Ray workers"):
        sampling.batches(np.arange(3), 16, 2, 0)

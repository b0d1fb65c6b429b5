"""The imbalance audit: what it names, what it proposes."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from components.audit.balance import balance, effective_number
from components.audit.params import Audit
from components.audit.part import ImbalancePart, read_part
from components.audit.plan_schema import LOSSES
from components.common.errors import RetortError
from tests.components.audit.conftest import Audits, rows_of

LONG_TAIL = {
    "shirt": {"real": 400, "val": 20},
    "dress": {"real": 100, "val": 20},
    "skirt": {"real": 10, "val": 4},
}


def test_the_thinned_digit_is_named_and_no_other(audits: Audits) -> None:
    found = audits.imbalance()
    (ratio,) = found["imbalance.ratio"]
    assert (ratio.level, ratio.subject, ratio.measured, ratio.limit) == ("warning", "class '6'", 25.0, 4.0)
    (few,) = found["imbalance.few_samples"]
    assert (few.subject, few.measured, few.row) == ("class '6'", 20, "1.2")
    assert "imbalance.ratio" in audits.out.joinpath("imbalance/report.html").read_text(encoding="utf-8")


def test_even_classes_are_drawn_as_they_are(audits: Audits) -> None:
    audits.write(rows_of({name: {"real": 40, "val": 12} for name in "abc"}))
    found = audits.imbalance()
    assert [finding.level for finding in found["imbalance.ratio"]] == ["info"]
    assert "imbalance.few_samples" not in found
    part = read_part(ImbalancePart, audits.out / "imbalance", "audit imbalance")
    assert (part.sampling.distribution, part.sampling.by_class) == ("natural", {})
    assert part.loss.name == "cross_entropy"


def test_a_class_too_small_to_be_judged_is_told_from_one_too_small_to_be_learnt(audits: Audits) -> None:
    audits.write(rows_of({**LONG_TAIL, "hat": {"real": 200, "val": 3}}))
    learn, judge = audits.imbalance()["imbalance.few_samples"]
    assert learn.subject == "class 'skirt'"
    assert "too few to learn" in learn.message
    assert judge.subject == "class 'hat', class 'skirt'"
    assert "validation images" in judge.message


def test_many_small_classes_are_summed_up_and_stand_in_a_file(audits: Audits) -> None:
    counts = {f"c{i:02}": {"real": 1 + i % 5, "val": 10} for i in range(40)}
    audits.write(rows_of({"big": {"real": 90, "val": 10}, **counts}))
    *named, rest = audits.imbalance()["imbalance.few_samples"]
    assert len(named) == 10
    assert {finding.measured for finding in named} == {1, 2}, "the worst ones"
    assert rest.measured == 40
    table = pq.read_table(audits.out / "imbalance/classes.parquet")
    assert table.filter(table["few_to_learn"]).num_rows == 40


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [
        ("natural", [400, 100, 10]),
        ("uniform", [170, 170, 170]),
        # square roots of 400, 100 and 10 are 20, 10 and 3.1623: their shares of 510 rows
        ("square_root", [307.58, 153.79, 48.63]),
        ([1, 0, 4], [102, 0, 408]),
    ],
)
def test_the_wanted_distribution_is_what_comes_out(distribution: object, expected: list[float]) -> None:
    counts, labels = np.array([400, 100, 10]), np.arange(3)
    found = balance(
        counts, counts.astype(float), labels, Audit.model_validate({"distribution": distribution})
    )
    assert found.expected == pytest.approx(expected, abs=0.01)
    assert found.by_class * counts == pytest.approx(found.expected)


def test_auto_repeats_no_image_more_often_than_augmentation_can_bear() -> None:
    labels = np.arange(3)
    mild, steep = np.array([100, 100, 20]), np.array([10_000, 5_000, 20])
    assert balance(mild, mild.astype(float), labels, Audit()).distribution == "uniform"
    assert balance(steep, steep.astype(float), labels, Audit()).distribution == "square_root"
    natural = Audit.model_validate({"distribution": "natural"})
    found = balance(mild * 2, mild * 2.0, labels, natural)
    assert found.loss.name == "class_balanced", "what sampling leaves uneven, the loss weighs"
    weights = found.loss.arguments["weights"]
    assert weights["0"] == weights["1"] < weights["2"]
    assert np.mean(list(weights.values())) == pytest.approx(1)


def test_effective_numbers_are_those_of_the_paper() -> None:
    # (1 - 0.9^n) / (1 - 0.9): 1 for one image, 1.9 for two, towards 10 for many
    assert effective_number(np.array([1, 2, 1000]), beta=0.9) == pytest.approx([1, 1.9, 10])


def test_a_loss_that_is_added_is_given_and_not_another_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "poly", {"epsilon": 2.0})
    counts = np.array([100, 100])
    loss = balance(counts, counts.astype(float), np.arange(2), Audit.model_validate({"loss": "poly"})).loss
    assert (loss.name, loss.arguments) == ("poly", {"epsilon": 2.0})
    with pytest.raises(ValidationError, match=r"'polly' is none of auto, .*did you mean 'poly'"):
        Audit.model_validate({"loss": "polly"})


@pytest.mark.parametrize(
    ("asked", "arguments"), [("focal", {"gamma": 2.0}), ("ohem", {"keep": 0.7}), ("cross_entropy", {})]
)
def test_a_loss_that_is_asked_for_is_given(asked: str, arguments: dict[str, float]) -> None:
    counts = np.array([400, 100])
    loss = balance(counts, counts.astype(float), np.arange(2), Audit.model_validate({"loss": asked})).loss
    assert (loss.name, loss.arguments) == (asked, arguments)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([1.0, 2.0], "2 shares for 3 classes"),
        ([0.0, 0.0, 0.0], "no class .* gets a share"),
    ],
)
def test_shares_that_make_no_sense_are_refused(audits: Audits, shares: list[float], message: str) -> None:
    audits.write(rows_of(LONG_TAIL))
    with pytest.raises(RetortError, match=f"audit.distribution: .*{message}"):
        audits.imbalance(audit={"distribution": shares})
    assert not (audits.out / "imbalance/part.json").exists()


def test_nothing_to_train_on_is_said(audits: Audits) -> None:
    audits.write(rows_of({"a": {"val": 3}}))
    with pytest.raises(RetortError, match="no row is in the split 'train'"):
        audits.imbalance()


def test_sampling_and_loss_together_repeat_no_image_more_often_than_either_may() -> None:
    """Nine classes of 500 and one of 10: a uniform distribution is refused for repeating images 45 times."""
    counts = np.array([500] * 9 + [10])
    found = balance(counts, counts.astype(float), np.arange(10), Audit())
    assert found.distribution == "square_root"
    # square roots are 22.3607 and 3.1623: of 4,510 rows the small class gets 69.77, 6.977 times its images
    assert found.expected[-1] == pytest.approx(69.77, abs=0.01)
    assert found.loss.name == "class_balanced"
    weights = np.array(list(found.loss.arguments["weights"].values()))
    # its weight is 10 / 6.977 that of the others; by effective numbers alone it would be 5.7 of it
    assert weights[-1] / weights[0] == pytest.approx(10 / 6.977, abs=1e-3)
    assert "more than 10 times" in found.loss.why


@pytest.mark.parametrize("loss", ["auto", "class_balanced"])
@pytest.mark.parametrize(
    "counts", [[500] * 9 + [10], [10_000, 5_000, 20], [1000, 1], [600, 300, 100, 50, 5], [50, 10]]
)
def test_an_images_emphasis_stays_below_the_limit(counts: list[int], loss: str) -> None:
    sizes = np.array(counts)
    found = balance(sizes, sizes.astype(float), np.arange(len(sizes)), Audit.model_validate({"loss": loss}))
    given = found.loss.arguments.get("weights", dict.fromkeys(map(str, range(len(sizes))), 1.0))
    weights = np.array(list(given.values()))
    emphasis = found.by_class * weights / ((found.expected * weights).sum() / sizes.sum())
    assert emphasis.max() <= max(10.0, found.by_class.max()) + 1e-6


def test_what_sampling_alone_repeats_often_is_not_weighed_higher_still() -> None:
    # square roots already draw each of the 20 images 19 times
    counts = np.array([10_000, 5_000, 20])
    loss = balance(counts, counts.astype(float), np.arange(3), Audit()).loss
    assert loss.name == "cross_entropy"
    assert "19.2 times an epoch" in loss.why


def test_who_asks_for_both_gets_both() -> None:
    counts = np.array([500] * 9 + [10])
    asked = Audit.model_validate({"distribution": "square_root", "loss": "class_balanced"})
    weights = balance(counts, counts.astype(float), np.arange(10), asked).loss.arguments["weights"]
    assert weights["9"] / weights["0"] > 5

"""The rules of the choice, on results that hypothesis makes up, and what the curves show of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as some

from components.benchmark.choice import (
    ACCURACY_MARGIN,
    NOISE_BELIEVED,
    Pair,
    Result,
    choose,
    fastest,
    under_budget,
)
from components.benchmark.curves import best_of_each, cost_figure, latency_figure
from components.benchmark.engines import ENGINES
from components.common.page import figure_svg
from components.export.precisions import PRECISIONS, Precision

PLAIN = Result(
    model="student", family="net", arch="net0", engine="onnxruntime", threads=1, batch=1, precision="fp32",
    p50_ms=2.0, p95_ms=2.5, noise=0.0, throughput=500.0, size_bytes=10_000_000, params=2_500_000,
    macs=30_000_000, val_top1=0.97,
)  # fmt: skip

results = some.lists(
    some.builds(
        lambda model, engine, threads, batch, precision, p50, noise, size, top1: replace(
            PLAIN, model=model, family=f"{model} family", engine=engine, threads=threads, batch=batch,
            precision=precision, p50_ms=p50, p95_ms=2 * p50, noise=noise, throughput=1e3 * batch / p50,
            size_bytes=size, val_top1=top1,
        ),
        some.sampled_from(["student", "teacher", "third"]),
        some.sampled_from([*ENGINES]),
        some.sampled_from([1, 2, 4]),
        some.sampled_from([1, 16]),
        some.sampled_from([*PRECISIONS]),
        some.floats(0.01, 100),
        some.floats(0, 3),
        some.integers(1000, 10**9),
        some.floats(0, 1),
    ),
    min_size=1,
    max_size=20,
)  # fmt: skip


@given(results, some.floats(0.01, 100))
def test_under_a_budget_nothing_that_fits_is_more_accurate(measured: list[Result], budget: float) -> None:
    chosen = under_budget(measured, budget)
    fitting = [result for result in measured if result.p50_ms <= budget]
    assert (chosen is None) == (not fitting)
    if chosen is not None:
        assert chosen.p50_ms <= budget
        assert all(result.val_top1 <= chosen.val_top1 for result in fitting)


@given(results)
def test_the_fastest_is_never_slower_than_noise_explains(measured: list[Result]) -> None:
    assert fastest(measured).p50_ms <= min(r.p50_ms for r in measured) * (1 + NOISE_BELIEVED)


@given(results)
def test_every_answer_was_measured_and_is_accurate_enough(measured: list[Result]) -> None:
    choice = choose(measured, None)
    single = [r for r in measured if r.batch == min(r.batch for r in measured)]
    best = max(r.val_top1 for r in single)
    for need, answer in [*choice.answers.items(), ("recommended", choice.recommended)]:
        assert answer.result in measured
        if need != "server-like":
            assert answer.result.val_top1 >= best - ACCURACY_MARGIN
    good = [r for r in single if r.val_top1 >= best - ACCURACY_MARGIN]
    assert choice.answers["size"].result.size_bytes == min(r.size_bytes for r in good)
    assert choice.latency_budget is None


@given(results, some.floats(0.01, 100))
def test_the_order_of_measuring_decides_nothing(measured: list[Result], budget: float) -> None:
    forwards, backwards = choose(measured, budget), choose(measured[::-1], budget)
    for key in ("p50_ms", "size_bytes", "val_top1"):
        one, other = (getattr(choice.answers["size"].result, key) for choice in (forwards, backwards))
        assert one == other
    assert forwards.latency_budget is not None
    assert backwards.latency_budget is not None
    assert forwards.latency_budget.fitting == backwards.latency_budget.fitting


def test_of_equals_the_more_accurate_one_is_taken() -> None:
    better = replace(PLAIN, val_top1=PLAIN.val_top1 + 0.0078125)
    assert fastest([PLAIN, better]) == fastest([better, PLAIN]) == better


def test_a_difference_below_the_noise_is_no_reason_for_more_threads() -> None:
    one = replace(PLAIN, p50_ms=1.05, noise=0.1)
    two = replace(PLAIN, threads=2, p50_ms=1.0, noise=0.1)
    assert fastest([two, one]) == one
    assert fastest([two, replace(one, p50_ms=1.2)]) == two


def test_with_a_budget_accuracy_decides_and_without_one_speed() -> None:
    student = PLAIN
    teacher = replace(PLAIN, model="teacher", arch="net1", p50_ms=3.0, val_top1=0.975, size_bytes=12_000_000)
    assert choose([student, teacher], None).recommended.result.model == "student"
    assert choose([student, teacher], 5.0).recommended.result.model == "teacher"
    assert choose([student, teacher], 2.5).recommended.result.model == "student"
    nothing = choose([student, teacher], 1.0)
    assert nothing.latency_budget is not None
    assert nothing.latency_budget.chosen is None
    assert nothing.recommended.why.startswith("nothing keeps 1 ms")


def test_a_student_that_lost_too_much_is_not_recommended_for_its_speed() -> None:
    teacher = replace(PLAIN, model="teacher", p50_ms=30.0, val_top1=0.99)
    assert choose([PLAIN, teacher], None).recommended.result.model == "teacher"


def test_what_is_added_to_the_registries_is_chosen_and_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plainer stands there first. An engine and a precision that came later once crashed the choice."""
    monkeypatch.setitem(ENGINES, "another", ENGINES["onnxruntime"])
    monkeypatch.setitem(PRECISIONS, "fp16", Precision(tolerance=0.01))
    later = replace(PLAIN, engine="another", precision="fp16")
    assert fastest([later, PLAIN]) == PLAIN
    quicker = replace(later, p50_ms=1.0)
    assert choose([PLAIN, quicker], None).recommended.result == quicker
    assert "net fp16" in figure_svg(latency_figure([PLAIN, quicker], None))


def test_the_file_says_what_was_chosen() -> None:
    pair = Pair("onnxruntime", "fp32", 1, 1, 2.0, 4.0, 0.5, 0.4, 0.6, 0.5)
    choice = replace(choose([PLAIN, replace(PLAIN, model="teacher", p50_ms=4.0)], 3.0), pairs=[pair])
    assert choice.pair == pair
    said = choice.summary()
    assert said["recommended"]["model"] == "student"
    assert set(said["answers"]) == {"speed", "size", "mobile-like", "server-like"}
    assert said["latency_budget"]["chosen"]["p50_ms"] == 2.0
    assert said["student_against_teacher"][0]["ratio_low"] == 0.4


@pytest.mark.parametrize(("budget", "drawn"), [(None, False), (2.5, True), (500.0, True)])
def test_curves_name_models_families_and_the_budget(budget: float | None, drawn: bool) -> None:
    measured = [
        PLAIN,
        replace(PLAIN, engine="openvino", p50_ms=2.2),
        replace(PLAIN, model="teacher", arch="net1", p50_ms=3.0, val_top1=0.98),
        replace(PLAIN, model="other", family="resnet", arch="resnet18", p50_ms=4.0, val_top1=0.96),
    ]
    assert [result.model for result in best_of_each(measured)] == ["student", "teacher", "other"]
    markup = figure_svg(latency_figure(measured, budget))
    for word in ("student", "teacher", "other", "net", "resnet", "p50 latency of one image"):
        assert word in markup
    assert ("budget" in markup) == drawn
    assert "size of the file, MB" in figure_svg(cost_figure(measured))
    assert markup == figure_svg(latency_figure(measured, budget))

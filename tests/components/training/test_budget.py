"""What a training will take: sums worked out by hand, and decisions that stay. No clock is believed here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from components.audit.plan_schema import read_plan
from components.common.findings import Finding
from components.models.params import LearningRate
from components.step import StepContext
from components.tracking.tracker import Tracker
from components.training import budget, driver, estimate, preflight
from components.training.budget import Forecast, fed, fit_epochs, forecast, reading, within
from components.training.estimate import START_SECONDS, Speed
from components.training.inputs.index import open_index
from components.training.inputs.pictures import open_store
from components.training.listener import Listener
from components.training.params import DistillParams
from components.training.spec import Phase, TrainSpec

COUNTS = {"train": 1000, "val": 200, "test": 100, "unlabeled": 600}
LR = LearningRate()


@pytest.fixture
def spec(data: SimpleNamespace, params: DistillParams) -> TrainSpec:
    return driver.make_spec(
        params, params.student, params.ray, params.data, data.manifest, read_plan(data.plan), None,
        (Phase("finetune", "student", 5, LR),),
    )  # fmt: skip


@pytest.fixture
def run(data: SimpleNamespace, params: DistillParams) -> StepContext:
    return StepContext("finetune", params, Path("out"), Tracker("finetune", params.registry))


def test_a_finetune_is_its_epochs_and_their_judging(spec: TrainSpec) -> None:
    found = forecast(spec, COUNTS, Speed(100, 400), None, START_SECONDS)
    each = 1000 / 100 + 200 / 400 + budget.KEEP_SECONDS
    assert found == Forecast(START_SECONDS, 0.0, (("finetune", 5, pytest.approx(each)),), 300 / 400)
    assert found.seconds == pytest.approx(START_SECONDS + 5 * each + 0.75)


@pytest.mark.parametrize("cached", [True, False])
def test_a_distillation_is_the_teachers_labels_too(
    spec: TrainSpec, params: DistillParams, cached: bool
) -> None:
    settings = params.distill.model_copy(
        update={
            "crops": 2,
            "unlabeled_per_class": 25,
            "teacher_labels": "cached" if cached else "online",
        }
    )
    phases = (
        Phase("distil", "student", 4, LR, task="ssld"),
        Phase("labelled", "student", 1, LR),
        Phase("control", "control", 4, LR, match_budget=True),
    )
    found = forecast(
        replace(spec, phases=phases, distill=settings),
        COUNTS,
        Speed(200, 600),
        Speed(100, 300),
        START_SECONDS,
    )
    chosen = 4 * 25  # of 600, by class
    rest = 200 / 600 + budget.KEEP_SECONDS
    asked = 0.0 if cached else 1100 / 300  # at each epoch
    assert found.labels == pytest.approx((600 + (2 * (1000 + chosen) if cached else 0)) / 300)
    assert [each for _, _, each in found.phases] == pytest.approx(
        [1100 / 200 + asked + rest, 1000 / 200 + rest, 1100 / 200 + rest]
    )
    assert found.end == pytest.approx(2 * 300 / 600), "two networks"


def test_a_phase_of_larger_images_takes_longer(spec: TrainSpec) -> None:
    phases = (Phase("long", "student", 4, LR), Phase("large", "student", 1, LR, size=2 * spec.size))
    found = forecast(replace(spec, phases=phases), COUNTS, Speed(100, 400), None, START_SECONDS)
    rest = budget.KEEP_SECONDS
    assert [each for _, _, each in found.phases] == pytest.approx([10.5 + rest, 42 + rest])
    assert found.end == pytest.approx(4 * 300 / 400), "it is judged at the size that it is made for"


def test_it_says_what_init_says(spec: TrainSpec, params: DistillParams) -> None:
    """Two sums of the same thing, written for different places."""
    settings = params.distill.model_copy(update={"crops": 2, "unlabeled_per_class": 0})
    both = [
        phase
        for net in ("student", "control")
        for phase in (
            Phase("long", net, 4, LR, task="ssld" if net == "student" else "labels"),
            Phase("short", net, 1, LR),
        )
    ]
    speeds = {"teacher": Speed(100, 300), "student": Speed(200, 600)}
    init = estimate.seconds(
        training=1000, validation=200, test=100, teacher_epochs=5, student_epochs=4, crops=2, **speeds
    )
    found = forecast(
        replace(spec, phases=tuple(both), distill=settings), COUNTS, speeds["student"], speeds["teacher"],
        START_SECONDS,
    )  # fmt: skip
    assert found.seconds - 10 * budget.KEEP_SECONDS == pytest.approx(
        init["check"] + init["distill"] - START_SECONDS - 200 / 300
    )


@pytest.mark.parametrize(
    ("seconds", "epochs"),
    [(600, 20), (330, 10), (329, 9), (60, 1), (10, 1), (100_000, 50)],
    ids=["fits", "exactly", "almost", "one", "less than one: one all the same", "never more than asked"],
)
def test_epochs_that_fit(seconds: float, epochs: int) -> None:
    assert fit_epochs(seconds, fixed=30, epoch=28.5 if seconds == 600 else 30, most=50) == epochs


def knows(monkeypatch: pytest.MonkeyPatch, training: float) -> None:
    """A machine that trains so many images a second."""
    speed = Speed(training, 3 * training)
    monkeypatch.setattr(budget, "_speed", lambda arch, spec, ray: speed if not ray.address else None)


def of(spec: TrainSpec, epochs: int) -> TrainSpec:
    return replace(spec, phases=(Phase("finetune", "student", epochs, LR),))


def test_a_budget_decides_once(
    spec: TrainSpec, params: DistillParams, run: StepContext, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """96 training and 32 validation images, at 32 a second: 3.73 s an epoch; 20.5 s beside them."""
    knows(monkeypatch, 32)

    def decide(minutes: float | None, most: int = 50) -> int:
        found = within(run, lambda epochs: of(spec, epochs), params.ray, "student", most, minutes)
        return found.phases[0].epochs

    assert decide(None) == 50
    assert not run.report.findings
    assert decide(1.0) == 10
    assert (
        "10 epochs of at most 50 in 1 min: about 4 s for each, 20 s for the rest" in capsys.readouterr().err
    )
    (finding,) = run.report.findings
    assert (finding.rule, finding.measured, finding.limit) == ("preflight.budget", 10, 50)
    knows(monkeypatch, 320)
    assert decide(1.0) == 10, "the same job goes on with the same schedule"
    assert "as was decided when this training first began" in capsys.readouterr().err
    assert decide(2.0) > 50 - 1, "another budget is another job"
    assert decide(2.0, most=3) == 3, "train.epochs is the upper bound"
    assert decide(0.01) == 1
    assert "more than the budget" in capsys.readouterr().err


def test_a_cluster_that_nobody_has_measured_is_said_to_be_one(
    spec: TrainSpec, params: DistillParams, run: StepContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    knows(monkeypatch, 32)
    away = params.ray.model_copy(update={"address": "ray://head:10001"})
    assert within(run, lambda epochs: of(spec, epochs), away, "student", 7, 1.0).phases[0].epochs == 7
    (finding,) = run.report.findings
    assert (finding.rule, finding.level) == ("preflight.budget", "warning")
    budget.say_estimate(run, spec, away, "student", 1000)
    assert "known after a first training at ray://head:10001" in run.report.findings[-1].message


def test_time_disk_and_cost_are_said(
    spec: TrainSpec, params: DistillParams, run: StepContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    knows(monkeypatch, 1)
    priced = params.ray.model_copy(update={"price_per_hour": 3.0})
    budget.say_estimate(run, spec, priced, "student", 45_000_000)
    (finding,) = run.report.findings
    each = 96 + 32 / 3 + budget.KEEP_SECONDS
    seconds = START_SECONDS + 5 * each + (32 + 16) / 3
    assert (finding.rule, finding.level) == ("preflight.estimate", "info")
    assert finding.measured == pytest.approx(seconds, abs=0.1)
    assert f"a cost of {seconds / 3600 * 3:.2f} at 3 an hour for the whole cluster" in finding.message
    assert "up to 45.0 MB of disk" in finding.message


def test_a_speed_is_measured_once_and_corrected_by_what_was_trained(
    spec: TrainSpec, params: DistillParams, run: StepContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def measure(*arguments: object, **settings: object) -> Speed:
        calls.append(1)
        return Speed(50.0, 200.0)

    monkeypatch.setattr(estimate, "measure", measure)
    monkeypatch.setattr(budget, "cores", lambda: 2)
    monkeypatch.setattr("psutil.cpu_percent", lambda: 50.0)
    first = budget.expected(spec, params.ray)
    assert first is not None
    both = 2 * budget.SHARED  # workers of one core each
    assert first.phases[0][2] == pytest.approx(96 / 50 / both + 32 / 200 / both + budget.KEEP_SECONDS)
    assert budget.expected(replace(spec, seed=99), params.ray) == first, "the seed changes no speed"
    assert len(calls) == 1
    other = spec.train.model_copy(update={"batch_size": 2})
    budget.expected(replace(spec, train=other), params.ray)
    assert len(calls) == 2

    heard = Listener(run)
    heard.images, heard.seconds = 1000.0, [4.0, 6.0]
    budget.learn(run, spec, params.ray, heard, 30.0)
    again = budget.expected(spec, params.ray)
    assert again is not None
    assert again.phases[0][2] == pytest.approx(96 / 100 + 32 / 200 / both + budget.KEEP_SECONDS)
    assert len(calls) == 2

    away = params.ray.model_copy(update={"address": "auto"})
    assert budget.expected(spec, away) is None
    budget.learn(run, spec, away, heard, 30.0)
    assert budget.expected(spec, away) is not None, "a cluster is known by what it has trained"


@pytest.mark.parametrize(
    ("percent", "others"),
    [(100.0, 3.5), (95.0, 3.3), (80.0, 0.0)],
    ids=["all are taken", "nearly all", "some are idle"],
)
def test_other_work_is_told_from_ours(percent: float, others: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four cores we take half a one."""
    monkeypatch.setattr("psutil.cpu_count", lambda: 4)
    monkeypatch.setattr("psutil.cpu_percent", lambda: percent)
    wall, ours = iter([10.0, 14.0]), iter([3.0, 5.0])
    monkeypatch.setattr(budget, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(budget, "process_time", lambda: next(ours))
    assert budget.beside_others(lambda: Speed(1, 2)) == (Speed(1, 2), pytest.approx(others))


def test_a_measure_of_a_busy_machine_is_not_kept(
    spec: TrainSpec, params: DistillParams, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    calls: list[int] = []

    def measure(*arguments: object, **settings: object) -> Speed:
        calls.append(1)
        return Speed(50.0, 200.0)

    monkeypatch.setattr(estimate, "measure", measure)
    monkeypatch.setattr(budget, "beside_others", lambda work: (work(), 1.5))
    monkeypatch.setattr(budget, "_while_busy", {})
    assert budget.expected(spec, params.ray) == budget.expected(spec, params.ray)
    assert len(calls) == 1, "once a command"
    assert capsys.readouterr().err.count("other work took about 1.5 cores") == 1
    assert not list(Path(".retort/cache/speed").glob("*.json"))


def test_reading_and_computing_share_the_cores() -> None:
    assert fed(100.0, 0.0, 1, 2, 2) == 100
    assert fed(100.0, 0.01, 2, 2, 2) == pytest.approx(2 / (2 / 100 + 0.01)), "both cores do both"
    assert fed(100.0, 0.01, 2, 2, 64) == 100, "others read"
    assert fed(5000.0, 0.01, 12, 0, 16) == 1200, "a GPU waits for its images"


def test_images_that_are_decoded_take_no_reading(spec: TrainSpec) -> None:
    index = open_index(spec.manifest)
    assert reading(open_store(index, spec.root, spec.size).learn) == 0
    assert reading(open_store(index, spec.root, spec.size, limit=0).learn) > 0


def test_a_step_says_it_before_it_begins(
    spec: TrainSpec, params: DistillParams, run: StepContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.cpu_percent", lambda: 50.0)
    preflight.preflight(run, spec, params.ray, "student")
    found: dict[str, Finding] = {finding.rule: finding for finding in run.report.findings}
    assert found["preflight.estimate"].measured > START_SECONDS
    assert len(list(Path(".retort/cache/speed").iterdir())) == 1

"""The training loop itself, without Ray: in this process, or in a gloo group of a few."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from components.audit.plan_schema import read_plan
from components.common.errors import RetortError
from components.models.params import Arch, LearningRate, Optimizer
from components.training import advice, driver, health, labeller, learner, pace, precision, trainer, watch
from components.training.params import DistillParams
from components.training.spec import Phase, TrainSpec
from components.training.tasks import TASKS
from components.training.tasks.base import Learnt, Setup
from components.training.tasks.labels import Labels
from tests.components.training import local

VIT = Arch(name="test_vit")  # timm's own for tests: no batch norms


@pytest.fixture
def spec(data: SimpleNamespace, params: DistillParams, weights: Path) -> TrainSpec:
    return driver.make_spec(
        params, params.teacher, params.ray, params.data, data.manifest, read_plan(data.plan),
        weights / "teacher.safetensors", (Phase("finetune", "net", 3, params.teacher.lr),),
    )  # fmt: skip


@pytest.fixture
def distilling(spec: TrainSpec, data: SimpleNamespace, params: DistillParams) -> TrainSpec:
    lr = params.student.lr
    return replace(
        spec,
        phases=(Phase("distil", "student", 2, lr, task="ssld"), Phase("labelled", "student", 1, lr),
                Phase("control", "control", 2, lr, match_budget=True)),
        teacher=data.teacher,
        distill=params.distill,
        soft_labels=Path("labels").resolve(),
    )  # fmt: skip


def changed(spec: TrainSpec, **values: Any) -> TrainSpec:
    return replace(spec, train=spec.train.model_copy(update=values))


def bytes_of(outcome: local.Outcome, net: str = "net") -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in outcome.result.nets[net].items()}


def test_it_learns_and_says_what_it_does(spec: TrainSpec) -> None:
    outcome = local.run(spec)
    history = outcome.result.history
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert history[-1]["val_top1"] > 0.5
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    predicted = outcome.result.predictions["net"]["val"]
    assert predicted.shape == (32,)
    assert predicted.dtype == np.int64
    assert len(outcome.said("epoch")) == 3
    assert outcome.said("speed")[0]["images_per_second"] > 0
    assert 0 <= outcome.said("speed")[0]["waiting"] < 1
    assert outcome.context.saved == 4, "each epoch, and the end"


def test_two_runs_give_the_same_bytes_and_another_seed_gives_others(spec: TrainSpec) -> None:
    first = local.run(spec)
    assert bytes_of(local.run(spec)) == bytes_of(first)
    assert local.run(spec).result.history == first.result.history
    assert bytes_of(local.run(replace(spec, seed=4))) != bytes_of(first)


def test_a_distillation_with_cached_labels_gives_the_same_bytes_again(distilling: TrainSpec) -> None:
    first = local.run(distilling)
    again = local.run(distilling)  # with the soft labels of the first
    assert bytes_of(first, "student") == bytes_of(again, "student")
    assert bytes_of(first, "control") == bytes_of(again, "control")
    assert first.result.chosen == 8
    total = [event["total"] for event in first.said("phase") if event["name"] == "soft labels"][-1]
    assert total == sum(len(np.load(path)) for path in Path("labels").glob("*/rows.npy")), "all views"
    assert len(list(Path("labels").iterdir())) == 5, "two views, the pool, and two by which it is chosen"


def test_no_time_below_nothing_is_promised(distilling: TrainSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labeller, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(pace.Promise, "renew", lambda self, now, left: True)
    told = [event for event in local.run(distilling).said("estimate") if "soft labels" in event["name"]]
    assert told
    assert min(event["seconds"] for event in told) > 0


@pytest.mark.parametrize("augment", ["standard", "deit"])
def test_a_distillation_from_canvases_and_mixed_images(distilling: TrainSpec, augment: str) -> None:
    """A recipe as strong as DeiT's shows little of an image, so it gets eight times the steps."""
    times = 8 if augment == "deit" else 1
    phases = tuple(replace(phase, epochs=times * phase.epochs) for phase in distilling.phases)
    spec = replace(changed(replace(distilling, phases=phases), augment=augment), waived=True)
    result = local.run(spec).result
    names = ["distil"] * 2 * times + ["labelled"] * times + ["control"] * 2 * times
    assert [row["phase"] for row in result.history] == names
    assert np.isfinite([row["train_loss"] for row in result.history]).all()
    for phase in ("labelled", "control"):
        last = [row["val_top1"] for row in result.history if row["phase"] == phase][-1]
        assert last > 0.3, phase


@pytest.mark.parametrize(
    "change", [{"teacher_labels": "online"}, {"top_k_labels": 2}, {"crops": 1, "unlabeled_per_class": 0}]
)
def test_other_ways_to_distil(distilling: TrainSpec, change: dict[str, Any]) -> None:
    assert distilling.distill is not None
    spec = replace(distilling, distill=distilling.distill.model_copy(update=change))
    assert local.run(spec).result.history[-1]["val_top1"] > 0.4


def test_a_phase_of_its_own_size_and_optimizer(distilling: TrainSpec, params: DistillParams) -> None:
    """The network is judged on larger images then, and is made for them; the control keeps its size."""
    distil, labelled, control = distilling.phases
    larger, other = distilling.size * 3 // 2, Optimizer(name="adamw")
    last = replace(labelled, size=larger, optimizer=other, augment="none")
    spec = changed(replace(distilling, phases=(distil, last, control)), keep="last")
    outcome = local.run(spec)
    assert outcome.result.sizes == {"student": larger, "control": spec.size}
    assert bytes_of(local.run(spec), "student") == bytes_of(outcome, "student")
    same = local.run(replace(spec, phases=(distil, replace(labelled, optimizer=other), control)))
    assert bytes_of(same, "student") != bytes_of(outcome, "student")
    assert bytes_of(same, "control") == bytes_of(outcome, "control"), "what came between is not felt"
    made = sorted(path.name.partition("-")[2] for path in Path(".retort/cache/decoded").glob("*.npy"))
    assert {f"square-{size}.npy" for size in (spec.size, larger)} <= set(made)


def test_a_run_that_was_cut_off_in_a_phase_of_another_size_goes_on_to_the_same_bytes(
    distilling: TrainSpec,
) -> None:
    distil, labelled, _ = distilling.phases
    spec = replace(distilling, phases=(distil, replace(labelled, size=distilling.size * 3 // 2, epochs=2)))
    spec = changed(spec, keep="last")
    whole = local.run(spec)
    last = whole.context.asked  # in the last epoch
    cut = local.run(spec, stop_when=lambda asked: asked == last - 1)
    assert cut.said("left_off")[0]["phase"] == "labelled"
    again = local.run(spec, cut.context.checkpoint)
    assert bytes_of(again, "student") == bytes_of(whole, "student")
    assert again.result.sizes == whole.result.sizes == {"student": distilling.size * 3 // 2}


def test_a_larger_size_that_is_no_better_is_not_kept(distilling: TrainSpec) -> None:
    distil, labelled, _ = distilling.phases
    wild = LearningRate(initial=1.0, warmup_epochs=0)
    last = replace(labelled, size=2 * distilling.size, lr=wild)
    spec = replace(distilling, phases=(distil, last), allow_flat_loss=True)
    outcome = local.run(spec)
    assert outcome.result.sizes == {"student": spec.size}
    assert any("stays as it was" in event["said"] for event in outcome.said("note"))
    same = local.run(replace(spec, phases=(distil, replace(last, size=None))))
    assert bytes_of(same, "student") == bytes_of(outcome, "student")
    asked, expected = (one.result.asked["student"] for one in (outcome, same))
    assert np.array_equal(asked["rows"], expected["rows"])
    assert np.array_equal(asked["sure"], expected["sure"]), "asked at the size that it is made for"


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_later_phase_at_chance_ends_alone_and_the_network_stays_as_it_was(
    distilling: TrainSpec, keep: str
) -> None:
    distil, labelled, _ = distilling.phases
    wild = replace(labelled, lr=LearningRate(initial=1.0, warmup_epochs=0))
    outcome = local.run(changed(replace(distilling, phases=(distil, wild)), keep=keep))
    assert not outcome.said("stopped")
    assert outcome.state["scores"]["student"]["phase"] == "distil"
    notes = [event["said"] for event in outcome.said("note")]
    assert any("as by guessing" in said and "The phase ends" in said for said in notes)
    assert any("it stays as it was" in said for said in notes)
    assert not outcome.state["astray"], "of that phase alone"
    assert distilling.distill is not None
    own = replace(distilling, distill=distilling.distill.model_copy(update={"epochs": 2}))
    known = advice.facts(replace(own, phases=(distil, wild)), outcome.result, "student", "student")
    assert [row["phase"] for row in known.main] == ["distil"] * 2
    assert known.epochs_key == "distill.epochs"


def test_a_later_phase_that_goes_astray_within_an_epoch_ends_with_it(
    distilling: TrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    distil, labelled, control = distilling.phases
    steps = iter(range(1000))

    def seen(self: health.Pulse, count: int, sums: Any) -> str | None:
        return "as planted" if next(steps) == 24 else None  # in the first epoch after the first phase

    monkeypatch.setattr(health.Pulse, "__call__", seen)
    outcome = local.run(replace(distilling, phases=(distil, replace(labelled, epochs=3), control)))
    assert not outcome.said("stopped")
    assert [row["phase"] for row in outcome.result.history].count("labelled") == 1
    assert [row["phase"] for row in outcome.result.history].count("control") == 2
    assert any("went astray" in event["said"] for event in outcome.said("note"))


# --- several workers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 4])
def test_more_workers_with_the_same_total_batch_learn_the_same(spec: TrainSpec, workers: int) -> None:
    # without batch norms, which see a worker's share only: then sums differ in their order alone
    still = replace(spec, arch=VIT, start=None, optimizer=Optimizer(momentum=0.9))
    one = local.run(changed(still, batch_size=24))
    several = local.run_group(changed(still, batch_size=24 // workers), workers)
    for ours, theirs in zip(one.result.history, several.result.history, strict=True):
        assert theirs["train_loss"] == pytest.approx(ours["train_loss"], rel=2e-5)
        assert theirs["val_loss"] == pytest.approx(ours["val_loss"], rel=2e-5)
    for name, tensor in one.result.nets["net"].items():
        torch.testing.assert_close(several.result.nets["net"][name], tensor, rtol=1e-3, atol=2e-5)


def test_two_workers_give_the_same_bytes_twice_and_validate_every_row(distilling: TrainSpec) -> None:
    first, again = (local.run_group(distilling, 2) for _ in range(2))
    assert bytes_of(first, "student") == bytes_of(again, "student")
    assert first.result.history == again.result.history
    assert first.result.predictions["student"]["val"].shape == (32,)


# --- where it goes on -------------------------------------------------------------------------------------


def test_a_run_that_was_cut_off_after_an_epoch_goes_on_to_the_same_bytes(
    distilling: TrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = local.run(distilling)

    class CutError(Exception):
        pass

    for cut in (1, 2, 4):  # in the first phase, at its end, in the control
        context = local.LocalContext()
        save = context.save_checkpoint

        def failing(state: Any, context: Any = context, save: Any = save, cut: int = cut) -> None:
            save(state)
            if context.saved == cut:
                raise CutError

        monkeypatch.setattr(context, "save_checkpoint", failing)
        with pytest.raises(CutError):
            trainer.Trainer(context, replace(distilling, workers=1)).run()
        rest = local.run(distilling, checkpoint=context.checkpoint)
        assert rest.said("resumed")
        for net in ("student", "control"):
            assert bytes_of(rest, net) == bytes_of(whole, net)
        assert rest.result.history == whole.result.history


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_run_that_was_asked_to_stop_in_mid_epoch_goes_on_to_the_same_bytes(
    spec: TrainSpec, ema: float | None
) -> None:
    spec = changed(spec, ema=ema)
    whole = local.run(spec)
    stopped = local.run(spec, stop_when=lambda steps: steps >= 11)  # eight steps an epoch
    assert stopped.said("left_off")[0] == {"kind": "left_off", "phase": "finetune", "epoch": 2, "step": 3}
    assert stopped.state["predictions"] == {}
    rest = local.run(spec, checkpoint=stopped.context.checkpoint)
    assert bytes_of(rest) == bytes_of(whole)
    assert rest.result.history == whole.result.history


@pytest.mark.parametrize("ema", [None, 0.9])
def test_workers_agree_on_the_step_at_which_they_stop(spec: TrainSpec, ema: float | None) -> None:
    spec = changed(spec, ema=ema)
    whole = local.run_group(spec, 2)
    stopped = local.run_group(spec, 2, stop_at=6)  # asked of the second worker alone
    assert stopped.state["step"] == 2
    rest = local.run_group(spec, 2, checkpoint=stopped.context.checkpoint)
    assert bytes_of(rest) == bytes_of(whole)
    assert rest.result.history == whole.result.history


def test_a_run_left_off_goes_on_with_another_number_of_workers(spec: TrainSpec) -> None:
    two = local.run_group(spec, 2, stop_at=3)  # of four steps of 24 images
    assert two.state["step"] == 3
    for rest in (local.run(spec, checkpoint=two.context.checkpoint),
                 local.run_group(spec, 4, checkpoint=two.context.checkpoint)):  # fmt: skip
        assert [row["epoch"] for row in rest.result.history] == [1, 2, 3]
        assert rest.result.history[-1]["val_top1"] > 0.5


def test_a_run_left_off_after_an_epochs_last_step_has_the_same_history(spec: TrainSpec) -> None:
    whole = local.run(spec)
    stopped = local.run(spec, stop_when=lambda steps: steps == 8)
    assert stopped.state["step"] == 8
    rest = local.run(spec, checkpoint=stopped.context.checkpoint)
    assert rest.result.history == whole.result.history
    assert bytes_of(rest) == bytes_of(whole)


def test_checkpoints_in_mid_epoch_change_nothing(spec: TrainSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = local.run(spec)
    often = changed(spec, checkpoint_minutes=1e-9)
    outcome = local.run(often)
    assert outcome.context.saved > 20, "after each of 24 steps, each epoch and the end"
    assert bytes_of(outcome) == bytes_of(whole)
    kept: list[bytes | None] = []
    save = local.LocalContext.save_checkpoint

    def noted(self: local.LocalContext, state: Any) -> None:
        save(self, state)
        kept.append(self.checkpoint)

    monkeypatch.setattr(local.LocalContext, "save_checkpoint", noted)
    local.run(often)
    rest = local.run(spec, checkpoint=kept[12])  # as after a lost node
    assert bytes_of(rest) == bytes_of(whole)
    assert rest.result.history == whole.result.history


# --- health -----------------------------------------------------------------------------------------------


def test_a_rate_beyond_all_measure_stops_the_run_waived_or_not(spec: TrainSpec) -> None:
    wild = (Phase("finetune", "net", 3, LearningRate(initial=1e30, warmup_epochs=0)),)
    for waived in (False, True):
        outcome = local.run(replace(spec, phases=wild, waived=waived))
        told = outcome.said("stopped")[0]
        assert told["rule"] == "train.finite"
        assert not told["waivable"]
        assert outcome.context.checkpoint is None, "no epoch was finished"


def test_a_loss_that_stays_flat_stops_the_run_unless_that_is_waived_or_a_result(spec: TrainSpec) -> None:
    flat = replace(spec, phases=(Phase("finetune", "net", 3, LearningRate(initial=1e-12)),), start=None)
    outcome = local.run(flat)
    assert outcome.said("stopped")[0]["rule"] == "train.learns"
    assert outcome.context.saved == 2, "the last good checkpoint is kept"
    waived = local.run(replace(flat, waived=True))
    assert waived.said("stopped")
    assert waived.result.history[-1]["epoch"] == 3, "it went on"
    assert not local.run(replace(flat, allow_flat_loss=True)).said("stopped")


@pytest.mark.parametrize(
    ("change", "usual"),
    [
        ({}, 0.5),
        ({"reference_optimizer": "sgd"}, 0.5),
        ({"reference_optimizer": "adamw"}, 0.1),
        ({"reference_lr": None, "reference_batch": None}, 0.1),
    ],
)
def test_advice_names_the_section_and_the_rate_of_the_optimizer_that_is_used(
    distilling: TrainSpec, change: dict[str, Any], usual: float
) -> None:
    """0.5 at 256 images a step, as the user says, or 0.1, as is published for sgd; here 64 are taken."""
    assert distilling.distill is not None
    told = {"reference_lr": 0.5, "reference_batch": 256, **change}
    spec = changed(replace(distilling, distill=distilling.distill.model_copy(update=told)), batch_size=64)
    spec = replace(spec, who="student")
    setting = trainer.Trainer(local.LocalContext(), spec)._setting(spec.phases[0])
    assert setting.usual == pytest.approx(usual * 64 / 256)
    alone = replace(spec, teacher=None, distill=None, soft_labels=None, phases=spec.phases[2:])
    setting = trainer.Trainer(local.LocalContext(), alone)._setting(alone.phases[0])
    assert setting.who == "student"
    assert spec.key() == replace(spec, who="teacher").key(), "it decides no byte"


def test_the_guard_of_a_gpu_skips_the_update_and_stops_with_the_step(
    spec: TrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the loss is looked at now and then; here on a CPU, the same way."""
    init = watch.StepWatch.__init__
    found: list[bool] = []

    def every_four(self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        self._at_once, self.every, self._next = False, 4, 4

    update = watch.StepWatch.update

    def watched(self: Any, optimizer: torch.optim.Optimizer) -> None:
        before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        update(self, optimizer)
        after = [p for group in optimizer.param_groups for p in group["params"]]
        if self._first_bad >= 0:
            found.append(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))

    monkeypatch.setattr(watch.StepWatch, "__init__", every_four)
    monkeypatch.setattr(watch.StepWatch, "update", watched)
    wild = (Phase("finetune", "net", 3, LearningRate(initial=1e30, warmup_epochs=0)),)
    told = local.run(replace(spec, phases=wild)).said("stopped")[0]
    assert told["rule"] == "train.finite"
    assert "epoch 1, step 2;" in told["message"], "the step that went wrong, not the one that was looked at"
    assert found
    assert all(found), "nothing was changed by a step that is no number"


def test_the_best_epoch_is_kept_not_the_last(spec: TrainSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    recalls = iter([0.5, 0.9, 0.2, 0.5, 0.9, 0.2])
    monkeypatch.setattr(trainer.metrics, "macro_recall", lambda actual, predicted: next(recalls))
    epochs: list[dict[str, bytes]] = []
    copied = trainer._copied

    def noted(module: torch.nn.Module) -> Any:
        tensors = copied(module)
        epochs.append({name: tensor.numpy().tobytes() for name, tensor in tensors.items()})
        return tensors

    monkeypatch.setattr(trainer, "_copied", noted)
    outcome = local.run(spec)
    assert bytes_of(outcome) == epochs[1] != epochs[0]
    assert len(epochs) == 2, "the third was no better"
    assert any("epoch 2 is kept" in event["said"] for event in outcome.said("note"))
    assert bytes_of(local.run(changed(spec, keep="last"))) != bytes_of(outcome)


def test_a_phase_that_makes_the_network_worse_leaves_it_as_it_was(
    spec: TrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = [Phase(name, "net", 1, LearningRate(initial=1e-4)) for name in ("again", "more")]
    three = replace(spec, phases=(spec.phases[0], *short))
    recalls = iter([0.5, 0.9, 0.6, 0.7, 0.95])  # three epochs, one, one
    monkeypatch.setattr(trainer.metrics, "macro_recall", lambda actual, predicted: next(recalls))
    outcome = local.run(three)
    assert any(event["said"].startswith("again: no epoch is better than") for event in outcome.said("note"))
    assert outcome.state["scores"]["net"]["phase"] == "more"
    recalls = iter([0.5, 0.9, 0.6, 0.7, 0.8])
    worse = local.run(three)
    assert worse.state["scores"]["net"]["epoch"] == 2
    assert bytes_of(worse) != bytes_of(outcome)
    recalls = iter([0.5, 0.9, 0.6, 0.1, 0.2])
    assert bytes_of(local.run(three)) == bytes_of(worse)


def test_a_phase_ends_early_when_nothing_gets_better(
    spec: TrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.metrics, "macro_recall", lambda actual, predicted: 0.5)
    monkeypatch.setattr(trainer.Trainer, "_predict", lambda self, module, split, size: (
        np.zeros(32, dtype=np.int64), 1.0))  # fmt: skip
    long = replace(
        changed(spec, patience=2), phases=(replace(spec.phases[0], epochs=9),), allow_flat_loss=True
    )
    assert [row["epoch"] for row in local.run(long).result.history] == [1, 2, 3]


class Projected(Labels):
    """A task with a module of its own, which begins as no change at all."""

    seen: ClassVar[list[torch.Tensor]] = []

    def __init__(self, setup: Setup, network: torch.nn.Module) -> None:
        super().__init__(setup, network)
        self.projector = torch.nn.Linear(4, 4)
        with torch.no_grad():
            self.projector.weight.copy_(torch.eye(4))
            self.projector.bias.zero_()
        self.seen.append(self.projector.weight)

    def forward(self, inputs: torch.Tensor, batch: Any, mix: Any) -> Learnt:
        logits = self.projector(self.network(inputs))
        return Learnt(self.setup.criterion(logits, batch.extra["labels"]), logits)


def test_a_task_may_bring_modules_that_learn(spec: TrainSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a method that compares features needs: a projector, trained, and kept in checkpoints."""
    monkeypatch.setitem(TASKS, "projected", f"{__name__}:Projected")
    own = replace(spec, phases=(replace(spec.phases[0], task="projected"),), allow_flat_loss=True)
    whole = local.run(own)
    learnt = Projected.seen[-1].detach().clone()
    assert not torch.equal(learnt, torch.eye(4)), "it learns"
    names = set(local.run(spec).result.nets["net"])
    assert set(whole.result.nets["net"]) == names, "it is no part of the network"
    stopped = local.run(own, stop_when=lambda steps: steps >= 11)
    assert "projector.weight" in stopped.state["learner"]["task"]
    rest = local.run(own, checkpoint=stopped.context.checkpoint)
    assert bytes_of(rest) == bytes_of(whole)
    assert torch.equal(Projected.seen[-1], learnt)


# --- a step -----------------------------------------------------------------------------------------------


def test_a_batch_in_parts_gives_the_same_gradients(spec: TrainSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    still = changed(replace(spec, arch=VIT, start=None), augment="light")
    whole = local.run(still).result
    begin = learner.Learner.begin_epoch

    def in_parts(self: Any) -> None:
        self.parts = 4
        begin(self)

    monkeypatch.setattr(learner.Learner, "begin_epoch", in_parts)
    parts = local.run(still).result
    for name, tensor in whole.nets["net"].items():
        torch.testing.assert_close(parts.nets["net"][name], tensor, rtol=1e-3, atol=2e-5)


def test_a_batch_is_halved_until_the_memory_holds_it() -> None:
    tried: list[int] = []

    def attempt(count: int) -> None:
        tried.append(count)
        if count > 20:
            raise torch.OutOfMemoryError

    assert precision.fitting_parts(attempt, 64) == 4
    assert tried == [64, 32, 16]

    def never(count: int) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(RetortError, match="memory is too small for a step of 2 images"):
        precision.fitting_parts(never, 64)


def test_gradients_are_clipped_and_a_moving_average_is_kept(spec: TrainSpec) -> None:
    clipped = local.run(replace(spec, optimizer=Optimizer(clip_norm=1e-9)))
    start, end = (clipped.result.history[at]["val_loss"] for at in (0, -1))
    free = local.run(spec).result.history[-1]["val_loss"]
    assert abs(start - end) < abs(start - free), "hardly anything moves"
    averaged = local.run(changed(spec, ema=0.99))
    assert bytes_of(averaged) != bytes_of(local.run(spec))
    assert averaged.result.history[-1]["val_top1"] > 0.5


def test_half_precision_learns_as_well(spec: TrainSpec) -> None:
    half = local.run(changed(spec, precision="bf16")).result
    assert half.history[-1]["val_top1"] > 0.5
    assert next(iter(half.nets["net"].values())).dtype == torch.float32


def test_compilation_begins_where_it_pays_and_all_workers_agree(
    spec: TrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    local.run(spec)
    assert not compiled, "never on a CPU, unless it is asked for"
    local.run(changed(spec, compile=True))
    assert len(compiled) == 1, "once, not in each epoch"
    compiled.clear()
    undecided = precision.Precision(torch.device("cpu"), False, True, None)
    monkeypatch.setattr(precision.Precision, "of", lambda train, device: undecided)
    monkeypatch.setattr(trainer.Pace, "known", property(lambda self: self._epochs > 0))
    assert undecided.pays(1000)
    assert not undecided.pays(100)
    local.run(spec)
    assert not compiled, "there is too little left"
    monkeypatch.setattr(precision.Precision, "pays", lambda self, left: left > 0)
    outcome = local.run(spec)
    assert len(compiled) == 1, "in the second epoch, and it stays"
    assert any("compiling the network: a minute" in event["said"] for event in outcome.said("note"))


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(spec: TrainSpec) -> None:
    still = replace(
        spec, arch=VIT, start=None, phases=(replace(spec.phases[0], epochs=1),), allow_flat_loss=True
    )
    eager, compiled = local.run(changed(still, compile=False)), local.run(changed(still, compile=True))
    for name, tensor in eager.result.nets["net"].items():
        torch.testing.assert_close(compiled.result.nets["net"][name], tensor, rtol=1e-3, atol=1e-4)


def test_only_the_new_rows_learn_where_that_is_asked_for(spec: TrainSpec) -> None:
    outcome = local.run(
        replace(
            spec,
            phases=(Phase("rows", "net", 1, LearningRate(initial=0.1), new_rows=3),),
            allow_flat_loss=True,
        )
    )
    start = trainer.create_network(spec.arch, 4, spec.start, spec.seed).state_dict()
    for name, tensor in outcome.result.nets["net"].items():
        if name.startswith("classifier"):
            assert torch.equal(tensor[:3], start[name][:3])
            assert not torch.equal(tensor[3:], start[name][3:])
        else:
            assert torch.equal(tensor, start[name])


def test_a_class_with_one_image_a_batch_of_two_and_a_waiting_share(spec: TrainSpec) -> None:
    small = replace(changed(spec, batch_size=2), waived=True)  # the rate is that of larger batches
    assert local.run(small).result.history[-1]["val_top1"] > 0.3


def test_weights_that_are_no_number_are_found_at_the_end_of_the_epoch(spec: TrainSpec) -> None:
    setting = health.Setting("teacher", "sgd", 0.02, 0.02, 32, 0.5, None, True, False, "light")
    with pytest.raises(health.Stop):
        health.need_finite(math.nan, "finetune", 1, 8, "none", setting)
    health.need_finite(1.0, "finetune", 1, 8, "none", setting)

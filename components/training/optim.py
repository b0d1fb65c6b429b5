"""Optimizer and schedule, timm's, and what goes with them: moving averages, batch norms."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from components.common.errors import ConfigError
from components.common.progress import counted
from components.models.params import LearningRate, Optimizer
from components.training.tasks import task_of

if TYPE_CHECKING:
    from timm.scheduler.scheduler import Scheduler
    from timm.utils import ModelEmaV3

    from components.training.params import Distill

SCALED = ("sgd",)  # their steps grow with the gradient; the others divide by its size themselves
# A loss whose gradient is tiny where a classifier begins need not be flat where student and teacher nearly
# agree: there the Jensen-Shannon divergence curves a quarter as much as cross-entropy (Taylor, second order),
# for any number of classes, and steps that are larger by more than its inverse go astray.
LEAST_SCALE = 0.25
# in names of weights: PaddleClas's, timm's tags, DeiT's; and what a lineage of ours says of a student
DISTILLED = re.compile(r"ssld|distilled|[._]dist_in|^teacher: ", re.IGNORECASE)
STALE = 1e-3  # share of the statistics that a network began with, left when its training ends


def make_optimizer(module: nn.Module, params: Optimizer) -> torch.optim.Optimizer:
    """timm's optimizer of that name; no weight decay on biases, norms and position embeddings.

    ``layer_decay`` gives layers nearer to the input smaller rates (Clark et al., "ELECTRA", 2020, app. A),
    ``stage_rates`` gives equal parts of the backbone a factor each; the classifier's is 1.

    Raises:
        ConfigError: there are more ``stage_rates`` than layers.
    """
    from timm.optim import create_optimizer_v2

    names = {"sgd": "sgd" if params.momentum > 0 else "momentum"}  # timm's sgd is the one with Nesterov's
    options: dict[str, Any] = {}
    if params.name in ("sgd", "adamw"):
        options["fused"] = True
    if params.name in ("adamw", "lamb"):
        options["betas"] = (params.momentum, 0.999)
    return create_optimizer_v2(
        _staged(module, params) if params.stage_rates else module,
        opt=names.get(params.name, params.name),
        lr=1.0,  # the schedule sets it before the first step
        weight_decay=params.weight_decay,
        momentum=params.momentum,
        layer_decay=params.layer_decay,
        **options,
    )


def _staged(module: nn.Module, params: Optimizer) -> list[dict[str, Any]]:
    """Parameter groups by factor of the rate, and by whether weights decay.

    The parts are a network's stages, as timm groups them, where it has as many; else as many layers each.
    """
    from timm.models import group_parameters

    rates = params.stage_rates or []
    assert callable(module.group_matcher)
    layers = group_parameters(module, module.group_matcher(coarse=True), reverse=True)
    if max(layers.values()) != len(rates):
        layers = group_parameters(module, module.group_matcher(coarse=False), reverse=True)
    head = max(layers.values())  # the classifier's
    if head < len(rates):
        raise ConfigError(
            f"optimizer.stage_rates: {len(rates)} factors, and the backbone has {counted(head, 'layer')}"
        )
    spared = module.no_weight_decay() if hasattr(module, "no_weight_decay") else set()
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        layer = layers.get(name, head)
        factor = 1.0 if layer == head else rates[layer * len(rates) // head]
        decays = parameter.ndim > 1 and name not in spared
        new = {"params": [], "lr_scale": factor, "weight_decay": params.weight_decay if decays else 0.0}
        groups.setdefault((factor, decays), new)["params"].append(parameter)
    return list(groups.values())


def published_stage_rates(arch: str) -> list[float]:
    """Factors for start weights that were distilled: "feature maps are finer, and easily destroyed".

    As PaddleClas publishes them for its SSLD weights ("docs: distillation, application of the distillation
    model"): found on ResNet50_vd (stem and four stages), and on MobileNetV3 (three blocks each), where ten
    data sets gained a point on average; networks that are neither get the milder ones.
    """
    residual = arch.startswith(("resnet", "resnext", "res2net", "seresnet", "hrnet"))
    return [0.1, 0.1, 0.2, 0.2, 0.3] if residual else [0.25, 0.25, 0.5, 0.5, 0.75]


def distilled_source(sources: Iterable[str]) -> str | None:
    """The first of these names, or entries of a lineage, that says that a teacher taught the weights."""
    return next((source for source in sources if DISTILLED.search(_named(source))), None)


def _named(source: str) -> str:
    """What says of a source what it is: a lineage's teacher as it stands, of a path or address its end."""
    return source if source.startswith("teacher: ") else source.rsplit("/", 1)[-1]


def loss_scale(optimizer: Optimizer, task: str, class_num: int, distill: Distill | None) -> float:
    """Size of the task's gradient beside cross-entropy's, where the optimizer's steps follow it; else 1.

    Args:
        task: a name in ``tasks.TASKS``.
        distill: as the task has it: method, label share and temperature are set.
    """
    if optimizer.name not in SCALED or class_num < 2:
        return 1.0
    return max(LEAST_SCALE, task_of(task).gradient_scale(class_num, distill))


def effective_rate(
    lr: float, optimizer: Optimizer, task: str, class_num: int, distill: Distill | None
) -> float:
    """The learning rate that a phase really takes, for one that suits cross-entropy with the same optimizer.

    ``lr / loss_scale``: steps are as long as if the loss were of cross-entropy's size. What is published of a
    network's rate, and what a person sets, is about cross-entropy: that is ``lr``.
    """
    return lr / loss_scale(optimizer, task, class_num, distill)


def fitted(
    lr: LearningRate, optimizer: Optimizer, task: str, class_num: int, distill: Distill | None
) -> tuple[LearningRate, Optimizer]:
    """Rate and optimizer for a task, as if its loss were divided by ``loss_scale``.

    With it the decay of weights, which the rate multiplies too, and the norm at which gradients are clipped
    become those of the loss that was scaled.
    """
    scale = loss_scale(optimizer, task, class_num, distill)
    if scale == 1.0:
        return lr, optimizer
    clip = optimizer.clip_norm
    return (
        lr.model_copy(update={"initial": effective_rate(lr.initial, optimizer, task, class_num, distill)}),
        optimizer.model_copy(
            update={
                "weight_decay": optimizer.weight_decay * scale,
                "clip_norm": None if clip is None else clip * scale,
            }
        ),
    )


class Schedule:
    """The rate of each step: a linear rise, then cosine to zero, constant, or tenths at each third.

    Args:
        optimizer: its groups get the rate, times their ``lr_scale`` where they have one (layer decay).
        steps: of the whole phase.
        warmup_steps: rounded down; step w of n rises to (w + 1) / (n + 1) of the rate.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, lr: LearningRate, steps: int, warmup_steps: float
    ) -> None:
        from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler

        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = lr.initial
        self._optimizer = optimizer
        rise = int(warmup_steps)
        left = max(1, steps - rise)
        common: dict[str, Any] = {
            "warmup_t": rise,
            "warmup_lr_init": lr.initial / (rise + 1),
            "warmup_prefix": True,
        }
        self._scheduler: Scheduler
        if lr.schedule == "cosine":
            self._scheduler = CosineLRScheduler(
                optimizer, t_initial=left, lr_min=0.0, t_in_epochs=False, **common
            )
        else:
            drops = [left // 3 + 1, 2 * left // 3 + 1] if lr.schedule == "step" else []
            self._scheduler = MultiStepLRScheduler(
                optimizer, decay_t=drops, decay_rate=0.1, t_in_epochs=False, **common
            )

    def set(self, step: int) -> float:
        """Give the groups the rate of a step, counted from 0 over the phase; returns it, unscaled."""
        self._scheduler.step_update(step)
        return max(group["lr"] / group.get("lr_scale", 1.0) for group in self._optimizer.param_groups)


def make_ema(module: nn.Module, decay: float) -> ModelEmaV3:
    """A moving average of a network's weights and buffers (Polyak & Juditsky, 1992), timm's.

    Its decay grows from 0 with the steps, so that a short training is not an average with its start weights.
    """
    from timm.utils import ModelEmaV3

    return ModelEmaV3(module, decay=decay, use_warmup=True)


def limit_norm_memory(module: nn.Module, steps: int) -> None:
    """Let batch norms' running statistics keep no more than ``STALE`` of their first values after ``steps``.

    At the usual momentum of 0.1 that takes 66 steps; a small data set has fewer, and would be judged by
    statistics of other images.
    """
    momentum = 1 - STALE ** (1 / steps)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.momentum is not None:
            part.momentum = max(part.momentum, momentum)

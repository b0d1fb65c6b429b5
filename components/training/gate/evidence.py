"""Whether a network's tensors were trained, and belong together: told from them, and from real images.

Four kinds of evidence, each blind to what another one sees:

* **Initial values.** Networks begin with scales of 1, shifts of 0, means of 0 and variances of 1; training
  ends that. Random kernels under trained norms pass.
* **Norms against inputs** (`components/weights/fit.py`). A batch norm remembers mean and variance of every
  channel that came out of the kernel before it. Real images are sent through, each norm works with what it
  now sees, and both are compared: random kernels, kernels in one another's places, and those of another
  training show at their own norm, scaled ones at all. Networks without batch norms, and kernels whose norms
  were measured anew, pass.
* **Kernels against random order** (`kernels.against_random`). In a trained network filters pass more, or
  less, of their own inputs than the same values in random order; random values, and mixed ones, pass as much.
  It speaks after some 25 steps already, needs no norms, and also sees kernels whose norms were measured anew.
  A doubt only where every batch norm fits and no scales tell of a long training: filters may have turned too
  little yet.
* **Kernels against one another** (`kernels.stand_out`). Of kernels of one shape each is tried in each one's
  place; after a short training the own one passes more. Whole blocks that changed places pass nearly. Asked
  where no batch norm tells, and filters have turned far enough. Where filters share directions, as training
  leaves them, but not ones in which these inputs vary, kernels stand in others' places, too.

A network that another training left in the same shapes passes all of them: only its source tells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from components.models import heads
from components.models.dataflow import SIZE
from components.training.gate import kernels
from components.weights.fit import Fit, norm_fits, sure

SETTLED = 66  # batches after which a norm's statistics keep a thousandth of their start, at momentum 0.1
MANY = 1 / 3  # of the norms: so many remember other inputs after no training, however short
ENLARGED = 64  # images of a small size that are enlarged to components.models.dataflow.SIZE as well
SCALED = 0.5  # logarithm of a factor: of trained networks the largest was 0.04, whatever the images
EMPTY = (3, 0.1)  # kernels of zeros, in number and share, that weight decay does not leave
RANDOM = 3.0  # deviations from random order, of all layers together; chance gives that once in 150 networks
TURNED = 10.0  # deviations from which on kernels tell their places
STANDS_OUT = 5.0  # deviations of groups together; see tests/benchmarks/bench_gate.py for what it was set on
SHAPED = 0.2  # spread of norms' scales within a layer, relative, that only a long training leaves
FITTING = (0.25, 0.35)  # deviations that depend on inputs over those that do not: a fault, a doubt
UNTRAINED = 0.5  # share of constant one-dimensional tensors above which a network was never trained


def constant_share(tensors: Mapping[str, Tensor]) -> float:
    """Share of the one-dimensional tensors (norms, biases, running statistics) with one value throughout.

    Networks begin with scales of 1, shifts of 0, means of 0 and variances of 1; training ends that.
    """
    vectors = [t for t in tensors.values() if t.ndim == 1 and t.numel() > 1 and t.is_floating_point()]
    if not vectors:
        return 0.0
    return sum(bool((t == t[0]).all()) for t in vectors) / len(vectors)


@dataclass
class Evidence:
    """What speaks for and against a network's tensors.

    ``faults``: what no trained network shows, each naming tensors; ``doubts``: what few of them do;
    ``measured``, ``limit``: by statistic; ``fits``: every batch norm's; ``places``: every group's of matrices
    of one shape.
    """

    faults: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    limit: dict[str, Any] = field(default_factory=dict)
    fits: list[Fit] = field(default_factory=list)
    places: list[kernels.Group] = field(default_factory=list)


def examine(module: nn.Module, images: Tensor) -> Evidence:
    """Judge a network that was loaded; it is unchanged afterwards.

    Args:
        module: in eval mode; a head is left out of the judgement.
        images: real ones as the network takes them, float32 [N, 3, S, S].
    """
    found = Evidence()
    _initial(module, found)
    _zeros(module, found)
    _norms(module, images, found)
    looked = kernels.layers(module, images)
    _random(module, looked, found)
    _places(module, looked, found)
    return found


def _initial(module: nn.Module, found: Evidence) -> None:
    share = constant_share(module.state_dict())
    found.measured["constant"], found.limit["constant"] = round(share, 4), UNTRAINED
    if share > UNTRAINED:
        found.faults.append(
            f"{share:.0%} of its norms and biases have initial values: these are not trained weights"
        )


def _zeros(module: nn.Module, found: Evidence) -> None:
    """Kernels of zeros, which pass nothing. Weight decay may leave one, so a few are a doubt."""
    own = tuple(f"{name}." for name in heads.names(module))
    weights = {
        name: weight
        for name, weight in module.named_parameters()
        if weight.ndim > 1 and name.endswith("weight") and not (own and name.startswith(own))
    }
    empty = [name for name, weight in weights.items() if not bool(weight.any())]
    if empty:
        many = len(empty) >= EMPTY[0] and len(empty) > EMPTY[1] * len(weights)
        (found.faults if many else found.doubts).append(
            f"{len(empty)} of {len(weights)} kernels are zero throughout: {_some(empty)}"
        )


def _norms(module: nn.Module, images: Tensor, found: Evidence) -> None:
    found.fits = norm_fits(module, _sizes(module, images))
    if not found.fits:
        return
    wrong = sorted((fit for fit in found.fits if fit.unlikely), key=lambda fit: fit.means)
    found.measured["norms"] = f"{len(wrong)} of {len(found.fits)} unlike their inputs"
    found.limit["norms"] = 0
    found.measured["norm_correlation"] = round(median(fit.means for fit in found.fits), 4)
    scale = median(fit.scale for fit in found.fits)
    found.measured["norm_scale"], found.limit["norm_scale"] = round(scale, 4), SCALED
    if abs(scale) > SCALED and not _young(module):
        found.faults.append(
            f"its kernels give values {math.exp(scale):.2g} times as large as its batch norms remember: they "
            "were scaled, or are another training's"
        )
    many = len(wrong) > MANY * len(found.fits)
    if many or (wrong and sure(found.fits) and not _young(module)):
        found.faults.append(
            f"{len(wrong)} of {len(found.fits)} batch norms remember other inputs than their kernels give "
            "on these "
            f"images: {_some([fit.norm for fit in wrong])}; kernels are random, not in their places, or "
            "another "
            "training's"
        )


def _sizes(module: nn.Module, images: Tensor) -> list[Tensor]:
    """Images as they are; and, where they are small, some of them enlarged.

    Of 32 pixels a network for ImageNet leaves one at its end, which varies otherwise than it was trained.
    """
    config: Any = getattr(module, "pretrained_cfg", None) or {}
    if images.shape[-1] >= SIZE or config.get("fixed_input_size"):
        return [images]
    few = images[torch.linspace(0, len(images) - 1, min(len(images), ENLARGED)).long()]
    return [images, nn.functional.interpolate(few, size=(SIZE, SIZE), mode="bilinear", antialias=True)]


def _young(module: nn.Module) -> bool:
    """Whether its norms' statistics saw too few batches to be those of its kernels.

    Counters of 0 say nothing: weights of frameworks without them have none.
    """
    counts = [
        int(norm.num_batches_tracked)
        for norm in module.modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.num_batches_tracked is not None
    ]
    return 0 < max(counts, default=0) < SETTLED


def _random(module: nn.Module, looked: list[kernels.Layer], found: Evidence) -> None:
    """Whether filters are what they would be in random order."""
    if lost := [layer.name for layer in looked if not layer.finite]:
        found.faults.append(f"real images give values that are no numbers, from {lost[0]} on")
        return
    each = kernels.against_random(looked)
    if not each:
        return
    turned = max(kernels.stouffer([one.gain for one in each]), kernels.stouffer([one.spread for one in each]))
    common = kernels.stouffer([one.common for one in each])
    found.measured |= {"turned": round(turned, 2), "common": round(common, 2)}
    found.limit["turned"] = RANDOM
    if max(turned, common) < RANDOM:
        said = (
            f"its {len(each)} kernels pass of these images what they pass with their values in random order "
            f"({_some([one.layer for one in each])}): they are random, or their values are mixed"
        )
        fitting = bool(found.fits) and not any(fit.unlikely for fit in found.fits)
        short = fitting and _scale_spread(module) <= SHAPED  # norms say trained, so filters turned too little
        (found.doubts if _young(module) or short else found.faults).append(said)
    elif common > TURNED and turned < FITTING[1] * common:
        (found.faults if turned < FITTING[0] * common else found.doubts).append(
            "its kernels were trained, but for other inputs than they get: they are not in their places, "
            "or not as they were"
        )


def _places(module: nn.Module, looked: list[kernels.Layer], found: Evidence) -> None:
    """Whether kernels stand in the places that they were trained in.

    A long training also learns what to leave out: of EfficientNet-lite's kernels, trained for ImageNet, the
    own one passes less than others, and on images unlike those it saw neither more nor less. So this is a
    fault after a short training alone, and else a doubt.
    """
    if found.fits:  # batch norms tell it better, whatever the training
        return
    spread = _scale_spread(module)
    found.measured["scales"] = round(spread, 4)
    if found.measured.get("turned", 0) < TURNED:
        return
    found.places = kernels.stand_out(looked)
    if not found.places:
        return
    together = kernels.stouffer([group.deviations for group in found.places])
    found.measured["places"], found.limit["places"] = round(together, 2), STANDS_OUT
    if together < STANDS_OUT:
        worst = min(found.places, key=lambda group: group.deviations)
        (found.faults if 0 < spread < SHAPED else found.doubts).append(
            "kernels of one shape fit the inputs of each other's places as well as of their own "
            f"({_some(list(worst.names))}): they are not in their places"
        )


def _scale_spread(module: nn.Module) -> float:
    """Median over norms of their scales' deviation over their mean size; 0 without such norms."""
    spreads = [
        float(weight.detach().std() / weight.detach().abs().mean().clamp_min(1e-12))
        for part in module.modules()
        if isinstance(weight := getattr(part, "weight", None), Tensor)
        and weight.ndim == 1
        and len(weight) > 1
    ]
    return median(spreads) if spreads else 0.0


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

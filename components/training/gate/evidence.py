"""Whether a network's tensors were trained, and belong together: told from them, and from real images.

Four kinds of evidence, each blind to what another one sees:

* **Initial values.** Networks begin with scales of 1, shifts of 0, means of 0 and variances of 1; training
  ends that. Random kernels under trained norms pass.
* **Norms against inputs** (`components/weights/fit.py`). A batch norm remembers mean and variance of every
  channel that came out of the kernel before it. Real images are sent through, each norm works with what it
  now sees, and both are compared: random kernels, kernels in one another's places, and those of another
  training show at their own norm. Networks without batch norms, and kernels whose norms were measured anew,
  pass.
* **Kernels against inputs.** Training turns a matrix towards the directions in which its own inputs vary. Of
  matrices of one shape each is tried in each one's place: gain = log(tr(W C W') / (|W|^2 tr(C) / d)), C the
  covariance of the inputs there. In a trained network the own matrix stands out, whatever the size of others;
  among random ones, or in one another's places, none does. Whole blocks that changed places pass nearly.
* **Order in kernels.** Training adds a few strong directions to a random matrix: its largest singular value
  then lies above that of the same values in random order (Marchenko-Pastur's edge; Martin & Mahoney,
  "Implicit self-regularization in deep neural networks", JMLR 22, 2021: randomised weights). A short training
  leaves most kernels as they were, so this speaks only where norms tell of a long one.

A network that another training left in the same shapes passes all of them: only its source tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from components.models import heads
from components.models.dataflow import SIZE
from components.weights.fit import Fit, norm_fits, sure

SETTLED = 66  # batches after which a norm's statistics keep a thousandth of their start, at momentum 0.1
MANY = 1 / 3  # of the norms: so many remember other inputs after no training, however short
ENLARGED = 64  # images of a small size that are enlarged to components.models.dataflow.SIZE as well
TOKENS, ROWS = 512, 96  # inputs and outputs of a matrix that its gain is taken over
MEMBERS = (3, 16)  # matrices of one shape among which one can stand out, and how many are tried at most
STANDS_OUT = 3.5  # deviations; see tests/benchmarks/bench_gate.py for what it was set on and tested on
KERNELS = 48  # at most, evenly over the network, whose order is measured
SIDE = 256  # of a matrix whose singular values are taken: larger ones lose rows and columns
ORDERED = 1.02  # largest singular value over that of the same values in random order
SHAPED = 0.2  # spread of norms' scales within a layer, relative, that only a long training leaves
UNTRAINED = 0.5  # share of constant one-dimensional tensors above which a network was never trained


def constant_share(tensors: Mapping[str, Tensor]) -> float:
    """Share of the one-dimensional tensors (norms, biases, running statistics) with one value throughout.

    Networks begin with scales of 1, shifts of 0, means of 0 and variances of 1; training ends that.
    """
    vectors = [t for t in tensors.values() if t.ndim == 1 and t.numel() > 1 and t.is_floating_point()]
    if not vectors:
        return 0.0
    return sum(bool((t == t[0]).all()) for t in vectors) / len(vectors)


@dataclass(frozen=True)
class Group:
    """Matrices of one shape, ``names``: how far the own one stands out in each place, in deviations."""

    names: tuple[str, ...]
    deviations: float


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
    places: list[Group] = field(default_factory=list)


def examine(module: nn.Module, images: Tensor) -> Evidence:
    """Judge a network that was loaded; it is unchanged afterwards.

    Args:
        module: in eval mode; a head is left out of the judgement.
        images: real ones as the network takes them, float32 [N, 3, S, S].
    """
    found = Evidence()
    _initial(module, found)
    _norms(module, images, found)
    _places(module, images, found)
    _order(module, found)
    return found


def _initial(module: nn.Module, found: Evidence) -> None:
    share = constant_share(module.state_dict())
    found.measured["constant"], found.limit["constant"] = round(share, 4), UNTRAINED
    if share > UNTRAINED:
        found.faults.append(
            f"{share:.0%} of its norms and biases have initial values: these are not trained weights"
        )


def _norms(module: nn.Module, images: Tensor, found: Evidence) -> None:
    found.fits = norm_fits(module, _sizes(module, images))
    if not found.fits:
        return
    wrong = sorted((fit for fit in found.fits if fit.unlikely), key=lambda fit: fit.means)
    found.measured["norms"] = f"{len(wrong)} of {len(found.fits)} unlike their inputs"
    found.limit["norms"] = 0
    found.measured["norm_correlation"] = round(median(fit.means for fit in found.fits), 4)
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


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    """Layers that are one matrix for each position, those of the head and its likes left out."""
    own = set(heads.names(module))
    return {
        name: part
        for name, part in module.named_modules()
        if name not in own
        and (
            isinstance(part, nn.Linear)
            or (isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) and part.groups == 1)
        )
    }


def _places(module: nn.Module, images: Tensor, found: Evidence) -> None:
    """Whether matrices stand in the places that they were trained in."""
    if found.fits:  # batch norms tell it better, and after a shorter training
        return
    found.places = stand_out(module, images)
    if not found.places:
        return
    middle = median(group.deviations for group in found.places)
    found.measured["places"], found.limit["places"] = round(middle, 2), STANDS_OUT
    if middle < STANDS_OUT:
        worst = min(found.places, key=lambda group: group.deviations)
        found.faults.append(
            f"matrices of one shape fit the inputs of each other's places as well as of their own "
            f"({_some(list(worst.names))}): kernels are random, or not in their places"
        )


def stand_out(module: nn.Module, images: Tensor) -> list[Group]:
    """For each group of matrices of one shape: how far the own one stands out in its place.

    Args:
        images: float32 [N, 3, S, S].
    """
    layers = _layers(module)
    inputs = _inputs(module, layers, images)
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name in inputs:
        weight: Any = layers[name].weight
        shapes.setdefault(tuple(weight.shape), []).append(name)
    groups = []
    for names in shapes.values():
        if len(names) < MEMBERS[0]:
            continue
        kept = [
            names[place] for place in np.linspace(0, len(names) - 1, min(len(names), MEMBERS[1])).astype(int)
        ]
        gains = np.array([[_gain(_matrix(layers[other]), inputs[place]) for other in kept] for place in kept])
        groups.append(Group(tuple(kept), _deviations(gains)))
    return groups


def _inputs(module: nn.Module, layers: Mapping[str, nn.Module], images: Tensor) -> dict[str, Tensor]:
    """What each layer is given, centred: float32 [TOKENS, d]; layers that are not reached are left out."""
    taken: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def take(part: nn.Module, args: tuple[Any, ...]) -> None:
            given = args[0]
            if isinstance(part, nn.Conv2d):
                given = given.permute(0, 2, 3, 1)
            rows = given.reshape(-1, given.shape[-1])
            places = torch.linspace(0, len(rows) - 1, min(len(rows), TOKENS)).long()
            taken[name] = rows[places] - rows[places].mean(0)

        return take

    hooks = [part.register_forward_pre_hook(hook(name)) for name, part in layers.items()]
    try:
        with torch.inference_mode():
            module(images)
    finally:
        for each in hooks:
            each.remove()
    return taken


def _matrix(part: nn.Module) -> Tensor:
    """Its weights, [ROWS at most, d], evenly over its outputs."""
    weight: Any = part.weight
    whole = weight.detach().flatten(1)
    return whole[torch.linspace(0, len(whole) - 1, min(len(whole), ROWS)).long()]


def _gain(matrix: Tensor, inputs: Tensor) -> float:
    """Logarithm of how much more of these inputs passes than of inputs that vary alike in all directions."""
    passed = float((inputs @ matrix.T).square().sum())
    alike = float(matrix.square().sum()) * float(inputs.square().sum()) / inputs.shape[1]
    return float(np.log(max(passed, 1e-30) / max(alike, 1e-30)))


def _deviations(gains: np.ndarray) -> float:
    """Mean of the diagonal of a doubly centred matrix, in standard errors of what lies beside it."""
    rest = gains - gains.mean(0) - gains.mean(1, keepdims=True) + gains.mean()
    beside = rest[~np.eye(len(rest), dtype=bool)]
    return float(np.diag(rest).mean() / max(float(beside.std()), 1e-12) * len(rest) ** 0.5)


def _order(module: nn.Module, found: Evidence) -> None:
    """Whether kernels are as random as before any training, though norms tell of a long one.

    No more than a doubt: of 27 trained networks one, with three branches a block (RepVGG), looked so.
    """
    spread = _scale_spread(module)
    found.measured["scales"] = round(spread, 4)
    if spread <= SHAPED:
        return
    kernels = _kernels(module)
    few = np.unique(np.linspace(0, len(kernels) - 1, min(len(kernels), KERNELS)).astype(int))
    ratios = [ratio for place in few if (ratio := order(kernels[place])) is not None]
    if not ratios:
        return
    middle = median(ratios)
    found.measured["order"], found.limit["order"] = round(middle, 4), ORDERED
    if middle < ORDERED:
        found.doubts.append(
            f"the scales of its norms were trained (they spread by {spread:.0%}), but its kernels are as "
            "random as "
            f"before any training: their largest singular value is {middle:.2f} times that of random order"
        )


def _kernels(module: nn.Module) -> list[Tensor]:
    own = tuple(f"{name}." for name in heads.names(module))
    return [
        weight.detach()
        for name, weight in module.named_parameters()
        if weight.ndim > 1 and name.endswith("weight") and not (own and name.startswith(own))
    ]


def order(kernel: Tensor) -> float | None:
    """Largest singular value of a kernel over that of the same values in random order; None: it is too small.

    Rows and columns are brought to one norm before, so that their scales count for nothing.

    Args:
        kernel: [out, in, ...]
    """
    matrix = kernel.double().flatten(1)
    matrix = matrix[:SIDE, :SIDE]
    if min(matrix.shape) < 8:
        return None
    generator = torch.Generator().manual_seed(0)
    mixed = matrix.flatten()[torch.randperm(matrix.numel(), generator=generator)].view(matrix.shape)
    own, other = (_largest(_even(each)) for each in (matrix, mixed))
    return own / max(other, 1e-30)


def _largest(matrix: Tensor) -> float:
    """The largest singular value."""
    small = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return float(torch.linalg.eigvalsh(small)[-1]) ** 0.5


def _even(matrix: Tensor) -> Tensor:
    for _ in range(3):
        matrix = matrix / matrix.norm(dim=1, keepdim=True).clamp_min(1e-12)
        matrix = matrix / matrix.norm(dim=0, keepdim=True).clamp_min(1e-12)
    return matrix


def _scale_spread(module: nn.Module) -> float:
    """Median over norms of their scales' deviation over their mean size; 0 without such norms."""
    spreads = [
        float(weight.detach().std() / weight.detach().abs().mean().clamp_min(1e-12))
        for part in module.modules()
        if isinstance(part, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm))
        and (weight := getattr(part, "weight", None)) is not None
        and weight.numel() > 1
    ]
    return median(spreads) if spreads else 0.0


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

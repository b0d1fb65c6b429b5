"""Whether a network's tensors were trained, and belong together: told from them, and from real images.

Three kinds of evidence, each blind to what the next one sees:

* **Initial values.** Networks begin with scales of 1, shifts of 0, means of 0 and variances of 1; training
  ends that. Random kernels under trained norms pass.
* **Norms against inputs.** A batch norm remembers mean and variance of every channel that came out of the
  kernel before it. Real images are sent through, each norm works with what it now sees, and both are
  compared: random kernels, kernels in one another's places, and those of another training show at their own
  norm. Networks without batch norms, and kernels whose norms were measured anew, pass.
* **Order in kernels.** Training adds a few strong directions to a random matrix: its largest singular value
  then lies above that of the same values in random order (Marchenko-Pastur's edge; Martin & Mahoney,
  "Implicit self-regularization in deep neural networks", JMLR 22, 2021: randomised weights). Kernels
  in one another's places pass.

A network that another training left in the same shapes passes all three: only its source tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch import Tensor, nn

from components.weights.fit import Fit, norm_fits, sure

SETTLED = 66  # batches after which a norm's statistics keep a thousandth of their start, at momentum 0.1
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

    ``faults``: what no trained network shows, each naming tensors; ``measured``, ``limit``: by statistic;
    ``fits``: every batch norm's.
    """

    faults: list[str] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    limit: dict[str, Any] = field(default_factory=dict)
    fits: list[Fit] = field(default_factory=list)


def examine(module: nn.Module, images: Tensor) -> Evidence:
    """Judge a network that was loaded; it is unchanged afterwards.

    Args:
        module: in eval mode; a head is left out of the judgement.
        images: real ones as the network takes them, float32 [N, 3, S, S].
    """
    found = Evidence()
    _initial(module, found)
    _norms(module, images, found)
    return found


def _initial(module: nn.Module, found: Evidence) -> None:
    share = constant_share(module.state_dict())
    found.measured["constant"], found.limit["constant"] = round(share, 4), UNTRAINED
    if share > UNTRAINED:
        found.faults.append(
            f"{share:.0%} of its norms and biases have initial values: these are not trained weights"
        )


def _norms(module: nn.Module, images: Tensor, found: Evidence) -> None:
    found.fits = norm_fits(module, [images])
    if not found.fits:
        return
    wrong = sorted((fit for fit in found.fits if fit.unlikely), key=lambda fit: fit.means)
    found.measured["norms"] = f"{len(wrong)} of {len(found.fits)} unlike their inputs"
    found.limit["norms"] = 0
    found.measured["norm_correlation"] = round(median(fit.means for fit in found.fits), 4)
    many = 2 * len(wrong) > len(found.fits)
    if many or (wrong and sure(found.fits) and not _young(module)):
        found.faults.append(
            f"{len(wrong)} of {len(found.fits)} batch norms remember other inputs than their kernels give "
            "on these "
            f"images: {_some([fit.norm for fit in wrong])}; kernels are random, not in their places, or "
            "another "
            "training's"
        )


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


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

"""Whether a network's kernels belong to the running statistics of its batch norms.

Coverage compares names and shapes; kernels that were swapped for others of the same shape, or that another
training left in the file, pass it. But a batch norm remembers what came out of the kernel before it: the mean
and the variance of every channel. Which channels are high and which vary much hardly depends on the images,
so artificial ones tell whether a kernel is the one that the norm behind it was trained with. Kernels without
a norm behind them (squeeze-and-excitation, transformers) cannot be told this way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from components.models.dataflow import image_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

IMAGES = 8
CHANNELS = 16  # below which a correlation may come by chance
# Measured on nine trained networks (ImageNet-1k, Fashion-MNIST; 20 to 64 norms each): behind its own kernel a
# norm's means correlate by 0.32 at least. With two kernels of one shape swapped, 123 of 124 pairs were found,
# by at most two norms; the lowest is then 0.3. Of 26 other networks, some epochs on digits, seven had norms
# below it, but there a tenth of the others was below CLEAR too: see ``sure``.
LEAST_MEANS = 0.3
LEAST_VARIANCES = 0.9  # a norm that sees little but the image knows its variances whatever the means are
CLEAR = 0.85


@dataclass(frozen=True)
class Fit:
    """How well a batch norm's running statistics match its inputs: correlations over its channels, -1..1.

    ``scale``: how much larger its inputs' deviations are than those it remembers, the logarithm's median.
    """

    norm: str
    means: float
    variances: float  # of their logarithms
    scale: float = 0.0

    @property
    def unlikely(self) -> bool:
        """Whether the kernel before it is hardly the one that it was trained behind."""
        return self.means < LEAST_MEANS and self.variances < LEAST_VARIANCES


def norm_fits(module: nn.Module, images: Sequence[Tensor] = ()) -> list[Fit]:
    """How each batch norm of a network fits its inputs, in the order in which they compute.

    Each norm works with the statistics of these inputs, so that one wrong kernel shows at its own norm and
    not at all that follow. Norms that no training has touched (one value throughout) say nothing and are left
    out, as are those of few channels. The network is unchanged afterwards.

    Args:
        module: in eval mode: float32 [N, 3, H, W] -> anything.
        images: real ones, float32 [N, 3, S, S] each as the network takes them; the artificial ones then have
            the last's size. A norm keeps its best correlations: which images it was trained on is not asked.
    """
    judged: dict[str, Any] = {name: norm for name, norm in module.named_modules() if _tells(norm)}
    found: dict[str, Fit] = {}
    kept = {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in judged.items()}

    def compare(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        known_mean, known_variance = kept[name]

        def hook(norm: Any, inputs: tuple[Tensor, ...]) -> None:
            variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3))
            means = _correlation(mean, known_mean)
            variances = _correlation(_logarithms(variance), _logarithms(known_variance))
            scale = float((_logarithms(variance) - _logarithms(known_variance)).median()) / 2
            before = found.get(name, Fit(name, -1.0, -1.0, float("inf")))
            found[name] = Fit(
                name,
                max(means, before.means),
                max(variances, before.variances),
                min(scale, before.scale, key=abs),
            )
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)

        return hook

    hooks = [norm.register_forward_pre_hook(compare(name)) for name, norm in judged.items()]
    try:
        if judged:
            with torch.inference_mode():
                size = images[-1].shape[-1] if images else image_size(module)
                for batch in (*images, *_images(size)):
                    module(batch)
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for name, (mean, variance) in kept.items():
                norm = judged[name]
                norm.running_mean.copy_(mean)
                norm.running_var.copy_(variance)
    return list(found.values())


def sure(fits: list[Fit]) -> bool:
    """Whether unlikely norms say something of the kernels: the others fit well, or hardly any norm fits.

    In between, the training was short, or its images were too unlike the artificial ones.
    """
    others = [fit.means for fit in fits if not fit.unlikely]
    return 2 * len(others) < len(fits) or float(np.quantile(others, 0.1)) >= CLEAR


def _tells(norm: nn.Module) -> bool:
    """Whether it is a batch norm over maps whose statistics were trained, of enough channels."""
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
        return False
    mean, variance = norm.running_mean, norm.running_var
    return len(mean) >= CHANNELS and bool((mean != mean[0]).any() and (variance != variance[0]).any())


def _logarithms(variances: Tensor) -> Tensor:
    return variances.double().clamp_min(1e-12).log()


def _correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's; 0 where one of them is constant."""
    value = float(torch.corrcoef(torch.stack([one.double(), other.double()]))[0, 1])
    return value if np.isfinite(value) else 0.0


def _images(size: int) -> tuple[Tensor, ...]:
    """Artificial images of three kinds, each float32 [IMAGES, 3, size, size], around mean 0 and deviation 1.

    Clouds, whose amplitudes fall with frequency as in photographs (Field, "Relations between the statistics
    of natural images and the response properties of cortical cells", J. Opt. Soc. Am. A 4, 1987): colours go
    together for the most part; brightness and contrast differ from image to image. Drawings: what rises
    above the middle of a cloud is ink, on dark ground, and the same on light ground.
    """
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = 1 / size
    shape = (IMAGES, 4, size, size // 2 + 1)
    spectrum = rng.normal(size=shape) + 1j * rng.normal(size=shape)
    clouds = np.fft.irfft2(spectrum / frequency, s=(size, size))
    clouds -= clouds.mean((2, 3), keepdims=True)
    clouds /= clouds.std((2, 3), keepdims=True)
    coloured = clouds[:, :1] + 0.3 * clouds[:, 1:]
    contrast, brightness = rng.uniform(0.5, 1.3, (IMAGES, 1, 1, 1)), rng.normal(0, 0.6, (IMAGES, 1, 1, 1))
    ink = np.repeat(2.0 * (clouds[:, :1] > 0.8) - 1, 3, axis=1)
    kinds = (coloured * contrast + brightness, ink, -ink)
    return tuple(torch.from_numpy(images.astype(np.float32)) for images in kinds)

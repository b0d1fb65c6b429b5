"""Networks: what folding changes in their outputs, and what a head of 100,000 classes costs (issue 5)."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch
from torch import nn

from components.export import graph
from components.models import acb, build
from components.models.params import Arch
from tests.benchmarks.measure import Row, at_most
from tests.components.models.test_acb import stir

CLASSES, WIDTH = 100_000, 256
BACKBONE = "resnet50d"
FOLDED = (
    ("resnet18d", "acb"),  # d = 3
    ("resnet18", "acb"),  # d = 3, and 7 in the stem
    ("mobilenetv3_small_100", "acb"),  # d = 3 and 5, depthwise
    ("convnext_atto", "acb"),  # d = 2, 4 and 7, with biases
    ("tf_efficientnet_lite0", "acb"),  # TensorFlow's padding
    ("repvgg_a0", "plain"),
    ("repvgg_b0", "plain"),
)


def measure(seeds: int) -> list[Row]:
    """Folding on random weights and running statistics; then the two heads, each in a process of its own."""
    return _blocks(seeds) + _networks(seeds) + _heads()


@torch.inference_mode()
def _apart(module: nn.Module, images: torch.Tensor) -> tuple[float, int]:
    """max|a - b| / max|b| of a network folded and not, and how many blocks were folded."""
    folded, blocks = graph.fold(module)
    a, b = folded(images), module(images)
    return float((a - b).abs().max() / b.abs().max()), blocks


def _blocks(seeds: int) -> list[Row]:
    rows = []
    for d in (2, 3, 4, 5, 7, 9):
        worst = 0.0
        for seed in range(seeds):
            torch.manual_seed(seed)
            for groups, stride in ((1, 1), (1, 2), (32, 1)):
                conv = nn.Conv2d(32, 64, d, stride=stride, padding=d // 2, groups=groups)
                apart, _ = _apart(nn.Sequential(stir(acb.ACB(conv))), torch.randn(4, 32, 28, 28))
                worst = max(worst, apart)
        rows.append(at_most(f"ACB block folded, d = {d}: max|a-b| / max|b|", worst, 1e-5, ""))
    return rows


def _networks(seeds: int) -> list[Row]:
    rows = []
    for name, blocks in FOLDED:
        worst, count = 0.0, 0
        for seed in range(seeds):
            torch.manual_seed(seed)
            module = stir(build.create(Arch(name=name, blocks=blocks), 100))
            apart, count = _apart(module, torch.randn(4, 3, 96, 96))
            worst = max(worst, apart)
        what = f"{name}, ACB" if blocks == "acb" else name
        note = f"{count} blocks, worst of {seeds} seeds"
        rows.append(at_most(f"{what}, folded: max|a-b| / max|b|", worst, 1e-5, "", note))
    return rows


CHILD = r"""
import json, re, statistics, sys, time
from pathlib import Path
import torch
from torch import nn
from components.models import build
from components.models.heads import Bottleneck
from components.models.params import Arch, Head

part, width, classes, arch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
# not getrusage: its peak begins with that of the process that started this one
peak = lambda: 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
bare = peak()
torch.manual_seed(0)
if part == "head":
    module = Bottleneck(2048, width, classes) if width else nn.Linear(2048, classes)
    inputs = torch.randn(8, 2048)
else:
    module = build.create(Arch(name=arch, head=Head(bottleneck=width or None)), classes)
    inputs = torch.randn(8, 3, 64, 64)
labels = torch.randint(classes, (8,))
optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, nesterov=True)
taken = []
for step in range(7):
    started = time.perf_counter()
    optimizer.zero_grad()
    nn.functional.cross_entropy(module(inputs), labels).backward()
    optimizer.step()
    taken.append(time.perf_counter() - started)
print(json.dumps({
    "parameters": sum(tensor.numel() for tensor in module.parameters()),
    "seconds": statistics.median(taken[2:]),
    "peak": peak() - bare,
}))
"""


def _child(part: str, width: int) -> dict[str, Any]:
    command = [sys.executable, "-c", CHILD, part, str(width), str(CLASSES), BACKBONE]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _heads() -> list[Row]:
    """One training step of 8 images: forward, backward, SGD with momentum; median of 5 after 2."""
    rows = []
    titles = {
        "head": f"head alone, 2048 -> {CLASSES:,}",
        "network": f"{BACKBONE} with it, 64 px",
    }
    for part, title in titles.items():
        found = {"plain": _child(part, 0), f"bottleneck {WIDTH}": _child(part, WIDTH)}
        for head, values in found.items():
            name = f"{title}, {head}"
            rows += [
                Row(f"{name}: parameters", values["parameters"] / 1e6, "M"),
                Row(f"{name}: file in float32", 4 * values["parameters"] / 1e6, "MB"),
                Row(f"{name}: training step, batch 8", 1000 * values["seconds"], "ms"),
                Row(f"{name}: peak memory", values["peak"] / 1e6, "MB", note="above the bare process"),
            ]
        plain, narrow = found.values()
        for what, key in (("parameters", "parameters"), ("training step", "seconds"), ("memory", "peak")):
            rows.append(
                Row(f"{title}: {what}, plain to bottleneck", plain[key] / narrow[key], "x", note="one run")
            )
    return rows

"""Train a small network from one input path and print images/s of each epoch; a program of its own.

``bench_training`` runs it, with this commit's code or an earlier one's on PYTHONPATH:
    python input_path.py (before|now|timm) (decoded|jpeg) RECIPE LOADER_PROCESSES MANIFEST ROOT
timm's loader is the one that its train.py makes (``create_loader``: its wheel has that, not the script), with
the same network, step and batch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SIZE, BATCH, EPOCHS, THREADS = 128, 32, 3, 2
MEAN = STD = [0.5, 0.5, 0.5]


def before(
    kind: str, recipe: str, processes: int, manifest: Path, root: str
) -> Callable[..., Iterator[Tensor]]:
    from components.training import loader  # type: ignore[attr-defined]

    decoded = loader.decode_all(manifest, root, SIZE) if kind == "decoded" else None
    views = loader.Views(loader.open_samples(manifest, root, SIZE, decoded), recipe, 7)
    normalise = loader.Normalise(MEAN, STD, torch.device("cpu"))

    def epoch(number: int, parts: list[np.ndarray]) -> Iterator[Tensor]:
        batches = [loader.pairs(part, number) for part in parts]
        return map(normalise, loader.load(views, batches, processes))

    return epoch


def now(kind: str, recipe: str, processes: int, manifest: Path, root: str) -> Callable[..., Iterator[Tensor]]:
    from components.training.augmentation import RECIPES, Augment
    from components.training.inputs.feed import open_feed
    from components.training.inputs.index import open_index
    from components.training.inputs.pictures import open_store
    from components.training.normalise import Normalise
    from components.training.sampling import Draw

    limit = None if kind == "decoded" else 0
    store = open_store(open_index(manifest), root, SIZE, RECIPES[recipe].source, limit=limit)
    cpu = torch.device("cpu")
    feed = open_feed(store.learn, Augment(recipe, 7, SIZE), cpu, processes, threads=THREADS)
    normalise = Normalise(MEAN, STD, cpu)

    def epoch(number: int, parts: list[np.ndarray]) -> Iterator[Tensor]:
        draws = [Draw(part, np.full(len(part), number), len(part)) for part in parts]
        return (normalise(batch.pixels) for batch in feed(draws))

    return epoch


def timm(
    kind: str, recipe: str, processes: int, manifest: Path, root: str
) -> Callable[..., Iterator[Tensor]]:
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", root=root, is_training=True), (3, SIZE, SIZE), BATCH, is_training=True,
        use_prefetcher=False, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), hflip=0.5, color_jitter=0.4,
        interpolation="random", mean=MEAN, std=STD, num_workers=processes, persistent_workers=processes > 0,
    )  # fmt: skip

    def epoch(number: int, parts: list[np.ndarray]) -> Iterator[Tensor]:
        return (images.contiguous(memory_format=torch.channels_last) for images, _ in loader)

    return epoch


def main() -> None:
    who, kind, recipe, processes, manifest, root = sys.argv[1:]
    import timm as networks

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    module: Any = networks.create_model("mobilenetv3_small_100", num_classes=10)
    module = module.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=True)
    ways = {"before": before, "now": now, "timm": timm}
    epoch = ways[who](kind, recipe, int(processes), Path(manifest), root)
    from components.dataset.manifest import check

    rows = np.random.default_rng(0).permutation(check(Path(manifest)).num_rows)
    parts = [rows[start : start + BATCH].astype(np.int64) for start in range(0, len(rows), BATCH)]
    rates = []
    for number in range(EPOCHS):
        started, count = time.perf_counter(), 0
        for inputs in epoch(number, parts):
            labels = torch.zeros(len(inputs), dtype=torch.long)
            loss = torch.nn.functional.cross_entropy(module(inputs), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            count += len(inputs)
        rates.append(count / (time.perf_counter() - started))
    print(json.dumps(rates), flush=True)
    os._exit(0)  # loader processes are not waited for


if __name__ == "__main__":
    main()

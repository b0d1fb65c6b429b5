"""Small networks of many architectures, trained on real images for some hundred steps, kept below .retort.

Images: scikit-learn's digits always; Fashion-MNIST and an image folder (``RETORT_PHOTOS``: class/**) where
they are there. The networks are what ``bench_gate`` judges and spoils.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from components.common.storage import atomic_path, state_dir
from components.models import build
from components.models.params import Arch
from tests.benchmarks import fashion

SIZE, BATCH = 32, 64
PHOTOS = os.environ.get("RETORT_PHOTOS", "")
A_CLASS = 500  # images of a class that are read
HELD_OUT = 5  # of so many images one is not trained on


@dataclass(frozen=True)
class Member:
    """A network: ``rate`` 0 leaves it as it began. Rates below 0.01 are AdamW's, above SGD's."""

    arch: str
    images: str
    rate: float = 0.002
    steps: int = 160
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.arch}-{self.images}-{self.steps}-{self.rate:g}-{self.seed}"


@cache
def images(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Real images, uint8 [n, SIZE, SIZE, 3], in a fixed random order, and their labels; none: empty."""
    rng = np.random.default_rng(0)
    if kind == "digits":
        from sklearn.datasets import load_digits

        found = load_digits()
        pixels = (found.images * 255 / 16).astype(np.uint8)
        labels = found.target
    elif kind == "fashion":
        if not fashion.there("networks trained on Fashion-MNIST"):
            return np.zeros((0, SIZE, SIZE, 3), np.uint8), np.zeros(0, np.int64)
        pixels, labels = (each[:6000] for each in fashion.read())
    else:
        return _folder(Path(PHOTOS) if kind == "photos" else Path(kind))
    large = np.stack([np.asarray(Image.fromarray(one).resize((SIZE, SIZE))) for one in pixels])
    order = rng.permutation(len(large))
    return np.repeat(large[..., None], 3, axis=3)[order], labels.astype(np.int64)[order]


def _folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    if not folder.is_dir() or folder == Path():
        print(f"networks trained on photographs: left out, RETORT_PHOTOS is '{folder}'", file=sys.stderr)
        return np.zeros((0, SIZE, SIZE, 3), np.uint8), np.zeros(0, np.int64)
    pixels, labels = [], []
    for label, one in enumerate(sorted(entry for entry in folder.iterdir() if entry.is_dir())):
        files = sorted(file for file in one.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
        for file in files[:A_CLASS]:
            pixels.append(np.asarray(Image.open(file).convert("RGB").resize((SIZE, SIZE))))
            labels.append(label)
    order = np.random.default_rng(0).permutation(len(labels))
    return np.stack(pixels)[order], np.array(labels)[order]


def inputs(pixels: np.ndarray, arch: str) -> torch.Tensor:
    """Normalised as the architecture expects it: float32 [n, 3, SIZE, SIZE]."""
    mean, std = build.preprocessing(Arch(name=arch))
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def held_out(kind: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images that no network of the zoo was trained on."""
    pixels, labels = images(kind)
    return pixels[::HELD_OUT][:count], labels[::HELD_OUT][:count]


def network(member: Member) -> nn.Module:
    """The network, trained now or read from ``.retort/zoo``; in eval mode, with its head."""
    torch.manual_seed(member.seed)
    labels = images(member.images)[1]
    module = build.create(Arch(name=member.arch), int(labels.max()) + 1)
    path = state_dir("zoo") / f"{member.name}.pt"
    if path.exists():
        module.load_state_dict(torch.load(path, weights_only=True))
    elif member.rate:
        with _turn():
            _train(module, member)
        with atomic_path(path) as partial:
            torch.save(module.state_dict(), partial)
    return module.eval()


@contextmanager
def _turn() -> Iterator[None]:
    """Wait for one's turn, where ``RETORT_TURN`` names a file that others lock, too."""
    path = os.environ.get("RETORT_TURN")
    if not path:
        yield
        return
    import fcntl

    with Path(path).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _train(module: nn.Module, member: Member) -> None:
    pixels, labels = images(member.images)
    kept = np.arange(len(labels)) % HELD_OUT != 0
    pixels, targets = pixels[kept], torch.from_numpy(labels[kept])
    rng = np.random.default_rng(member.seed)
    adamw = member.rate < 0.01
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(module.parameters(), member.rate, weight_decay=0.05)
        if adamw
        else torch.optim.SGD(module.parameters(), member.rate, momentum=0.9, weight_decay=1e-4, nesterov=True)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, member.rate, total_steps=member.steps, pct_start=0.15
    )
    module.train()
    right = 0.0
    for _ in range(member.steps):
        rows = rng.integers(0, len(targets), BATCH)
        batch = pixels[rows]
        if member.images != "digits" and rng.random() < 0.5:
            batch = batch[:, :, ::-1]
        logits = module(inputs(np.ascontiguousarray(batch), member.arch))
        logits = logits[0] if isinstance(logits, tuple) else logits
        right = 0.95 * right + 0.05 * float((logits.argmax(1) == targets[rows]).float().mean())
        loss = nn.functional.cross_entropy(logits, targets[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    print(f"zoo: {member.name}: {right:.0%} of the last training images", file=sys.stderr, flush=True)

"""Start weights in the layout of ``ResNet50_vd_10w_pretrained.tar``: values made here, no FC."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from components.models import build
from components.models.params import Arch
from components.weights import paddle
from tests.components.weights.conftest import PADDLE, lodtensor, tar_of
from tests.own_data.pictures import picture

NAME = "ResNet50_vd_10w_pretrained"
STEPS, BATCH, SIZE = 24, 12, 64


def large_scale_weights(place: Path, subjects: list[str], numbers: range) -> Path:
    """One LoDTensor file a variable, by the static graph's names, as that network's backbone is published.

    The published file learnt from 43 million images of 100,000 classes. This one learnt for a few steps from
    ``subjects``: enough that its statistics are those of images.
    """
    torch.manual_seed(0)
    arch = Arch(name="resnet50d")
    module = build.create(arch, len(subjects))
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in build.preprocessing(arch))
    shown = [(subject, number) for number in numbers for subject in range(len(subjects))]
    pixels = np.stack(
        [
            np.asarray(picture(subjects[subject], number).resize((SIZE, SIZE))).transpose(2, 0, 1)
            for subject, number in shown
        ]
    )
    inputs = (torch.from_numpy(pixels).float() / 255 - mean) / std
    labels = torch.tensor([subject for subject, _ in shown])
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-4)
    module.train()
    for step in range(STEPS):
        here = torch.arange(step * BATCH, (step + 1) * BATCH) % len(labels)
        optimizer.zero_grad()
        functional.cross_entropy(module(inputs[here]), labels[here]).backward()
        optimizer.step()
    named = json.loads((PADDLE / "names.json").read_text(encoding="utf-8"))["ResNet50_vd"]
    files = [static for _, static, _ in named if not static.startswith("fc")]
    published = paddle.recognise(files)
    assert published is not None
    assert published.name == "ResNet50_vd"
    tensors = module.state_dict()
    path = place / f"{NAME}.tar"
    path.write_bytes(
        tar_of({f"{NAME}/{name}": lodtensor(tensors[published.names[name]].numpy()) for name in files})
    )
    return path

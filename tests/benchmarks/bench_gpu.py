"""Training on one GPU beside what the same card does with the same networks, in one run.

Example: python -m tests.benchmarks gpu. Without a GPU it says so, and measures nothing. Images are crops of
the two photographs that come with scikit-learn, saved as JPEG files of 500 x 375 pixels.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.nn import functional

from components.audit.plan_schema import Plan
from components.dataset import manifest
from components.models import build, checkpoint
from components.models.card import ModelCard
from components.models.params import Arch, LearningRate, Optimizer, Train, Valid
from components.training import cluster, trainer
from components.training.inputs import pictures
from components.training.inputs.feed import open_feed
from components.training.labeller import ask_teacher
from components.training.params import Distill, Ray
from components.training.spec import Phase, TrainSpec
from components.training.teacher import Teacher
from tests.benchmarks.measure import Row, at_least, at_most
from tests.components.training import local

IMAGES, VALIDATION, CLASSES = 16_384, 512, 100
SIZE = 224
NETWORKS = {"resnet50d": 256, "mobilenetv3_small_100": 512}  # and the batch of each
REFERENCE = {"resnet50d": 5_261, "mobilenetv3_small_100": 19_607}  # images/s of an H100, measured in 2026
STEPS, WARM = 40, 15  # timed, and before


def measure(seeds: int) -> list[Row]:
    if not torch.cuda.is_available():
        print("gpu: no GPU is here: nothing is measured", file=sys.stderr)
        return []
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        os.environ["RETORT_STATE"] = f"{folder}/.retort"
        spec = _spec(Path(folder))
        for name, batch in NETWORKS.items():
            bare = _card(name, batch)
            print(f"    {name}: the card alone {bare:,.0f} images/s", file=sys.stderr, flush=True)
            own = replace(
                spec, arch=Arch(name=name), train=spec.train.model_copy(update={"batch_size": batch})
            )
            ours = _trained(own)
            note = f"an H100 alone did {REFERENCE[name]:,}"
            rows += [
                Row(f"{name}, batch {batch}: the card alone", bare, "images/s", note=note),
                Row(f"{name}: training, decoded images", ours, "images/s"),
                at_least("  of the card's own rate", ours / bare, 0.9, "x"),
            ]
            if name == "resnet50d":
                with _nothing_kept(Path(folder)):
                    jpeg = _trained(_loaders(own), epochs=3)
                rows += [
                    Row(f"{name}: training from JPEG files, {_cores()} processes", jpeg, "images/s"),
                    at_least("  of the card's own rate", jpeg / bare, 0.9, "x"),
                ]
        rows += _labels(spec, Path(folder))
        rows.append(_first_step(spec, Path(folder)))
    return rows


def _cores() -> int:
    return max(1, len(os.sched_getaffinity(0)) - 2)


def _loaders(spec: TrainSpec) -> TrainSpec:
    return replace(spec, train=spec.train.model_copy(update={"num_workers": _cores()}))


@contextmanager
def _nothing_kept(folder: Path) -> Iterator[None]:
    """As if nothing was decoded yet, and the disk had no room for it."""
    state, os.environ["RETORT_STATE"] = os.environ["RETORT_STATE"], f"{folder}/.other"
    share, pictures.DISK_SHARE = pictures.DISK_SHARE, 0.0
    try:
        yield
    finally:
        pictures.DISK_SHARE, os.environ["RETORT_STATE"] = share, state


def _spec(folder: Path) -> TrainSpec:
    """Images, their manifest, and a training with everything as it is by default on a GPU."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    entries: list[dict[str, Any]] = []
    for i in range(IMAGES + VALIDATION):
        split = "train" if i < IMAGES else "val"
        photograph = photographs[i % len(photographs)]
        side = rng.uniform(0.4, 1.0)
        width, height = int(photograph.width * side), int(photograph.height * side)
        left, top = (
            int(rng.integers(0, most + 1)) for most in (photograph.width - width, photograph.height - height)
        )
        path = folder / "images" / split / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph.crop((left, top, left + width, top + height)).resize((500, 375)).save(path, quality=90)
        content = path.read_bytes()
        entries.append(
            {
                "path": f"{split}/{path.name}",
                "label": i % CLASSES,
                "class_name": f"class {i % CLASSES}",
                "split": split,
                "source": "real",
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )
    place = folder / "clean.parquet"
    manifest.write(pa.Table.from_pylist(entries, schema=manifest.SCHEMA), place)
    return TrainSpec(
        manifest=place,
        root=str(folder / "images"),
        size=SIZE,
        seed=0,
        class_names=tuple(f"class {label}" for label in range(CLASSES)),
        plan=Plan(),
        arch=Arch(name="resnet50d"),
        start=None,
        optimizer=Optimizer(name="sgd"),
        train=Train(batch_size=256, augment="standard", compile=True),
        valid=Valid(batch_size=512),
        phases=(Phase("bench", "net", 1, LearningRate(initial=0.01)),),
        threads=_cores(),
        workers=1,
        allow_flat_loss=True,
    )


def _trained(spec: TrainSpec, epochs: int = 4) -> float:
    """Images a second of the trainer itself, in the epochs after the first, which compiles."""
    outcome = local.run(
        replace(spec, phases=(replace(spec.phases[0], epochs=epochs),)), device=torch.device("cuda")
    )
    for event in outcome.said("note"):
        print(f"    {event['said']}", file=sys.stderr, flush=True)
    speeds = [event["images_per_second"] for event in outcome.said("speed")]
    print(f"    by epoch: {', '.join(f'{speed:,.0f}' for speed in speeds)}", file=sys.stderr, flush=True)
    return median(speeds[1:])


def _card(name: str, batch: int) -> float:
    """Images a second of a bare loop: uint8 images on the card, crop and flip there, bf16, compiled."""
    device = torch.device("cuda")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch.use_deterministic_algorithms(False)
    arch = Arch(name=name)
    module = build.create(arch, CLASSES).to(device).to(memory_format=torch.channels_last).train()
    network = torch.compile(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=True)
    held = torch.randint(0, 256, (4 * batch, 3, SIZE, SIZE), dtype=torch.uint8, device=device)
    labels = torch.randint(0, CLASSES, (4 * batch,), device=device)
    mean, std = (
        torch.tensor(part, device=device).view(1, 3, 1, 1) * 255 for part in build.preprocessing(arch)
    )

    def step(number: int) -> None:
        at = torch.randint(0, len(held), (batch,), device=device)
        theta = torch.zeros(batch, 2, 3, device=device)
        theta[:, 0, 0] = torch.rand(batch, device=device) * 0.4 + 0.6
        theta[:, 1, 1] = torch.rand(batch, device=device) * 0.4 + 0.6
        theta[:, 0, 0] *= torch.where(torch.rand(batch, device=device) < 0.5, -1.0, 1.0)
        grid = functional.affine_grid(theta, [batch, 3, SIZE, SIZE], align_corners=False)
        images = functional.grid_sample(held[at].float(), grid, align_corners=False)
        inputs = ((images - mean) / std).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = functional.cross_entropy(network(inputs), labels[at])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return batch / _seconds(step)


def _seconds(step: Callable[[int], object]) -> float:
    for number in range(WARM):
        step(number)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for number in range(STEPS):
        step(number)
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / STEPS


def _labels(spec: TrainSpec, folder: Path) -> list[Row]:
    """Soft labels of every training image, beside the teacher's bare inference in the same precision."""
    arch = Arch(name="resnet50d")
    module = build.create(arch, CLASSES).eval()
    mean, std = build.preprocessing(arch)
    (folder / "teacher").mkdir()
    card = ModelCard(
        arch=arch, class_names=list(spec.class_names), input_size=[3, SIZE, SIZE],
        mean=list(mean), std=list(std),
        data_fingerprint=manifest.fingerprint(spec.manifest), lineage=[], sha256="",
    )  # fmt: skip
    checkpoint.save(folder / "teacher/model.safetensors", folder / "teacher/model.json", module, card)
    context = local.LocalContext(device=torch.device("cuda"))
    own = replace(spec, valid=Valid(batch_size=512), teacher=folder / "teacher", distill=Distill(crops=1))
    made = trainer.Trainer(context, replace(own, soft_labels=folder / "labels"))
    teacher = Teacher(folder / "teacher", made.precision)
    pixels = torch.randint(0, 256, (512, 3, SIZE, SIZE), dtype=torch.uint8, device="cuda")
    bare = 512 / _seconds(lambda _: teacher(pixels).probabilities)
    with open_feed(made.store.learn, made.augment, made.precision.device) as feed:  # images go to the card
        started = time.perf_counter()
        ask_teacher(
            made.spec, made.index, made.labelled, made.augment, feed, made.precision, made.group, None,
            made.reporter,
        )  # fmt: skip
        rate = IMAGES / (time.perf_counter() - started)
    return [
        Row("resnet50d: bare inference", bare, "images/s", note="bf16, not compiled"),
        Row("building soft labels", rate, "images/s"),
        at_least("  of bare inference", rate / bare, 0.85, "x"),
    ]


def _first_step(spec: TrainSpec, folder: Path) -> Row:
    """Seconds from the call, with Ray still to be started, to the first step's end; not compiled."""
    ray = Ray(workers=1, gpus_per_worker=1, cpus_per_worker=_cores())
    own = replace(spec, train=spec.train.model_copy(update={"compile": False}))
    found: list[float] = []

    def hear(event: dict[str, Any]) -> None:
        if event["kind"] == "progress" and not found:
            found.append(time.perf_counter())

    started = time.perf_counter()
    with cluster.running(ray):
        cluster.fit(trainer.train, own, ray, folder / "checkpoints" / "first", hear)
    return at_most("first step after the call, Ray's start included", found[0] - started, 15, "s")

"""What can be known to be wrong before training starts: rows, batches, shared memory, disk, the network."""

from __future__ import annotations

import torch

from components.common import progress
from components.common.errors import RetortError
from components.common.progress import say
from components.common.step import Run
from components.common.storage import human_bytes, need_disk, state_dir
from components.dataset import manifest as manifests
from components.models import build, heads
from components.training import engine, loader
from components.training.params import Ray

VIT_IMAGES = 14_000_000  # ImageNet-21k: from there on a transformer does without strong augmentation
DEIT_IMAGES = 1_281_167  # ImageNet-1k: enough with it


def preflight(run: Run, job: engine.Job, ray: Ray, where: str) -> None:
    """What can be known to be wrong before anything starts: rows, batch sizes, shared memory, disk.

    Args:
        where: the section of params.yaml that the batch sizes come from, such as ``teacher``.

    Raises:
        FindingsError: when /dev/shm is too small.
        RetortError: when a split is empty, or the disk is too small.
    """
    samples = loader.open_samples(job.manifest, job.root, job.size, job.decoded)
    counts = {split: len(samples.rows(split)) for split in manifests.SPLITS}
    run.tracker.dataset("clean", manifests.fingerprint(job.manifest), job.manifest, counts)
    for split in ("train", "val"):
        if not counts[split]:
            raise RetortError(f"{job.manifest}: no rows in the split '{split}'; see data.splits")
    batch, processes = job.train.batch_size, job.train.num_workers
    message = (
        f"{where}: {batch} images per worker x {ray.workers} Ray workers = {batch * ray.workers} per step; "
        f"loader processes: {processes} per worker, {processes * ray.workers} in all; "
        f"validation: {job.valid.batch_size} per worker, {job.valid.batch_size * ray.workers} in all, "
        f"{job.valid.num_workers} loader processes per worker"
    )
    say(f"{run.name}: {message}")
    run.find(
        "config.batch", "info", f"{where}.train.batch_size", message,
        measured=batch * ray.workers, row="5.1",
    )  # fmt: skip
    run.tracker.summary(
        {
            "batch_per_worker": batch,
            "batch_total": batch * ray.workers,
            "loader_processes_per_worker": processes,
            "loader_processes_total": processes * ray.workers,
        }
    )
    check_shm(run, job, ray, where)
    run.stop_on_errors()
    progress.at(f"building {job.arch.name}")
    module = build.create(job.arch, len(job.class_names))
    held = heads.fc_share(module)
    if held is not None:
        run.find(**heads.fc_finding(held, where))
    check_vit_data(run, job, where, module, counts["train"])
    parameters = sum(tensor.numel() for tensor in module.state_dict().values())
    moments = 2 if job.optimizer.name == "adamw" else 1
    nets = len({phase.net for phase in job.phases})
    wanted = 3 * 4 * parameters * (nets + moments)  # Ray removes an old checkpoint after the next but one
    need_disk(state_dir("checkpoints"), wanted, "checkpoints")
    say(f"{run.name}: checkpoints take up to {human_bytes(wanted)} of disk until the step is done")


def check_vit_data(run: Run, job: engine.Job, where: str, module: torch.nn.Module, images: int) -> None:
    """Warn when a vision transformer is to learn from few images what others know by their build.

    Without the locality of convolutions it needs pretraining (Dosovitskiy et al., "ViT", 2021, sec. 4.3) or,
    from about a million images on, strong augmentation (Touvron et al., "DeiT", 2021, sec. 6).
    """
    if not build.is_transformer(module) or job.start is not None or images >= VIT_IMAGES:
        return
    if job.train.augment == "deit" and images >= DEIT_IMAGES:
        return
    needed = DEIT_IMAGES if job.train.augment == "deit" else VIT_IMAGES
    run.find(
        "arch.vit_data", "warning", f"{where}.arch.name {job.arch.name}",
        f"a vision transformer with random weights and {images:,} training images; it needs some {needed:,} "
        f"with augment: {job.train.augment}",
        measured=images, limit=needed, row="4.2",
        advice=f"Give {where}.weights that were trained on more images; or take a convolutional network"
        + (f", or set {where}.train.augment: deit." if job.train.augment != "deit" else "."),
    )  # fmt: skip


def check_shm(run: Run, job: engine.Job, ray: Ray, where: str, available: int | None = None) -> None:
    """Compare what loader processes put into /dev/shm with its size: too small kills them half-way.

    Args:
        available: bytes; None: asks the system.
    """
    needs = [
        loader.shm_needed(job.size, part.batch_size, part.num_workers, ray.workers)
        for part in (job.train, job.valid)
    ]
    if not any(needs):
        return
    size = loader.shm_size() if available is None else available
    if size is None:
        return
    needed = max(needs)
    enough = needed <= size
    run.find(
        "preflight.shm", "info" if enough else "error", "/dev/shm",  # noqa: S108
        f"loader processes need {human_bytes(needed)} of shared memory; {human_bytes(size)} are free",
        measured=size, limit=needed, row="1.3",
        advice="" if enough else (
            "Start the container with --shm-size=8g (on Kubernetes the pipeline mounts it by kubeflow.shm), "
            f"or lower {where}.train.num_workers; 0 needs none."
        ),
    )  # fmt: skip

"""What can be known to be wrong before training starts: rows, batches, the machine, the network.

What needs a machine is judged from numbers alone: a ``Machine`` (what there is) and ``Needs`` (what training
takes of it), so that a node of a cluster is judged as this machine is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from components.common import progress
from components.common.errors import RetortError
from components.common.findings import Level
from components.common.progress import counted
from components.common.storage import human_bytes, state_dir
from components.dataset import manifest as manifests
from components.models import build, cost, heads
from components.step import StepContext
from components.training import budget, machine
from components.training.augmentation import canvas_size
from components.training.inputs.feed import shm_needed
from components.training.inputs.index import open_index
from components.training.machine import Machine
from components.training.params import Ray
from components.training.spec import TrainSpec

log = logging.getLogger(__name__)

VIT_IMAGES = 14_000_000  # ImageNet-21k: from there on a transformer does without strong augmentation
DEIT_IMAGES = 1_281_167  # ImageNet-1k: enough with it

# what was measured on one machine (Linux, Ray 2.60, PyTorch 2.14), memory as the proportional set size
RAY_BYTES = 1_500_000_000  # Ray's own processes of a local cluster, beside the workers
WORKER_BYTES = 650_000_000  # a worker with its imports, before the network
CUDA_BYTES = 3_000_000_000  # the same where CUDA starts: assumed, not measured
LOADER_BYTES = 150_000_000  # a loader process, a fork of its worker: assumed
KEPT = 1.4  # what a step keeps, of all layers' outputs: 0.8 to 1.4 in five networks
RAY_THREADS, WORKER_THREADS = 350, 40  # processes and their threads
RAY_PORTS, WORKER_PORTS = 16, 3  # that are listened on
OPEN_FILES = 256  # of one process of Ray, and a loader process is 10 more

FEW = 5  # classes that are named


@dataclass(frozen=True)
class Needs:
    """What training takes of one machine: ``workers`` there, and all of them together in bytes.

    Attributes:
        loaders: loader processes of each worker.
        fixed, per_image: bytes of memory, whatever the batch is, and for each image of a worker's batch.
    """

    workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    loaders: int
    batch: int
    fixed: int
    per_image: int
    shm: int
    disk: int
    ray: bool = True  # its services run there too

    @property
    def memory(self) -> int:
        """Bytes in all."""
        return self.fixed + self.workers * self.batch * self.per_image

    @property
    def threads(self) -> int:
        """Processes and threads."""
        return RAY_THREADS * self.ray + self.workers * (WORKER_THREADS + 3 * self.loaders)

    @property
    def ports(self) -> int:
        return RAY_PORTS * self.ray + self.workers * WORKER_PORTS

    @property
    def files(self) -> int:
        """That one process opens."""
        return OPEN_FILES + 10 * self.loaders


@dataclass(frozen=True)
class Fault:
    """What ``StepContext.add_finding`` takes."""

    rule: str
    level: Level
    subject: str
    message: str
    measured: Any
    limit: Any
    advice: str
    row: str = "1.3"


def preflight(run: StepContext, spec: TrainSpec, ray: Ray, where: str, trainings: int = 1) -> None:
    """What can be known to be wrong before anything starts: rows, batch sizes, the machine, the network.

    Args:
        where: the section of params.yaml that the batch sizes come from, such as ``teacher``.
        trainings: how many such trainings the step does.

    Raises:
        FindingsError: when something is missing that training needs.
        RetortError: when a split is empty.
    """
    index = open_index(spec.manifest)
    rows = {split: index.rows(split) for split in manifests.SPLITS}
    counts = {split: len(found) for split, found in rows.items()}
    run.tracker.dataset("clean", index.fingerprint, spec.manifest, counts)
    for split in ("train", "val"):
        if not counts[split]:
            raise RetortError(f"{spec.manifest}: no rows in the split '{split}'; see data.splits")
    _say_batch(run, spec, ray, where)
    progress.at(f"building {spec.arch.name}")
    module = cost.on_meta(lambda: build.create(spec.arch, len(spec.class_names)))
    needed = needs(spec, ray, module)
    here = machine.look(state_dir("checkpoints"), needed.ports if not ray.address else 0)
    faults = [
        *batch_faults(counts["train"], spec.train.batch_size, ray.workers, _has_batch_norm(module), where),
        *class_faults(index.labels[rows["train"]], index.labels[rows["val"]], spec.class_names),
        *disk_faults(here, needed.disk, str(state_dir("checkpoints"))),
    ]
    if not ray.address:  # else training runs elsewhere: each node is looked at there
        faults += machine_faults(here, needed, where)
    for fault in faults:
        run.add_finding(**vars(fault))
        if fault.level == "warning":  # in the report it would be read when the training is over
            log.warning(f"{run.name}: {fault.message}. {fault.advice}")
    run.stop_on_errors()
    held = heads.fc_share(module)
    if held is not None:
        run.add_finding(**heads.fc_finding(held, where))
    check_vit_data(run, spec, where, module, counts["train"])
    budget.say_estimate(run, spec, ray, where, needed.disk, trainings)


def check_memory(run: StepContext, spec: TrainSpec, ray: Ray, where: str) -> None:
    """Whether ``ray.workers`` trainings of one worker each have memory enough, where they run here.

    Raises:
        FindingsError: the machine never has as much.
    """
    if ray.address:
        return
    module = cost.on_meta(lambda: build.create(spec.arch, len(spec.class_names)))
    for fault in memory_faults(machine.look(state_dir("checkpoints")), needs(spec, ray, module), where):
        run.add_finding(**vars(fault))
    run.stop_on_errors()


def _say_batch(run: StepContext, spec: TrainSpec, ray: Ray, where: str) -> None:
    batch, processes = spec.train.batch_size, spec.train.num_workers
    message = (
        f"{where}: {batch} images per worker x {ray.workers} Ray workers = {batch * ray.workers} per step; "
        f"loader processes: {processes} per worker, {processes * ray.workers} in all; "
        f"validation: {spec.valid.batch_size} per worker, {spec.valid.batch_size * ray.workers} in all, "
        f"{spec.valid.num_workers} loader processes per worker"
    )
    log.info(f"{run.name}: {message}")
    run.add_finding(
        "config.batch", "info", f"{where}.train.batch_size", message,
        measured=batch * ray.workers, row="5.1",
    )  # fmt: skip
    run.tracker.metrics(
        {
            "batch_per_worker": batch,
            "batch_total": batch * ray.workers,
            "loader_processes_per_worker": processes,
            "loader_processes_total": processes * ray.workers,
        }
    )


def needs(spec: TrainSpec, ray: Ray, module: torch.nn.Module) -> Needs:
    """What a job takes of the machine that all its workers run on.

    Args:
        module: its network, on the device ``meta``.
    """
    size = 4 * sum(tensor.numel() for tensor in module.state_dict().values())
    moments = max((1 if spec.optimizer_of(phase).name == "sgd" else 2 for phase in spec.phases), default=0)
    largest = spec.largest()
    nets = len({phase.net for phase in spec.phases})
    try:
        layers = cost.measure(module, (3, largest, largest)).layers
    except RetortError:  # an operator without a shape function: then only the network itself is counted
        layers = []
    outputs = sum(4 * int(np.prod(layer.output)) for layer in layers if layer.output)
    loaders = max(spec.train.num_workers, spec.valid.num_workers)
    if ray.gpus_per_worker:  # the network is on the card
        each, per_image = CUDA_BYTES, 0
    else:
        # values, gradients and moments; the other networks of the job wait as values
        each, per_image = WORKER_BYTES + size * (1 + nets + moments), round(KEPT * outputs)
    canvas = any(spec.recipe(phase).source == "canvas" for phase in spec.phases)
    learnt = canvas_size(largest) if canvas else largest
    return Needs(
        workers=ray.workers,
        cpus_per_worker=ray.cpus_per_worker,
        gpus_per_worker=ray.gpus_per_worker,
        loaders=loaders,
        batch=spec.train.batch_size,
        fixed=RAY_BYTES + ray.workers * (each + loaders * LOADER_BYTES),
        per_image=per_image,
        shm=max(
            shm_needed(side, part.batch_size, part.num_workers, ray.workers)
            for side, part in ((learnt, spec.train), (largest, spec.valid))
        ),
        # what trains, its best epoch, its average; Ray removes a checkpoint after the next but one
        disk=3 * size * (nets + 2 + (spec.train.ema is not None) + moments),
    )


# --- judged from numbers -----------------------------------------------------------------------------------


def machine_faults(there: Machine, needed: Needs, where: str, node: str = "this machine") -> Iterator[Fault]:
    """What a machine lacks for the workers that are to run on it; the disk apart.

    Args:
        where: the section of params.yaml that the batch size comes from, such as ``teacher``.
        node: what it is called.
    """
    yield from shm_faults(there.shm_free, needed.shm, where, node)
    yield from memory_faults(there, needed, where, node)
    yield from core_faults(there, needed, where, node)
    yield from process_faults(there, needed, where, node)
    yield from gpu_faults(there, needed, node)
    if needed.ray and there.ports < needed.ports:
        yield Fault(
            rule="preflight.ports", level="error", subject=node,
            message=f"Ray and {counted(needed.workers, 'worker')} listen on some {needed.ports} ports, and "
            f"{node} gives {there.ports} at one time",
            measured=there.ports, limit=needed.ports, row="5.1",
            advice="End what holds the others ('ss -ltn' lists them), or widen "
            "net.ipv4.ip_local_port_range.",
        )  # fmt: skip


def shm_faults(free: int | None, needed: int, where: str, node: str = "this machine") -> Iterator[Fault]:
    """Compare what loader processes put into /dev/shm with its size: too small kills them half-way.

    Where it is large enough that is said too.
    """
    if not needed or free is None:
        return
    enough = needed <= free
    place = machine.SHM if node == "this machine" else f"{machine.SHM} of {node}"
    yield Fault(
        rule="preflight.shm", level="info" if enough else "error", subject=place,
        message=f"loader processes need {human_bytes(needed)} of shared memory; {human_bytes(free)} are free",
        measured=free, limit=needed,
        advice="" if enough else (
            "Start the container with --shm-size=8g (on Kubernetes the pipeline mounts it by kubeflow.shm), "
            f"or lower {where}.train.num_workers; 0 needs none."
        ),
    )  # fmt: skip


def memory_faults(there: Machine, needed: Needs, where: str, node: str = "this machine") -> Iterator[Fault]:
    """More than the machine, or the container, ever gives is an error; more than is free now, a warning."""
    if needed.memory <= there.memory_free:
        return
    ever = needed.memory <= there.memory
    each = needed.batch * needed.per_image
    parts = f"{human_bytes(needed.fixed)} for Ray and {counted(needed.workers, 'worker')}" + (
        f", {human_bytes(each)} for {needed.batch} images in each worker's step" if each else ""
    )
    fits = int((there.memory_free - needed.fixed) / max(1, needed.workers * needed.per_image))
    smaller = (
        f"Set {where}.train.batch_size to {fits} or lower"
        if 2 <= fits < needed.batch
        else "Set ray.workers lower"
        if needed.workers > 1
        else f"Take a smaller network, or a smaller {where}.train.batch_size"
    )
    yield Fault(
        rule="preflight.memory", level="warning" if ever else "error", subject=node,
        message=f"training takes about {human_bytes(needed.memory)} of memory ({parts}); {node} has "
        f"{human_bytes(there.memory_free)} free of {human_bytes(there.memory)}",
        measured=there.memory_free, limit=needed.memory,
        advice=f"{smaller}, end what else runs there, or raise the container's limit (kubeflow.memory).",
    )  # fmt: skip


def core_faults(there: Machine, needed: Needs, where: str, node: str = "this machine") -> Iterator[Fault]:
    """Workers, or loader processes, that share cores wait for one another: slow, but no error."""
    why = "" if there.cores == there.host_cores else (
        f" (of {there.host_cores}: affinity or a container's quota keeps the others)"
    )  # fmt: skip
    wanted = needed.workers * needed.cpus_per_worker
    if wanted > there.cores:
        share = f"{there.cores / needed.workers:.2f}".rstrip("0").rstrip(".")
        fits = int(there.cores / needed.cpus_per_worker)
        yield Fault(
            rule="preflight.cores", level="warning", subject="ray.workers",
            message=f"{counted(needed.workers, 'Ray worker')} x {needed.cpus_per_worker:g} cores = "
            f"{wanted:g}, and {node} has {there.cores}{why}: they will wait for one another at every step",
            measured=there.cores, limit=wanted, row="5.1",
            advice=(f"Set ray.workers to {fits}" if fits else "Set ray.workers to 1")
            + f", or ray.cpus_per_worker to {share}.",
        )  # fmt: skip
    loaders = needed.workers * needed.loaders
    if loaders > there.cores:
        fits = there.cores // needed.workers
        yield Fault(
            rule="preflight.cores", level="warning", subject=f"{where}.train.num_workers",
            message=f"{needed.loaders} loader processes x {counted(needed.workers, 'Ray worker')} = "
            f"{loaders}, and {node} has {counted(there.cores, 'core')}{why}: more of them bring no image "
            "sooner",
            measured=there.cores, limit=loaders, row="5.1",
            advice=f"num_workers is per Ray worker: set {where}.train.num_workers and "
            f"{where}.valid.num_workers to {fits} or lower.",
        )  # fmt: skip


def process_faults(there: Machine, needed: Needs, where: str, node: str = "this machine") -> Iterator[Fault]:
    """Quotas: a thread that cannot be started kills Ray's processes, with messages that name no quota."""
    lower = (
        f"or lower {where}.train.num_workers"
        if needed.loaders
        else "or lower ray.workers"
        if needed.workers > 1
        else "or run it elsewhere"
    )
    if there.processes is not None and there.processes < needed.threads:
        yield Fault(
            rule="preflight.processes", level="error", subject=node,
            message=f"Ray, its workers and their loaders start some {needed.threads} processes and threads; "
            f"the quota of {node} leaves {there.processes}",
            measured=there.processes, limit=needed.threads,
            advice=f"Raise it (docker run --pids-limit, podPidsLimit of the kubelet, ulimit -u), {lower}.",
        )  # fmt: skip
    if there.files is not None and there.files < needed.files:
        yield Fault(
            rule="preflight.processes", level="error", subject=node,
            message=f"a process of Ray opens some {needed.files} files and sockets; {node} allows it "
            f"{there.files}",
            measured=there.files, limit=needed.files,
            advice=f"Raise it ('ulimit -n 65536', docker run --ulimit nofile=65536), {lower}.",
        )  # fmt: skip


def gpu_faults(there: Machine, needed: Needs, node: str = "this machine") -> Iterator[Fault]:
    """GPUs asked against GPUs there, those that PyTorch cannot use, and those that nobody asked for."""
    wanted = needed.workers * needed.gpus_per_worker
    unusable = f"{counted(there.gpu_devices, 'GPU')} of {node} cannot be used: {there.no_cuda}"
    mend = (
        "Install the driver that this PyTorch needs (nvidia-smi shows the one there is), or a PyTorch for "
        "the driver; a container needs --gpus all"
    )
    if wanted > there.gpus:
        seen = f"{node} has {there.gpus}" if there.gpus or not there.gpu_devices else unusable
        fits = int(there.gpus / needed.gpus_per_worker)
        yield Fault(
            rule="preflight.gpus", level="error", subject="ray.gpus_per_worker",
            message=f"{counted(needed.workers, 'Ray worker')} x {needed.gpus_per_worker:g} GPUs = {wanted:g} "
            f"are asked for; {seen}",
            measured=there.gpus, limit=wanted, row="5.1",
            advice=(f"Set ray.workers to {fits}." if fits else f"{mend}; or set ray.gpus_per_worker to 0.")
            if there.gpus or there.gpu_devices
            else "Set ray.gpus_per_worker to 0 (training then takes the CPU), or run where a GPU is.",
        )  # fmt: skip
    elif not wanted and there.gpus:
        yield Fault(
            rule="preflight.gpus", level="warning", subject="ray.gpus_per_worker",
            message=f"{node} has {counted(there.gpus, 'GPU')}, and none is asked for: training takes the CPU",
            measured=there.gpus, limit=0, row="5.1",
            advice=f"Set ray.gpus_per_worker to 1 and ray.workers to {there.gpus}.",
        )  # fmt: skip
    elif not wanted and there.gpu_devices and "CUDA_VISIBLE_DEVICES" not in there.no_cuda:
        yield Fault(
            rule="preflight.gpus", level="warning", subject="CUDA",
            message=f"{unusable}; training takes the CPU",
            measured=0, limit=there.gpu_devices, row="5.1", advice=f"{mend}.",
        )  # fmt: skip


def disk_faults(there: Machine, needed: int, folder: str) -> Iterator[Fault]:
    """Checkpoints that do not fit would end the training after an epoch."""
    if there.disk_free >= needed:
        return
    yield Fault(
        rule="preflight.disk", level="error", subject=folder,
        message=f"checkpoints take up to {human_bytes(needed)}; the disk of {folder} has "
        f"{human_bytes(there.disk_free)} free",
        measured=there.disk_free, limit=needed, row="5.1",
        advice="Free some space ('retort clean' removes what can be remade), or set RETORT_STATE to a folder "
        "on a larger disk.",
    )  # fmt: skip


def batch_faults(rows: int, batch: int, workers: int, batch_norm: bool, where: str) -> Iterator[Fault]:
    """Steps in which a worker would get no image, or a single one where a batch is normalised by itself.

    A batch norm's statistics of one image are that image's own: it learns to subtract what it should tell
    apart (Ioffe and Szegedy, 2015, sec. 3), and where the last map is 1 x 1 there is no variance at all.
    """
    if rows < 2 * workers:
        fits = max(1, rows // 2)
        yield Fault(
            rule="preflight.batch", level="error", subject="ray.workers",
            message=f"{counted(rows, 'training image')} cannot give each of "
            f"{counted(workers, 'Ray worker')} two a step",
            measured=rows, limit=2 * workers, row="5.1", advice=f"Set ray.workers to {fits} or lower.",
        )  # fmt: skip
    elif batch == 1 and batch_norm:
        yield Fault(
            rule="preflight.batch", level="error", subject=f"{where}.train.batch_size",
            message="a batch of one image per worker: the network's batch norms would normalise each image "
            "by itself",
            measured=batch, limit=2, row="5.1",
            advice=f"Set {where}.train.batch_size to 8 or more; it is per Ray worker, and batch norms see no "
            "other worker's images.",
        )  # fmt: skip


def class_faults(train: np.ndarray, val: np.ndarray, names: tuple[str, ...]) -> Iterator[Fault]:
    """Classes with a single training image, or with none though validation judges them.

    Args:
        train, val: labels int [n] of both splits.
    """
    size = len(names)
    counts = np.bincount(train[train >= 0], minlength=size)[:size]
    judged = np.bincount(val[val >= 0], minlength=size)[:size]
    for which, what, advice in (
        (
            counts == 1, "has a single training image: only its augmented views are learnt, and nothing "
            "tells what its images have in common",
            "Add images (audit.min_per_class is what a class should have), or leave the class out by "
            "data.corrections.",
        ),
        (
            (counts == 0) & (judged > 0), "has no training image, and is judged on validation images: its "
            "recall will be 0 there",
            "Add images, move some by data.splits, or leave the class out by data.corrections.",
        ),
    ):  # fmt: skip
        found = np.flatnonzero(which).tolist()
        if found:
            named = ", ".join(f"'{names[label]}'" for label in found[:FEW])
            more = f" and {len(found) - FEW:,} more" if len(found) > FEW else ""
            yield Fault(
                rule="preflight.classes", level="warning",
                subject=f"class {named}" if len(found) == 1 else f"{len(found):,} classes",
                message=f"{named}{more}: {what}" if len(found) == 1 else f"each of {named}{more} {what}",
                measured=len(found), limit=0, row="1.2", advice=advice,
            )  # fmt: skip


def _has_batch_norm(module: torch.nn.Module) -> bool:
    return any(isinstance(part, torch.nn.modules.batchnorm._BatchNorm) for part in module.modules())


def check_vit_data(
    run: StepContext, spec: TrainSpec, where: str, module: torch.nn.Module, images: int
) -> None:
    """Warn when a vision transformer is to learn from few images what others know by their build.

    Without the locality of convolutions it needs pretraining (Dosovitskiy et al., "ViT", 2021, sec. 4.3) or,
    from about a million images on, strong augmentation (Touvron et al., "DeiT", 2021, sec. 6).
    """
    if not build.is_transformer(module) or spec.start is not None or images >= VIT_IMAGES:
        return
    if spec.train.augment == "deit" and images >= DEIT_IMAGES:
        return
    needed = DEIT_IMAGES if spec.train.augment == "deit" else VIT_IMAGES
    run.add_finding(
        "arch.vit_data", "warning", f"{where}.arch.name {spec.arch.name}",
        f"a vision transformer with random weights and {images:,} training images; it needs some {needed:,} "
        f"with augment: {spec.train.augment}",
        measured=images, limit=needed, row="4.2",
        advice=f"Give {where}.weights that were trained on more images; or take a convolutional network"
        + (f", or set {where}.train.augment: deit." if spec.train.augment != "deit" else "."),
    )  # fmt: skip

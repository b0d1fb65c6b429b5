"""The driver's side of training: preflight, Ray, what a person sees meanwhile, and what came out."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from components.audit.plan import Plan, read_plan
from components.common import progress
from components.common.errors import RetortError
from components.common.params import StepParams
from components.common.progress import say
from components.common.step import Run
from components.common.storage import human_bytes, need, need_disk, read_json, remove, state_dir
from components.dataset import manifest as manifests
from components.dataset.params import Data
from components.models import build, checkpoint, heads
from components.models.card import Lineage, ModelCard
from components.models.params import Net
from components.training import cluster, engine, loader
from components.training.params import Ray
from components.weights.load import prepared

VIT_IMAGES = 14_000_000  # ImageNet-21k: from there on a transformer does without strong augmentation
DEIT_IMAGES = 1_281_167  # ImageNet-1k: enough with it


def make_job(
    params: StepParams,
    net: Net,
    ray: Ray,
    data: Data,
    manifest: Path,
    plan: Plan,
    start: Path | None,
    phases: tuple[engine.Phase, ...],
) -> engine.Job:
    """What the workers are to do with one network; decodes the images, if that was not done before.

    Args:
        start: backbone weights; None: random.

    Raises:
        RetortError: when an image cannot be read, or the class count does not fit the data.
    """
    progress.at("reading the data")
    names = class_names(params, manifest)
    return engine.Job(
        manifest=manifest.resolve(),
        decoded=loader.decode_all(manifest, data.root, params.general.image_size),
        root=data.root if "://" in data.root else os.path.abspath(data.root),  # noqa: PTH100
        size=params.general.image_size,
        seed=params.general.seed,
        class_names=names,
        plan=plan,
        arch=net.arch,
        start=None if start is None else start.resolve(),
        optimizer=net.optimizer,
        train=net.train,
        valid=net.valid,
        phases=phases,
        threads=max(1, int(ray.cpus_per_worker)),
        workers=ray.workers,
        waived="train.learns" in params.checks.waive,
    )


def audited(run: Run, plan: Path) -> Plan:
    """The plan, if it was made for the clean manifest that ``run`` lists among its inputs.

    Raises:
        RetortError: it is missing, damaged, or of other data.
    """
    return read_plan(need(plan, "plan"), run.report.inputs["data/clean.parquet"])


def class_names(params: StepParams, manifest: Path) -> tuple[str, ...]:
    """One name an output of the classifier: those of the data, and numbers for outputs beyond them."""
    names = manifests.class_names(manifests.read(manifest, ["label", "class_name"]))
    wanted = params.general.class_num
    if wanted == "auto" or wanted == len(names):
        return tuple(names)
    if wanted < len(names):
        raise RetortError(
            f"global.class_num: {wanted} is below the data's highest label + 1 = {len(names)}; use auto"
        )
    return (*names, *(str(label) for label in range(len(names), wanted)))


def checkpoints(step: str, job: engine.Job) -> Path:
    """Where the checkpoints of exactly this job lie; absolute."""
    return (state_dir("checkpoints") / f"{step}-{job.key()[:24]}").resolve()


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


class Listener:
    """Shows what rank 0 tells, and hands it to the tracker; the driver is the only one that writes."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._stack = ExitStack()
        self._task: progress.Task | None = None
        self._seen: set[tuple[str, int]] = set()
        self._epochs: dict[str, int] = {}
        self.stopped: cluster.Event | None = None

    def __call__(self, event: cluster.Event) -> None:
        getattr(self, f"_on_{event['kind']}")(event)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)  # an interrupted task does not end at 100 %

    def _on_phase(self, event: cluster.Event) -> None:
        self._stack.close()
        progress.at("judging the networks, keeping the checkpoint")  # what is done after the last step
        self._epochs[event["name"]] = event.get("epochs", 0)
        title = f"{self._run.name}: {event['name']} ({event['unit']})"
        self._task = self._stack.enter_context(progress.task(title, event["total"]))
        self._task.update(event.get("done", 0))

    def _on_progress(self, event: cluster.Event) -> None:
        if self._task is not None:
            self._task.update(event["done"], event["note"])

    def _on_estimate(self, event: cluster.Event) -> None:
        seconds = duration(event["seconds"])
        name = event["name"].removeprefix(f"{self._run.name}: ")  # a phase may be called as the step is
        say(
            f"{self._run.name}: {name}: {seconds} more from here, by what was measured since"
            if event["again"]
            else f"{self._run.name}: {name} will take about {seconds}"
        )

    def _on_note(self, event: cluster.Event) -> None:
        say(f"{self._run.name}: {event['said']}")

    def _on_started(self, event: cluster.Event) -> None:
        if self._seen:
            say(f"{self._run.name}: a worker was lost before Ray knew of a checkpoint; training starts over")

    def _on_resumed(self, event: cluster.Event) -> None:
        done = len(self._seen)
        why = "a worker was lost" if done else "an earlier run was interrupted"
        say(
            f"{self._run.name}: {why}; going on from its last checkpoint "
            f"(phase {event['phase'] + 1}, after epoch {event['epoch']})"
        )

    def _on_epoch(self, event: cluster.Event) -> None:
        row = event["row"]
        key = row["phase"], row["epoch"]
        if key in self._seen:  # told again after a restart
            return
        self._seen.add(key)
        say(
            f"{self._run.name}: {row['phase']} epoch {row['epoch']}: loss {row['train_loss']:.4f}, "
            f"validation loss {row['val_loss']:.4f}, top-1 {row['val_top1']:.2%}"
        )
        numbers = {name: row[name] for name in row if name not in ("phase", "epoch")}
        self._run.tracker.metrics(
            {f"{row['phase']}.{name}": value for name, value in numbers.items()}, step=row["epoch"]
        )

    def _on_stopped(self, event: cluster.Event) -> None:
        self.stopped = event


def train(run: Run, job: engine.Job, ray: Ray, folder: Path) -> dict[str, Any]:
    """Run a job on Ray, from where an interrupted run of the same job stopped, if there was one.

    Returns:
        ``nets`` (state dicts by name), ``history`` (one row an epoch), ``predictions`` (int64 by network
        and split) and ``chosen`` (unlabelled images used).

    Raises:
        FindingsError: with ``train.finite`` or ``train.learns``, when the run was stopped.
        RetortError: when Ray or a worker failed for good.
    """
    progress.at("starting Ray" if not ray.address else f"connecting to Ray at {ray.address}")
    with cluster.running(ray):
        return fit(run, job, ray, folder)


def fit(run: Run, job: engine.Job, ray: Ray, folder: Path) -> dict[str, Any]:
    """The same in a cluster that is running already, so that several jobs can share it."""
    progress.at(f"starting {progress.counted(ray.workers, 'Ray worker')}: imports, data, network")
    with Listener(run) as listener:
        last = cluster.fit(engine.work, {"job": job}, ray, folder, listener)
    if listener.stopped is not None:
        told = listener.stopped
        run.find(
            told["rule"], "error", run.name, told["message"],
            measured=told["measured"], advice=told["advice"], row="2.3", waivable=told["waivable"],
        )  # fmt: skip
        run.stop_on_errors()
    if last is None:
        raise RetortError(f"{run.name}: no epoch was finished, so there is nothing to keep")
    progress.at("writing what was learnt")
    state = torch.load(last / engine.STATE, map_location="cpu", weights_only=True)
    for net in state["predictions"].values():
        for split, values in net.items():
            net[split] = values.numpy()
    return state


def forget(folder: Path) -> None:
    """Remove a finished job's checkpoints."""
    remove(folder)


def duration(seconds: float) -> str:
    """Seconds or minutes, as a person says them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.{1 if seconds < 600 else 0}f} min"


def truth(job: engine.Job, split: str) -> np.ndarray:
    """Labels int64 of a split, in the order of its predictions."""
    samples = loader.open_samples(job.manifest, job.root, job.size)
    return samples.labels[samples.rows(split)]


def start_weights(weights: Path, who: str, net: Net) -> Path | None:
    """The backbone that the step ``weights`` prepared, and no other; None: the network starts from random."""
    if net.weights == "none":
        return None
    return prepared(weights, who)


def start_lineage(weights: Path, who: str, net: Net) -> list[Lineage]:
    """Where those weights came from."""
    if net.weights == "none":
        return []
    content = read_json(weights / f"{who}.json")
    return [Lineage.model_validate(entry) for entry in content["lineage"]]


def write_model(
    run: Run, job: engine.Job, tensors: dict[str, Any], lineage: list[Lineage], out: Path
) -> None:
    """Write ``model.safetensors`` and ``model.json`` of a trained network."""
    module = build.create(job.arch, len(job.class_names))
    module.load_state_dict(tensors)
    mean, std = build.preprocessing(job.arch)
    card = ModelCard(
        arch=job.arch,
        class_names=list(job.class_names),
        input_size=[3, job.size, job.size],
        mean=list(mean),
        std=list(std),
        data_fingerprint=manifests.fingerprint(job.manifest),
        lineage=lineage,
        sha256="",
    )
    checkpoint.save(
        run.product(out / "model.safetensors"), run.product(out / "model.json"), module.eval(), card
    )

"""The driver's side of training: what the workers are to do, the run on Ray, and what came out."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from components.audit.plan_schema import Plan, read_plan
from components.common import progress, shared
from components.common.errors import RetortError
from components.common.params import StepParams
from components.common.storage import need, read_json, state_dir
from components.dataset import manifest as manifests
from components.dataset.params import Data
from components.models import build, checkpoint
from components.models.card import Lineage, ModelCard
from components.models.params import Net, Optimizer
from components.step import StepContext
from components.training import budget, cluster, kept, nodes, optim, remote, trainer
from components.training.inputs import shards
from components.training.inputs.index import known_fingerprint, open_index
from components.training.inputs.pictures import open_store
from components.training.listener import Listener
from components.training.params import Ray, refuse_kuberay
from components.training.spec import Phase, TrainSpec
from components.training.state import TrainResult
from components.weights.load import prepared

log = logging.getLogger(__name__)

INPUT_BOUND = 0.2  # of the time: more of it spent waiting for images is worth a change
JUDGED_SECONDS = 20.0  # of training: before, a share of it says little


def make_spec(
    params: StepParams,
    net: Net,
    ray: Ray,
    data: Data,
    manifest: Path,
    plan: Plan,
    start: Path | None,
    phases: tuple[Phase, ...],
) -> TrainSpec:
    """What the workers are to do with one network; decodes the images, if that was not done before.

    Args:
        start: backbone weights; None: random.

    Raises:
        RetortError: when an image cannot be read, or the class count does not fit the data.
    """
    refuse_kuberay(ray)
    progress.at("reading the data")
    if ray.storage:
        remote.remember(ray.storage, data.s3)
    names = class_names(params, manifest)
    root = data.root if "://" in data.root else os.path.abspath(data.root)  # noqa: PTH100
    spec = TrainSpec(
        manifest=manifest.resolve(),
        root=root,
        size=params.general.image_size,
        seed=params.general.seed,
        class_names=names,
        plan=plan,
        arch=net.arch,
        start=None if start is None else start.resolve(),
        optimizer=_optimizer(net, start),
        train=net.train,
        valid=net.valid,
        phases=phases,
        threads=max(1, int(ray.cpus_per_worker)),
        workers=ray.workers,
        waived="train.learns" in params.checks.waive,
    )
    if ray.storage:  # each node decodes for itself
        storage = remote.open_storage(ray.storage)
        sharded = shards.there(storage, known_fingerprint(manifest))
        return replace(spec, shards=storage) if sharded else spec
    store = open_store(open_index(spec.manifest), root, spec.size, spec.recipe().source)
    for said in store.said:
        log.info(f"{said}: they are decoded as they are needed (train.num_workers: processes for that)")
    return spec


def _optimizer(net: Net, start: Path | None) -> Optimizer:
    """The optimizer, with the published factors by stage where start weights were themselves distilled."""
    settings = net.optimizer
    if start is None or settings.stage_rates is not None or settings.layer_decay is not None:
        return settings
    record = start.with_suffix(".json")
    lineage = read_json(record).get("lineage", []) if record.exists() else []
    source = optim.distilled_source([net.weights, *(entry["source"] for entry in lineage)])
    if source is None:
        return settings
    rates = optim.published_stage_rates(net.arch.name)
    log.info(
        f"{source}: weights that were distilled learn at {', '.join(f'{rate:g}' for rate in rates)} of the "
        "rate, from the input to the classifier, whose is whole (optimizer.stage_rates: [] turns that off)"
    )
    return settings.model_copy(update={"stage_rates": rates})


def load_plan(run: StepContext, plan: Path, manifest: Path) -> Plan:
    """The plan, if it was made for the clean manifest, an input of ``run``.

    Raises:
        RetortError: it is missing, damaged, or of other data.
    """
    return read_plan(need(plan, "plan"), run.sha256(manifest))


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


def checkpoints(step: str, spec: TrainSpec) -> Path:
    """Where the checkpoints of exactly this job lie; absolute."""
    return (state_dir("checkpoints") / f"{step}-{spec.key()[:24]}").resolve()


def train(run: StepContext, spec: TrainSpec, ray: Ray, folder: Path) -> TrainResult:
    """Run a job on Ray, from where an interrupted run of the same job stopped, if there was one.

    Raises:
        FindingsError: with ``train.finite`` or ``train.learns``, when the run was stopped.
        RetortError: when Ray or a worker failed for good.
    """
    started = monotonic()
    progress.at("starting Ray" if not ray.address else f"connecting to Ray at {ray.address}")
    heard = Listener(run)
    with cluster.running(ray):
        result = fit(run, spec, ray, folder, heard)
    budget.learn(run, spec, ray, heard, monotonic() - started)
    return result


def fit(
    run: StepContext, spec: TrainSpec, ray: Ray, folder: Path, listener: Listener | None = None
) -> TrainResult:
    """The same in a cluster that is running already, so that several jobs can share it."""
    nodes.check(run, spec, ray)
    progress.at(f"starting {progress.counted(ray.workers, 'Ray worker')}: imports, data, network")
    keeping = nullcontext() if ray.storage else kept.checkpoints(folder, cluster.STATE, cluster.RESCUED)
    with listener or Listener(run) as heard, keeping:
        state = cluster.fit(trainer.train, spec, ray, folder, heard)
    if heard.stopped is not None:
        told = heard.stopped
        run.add_finding(
            told["rule"], "error", run.name, told["message"],
            measured=told["measured"], advice=told["advice"], row="2.3", waivable=told["waivable"],
        )  # fmt: skip
        run.stop_on_errors()
    _find_input_bound(run, heard)
    if state is None:
        raise RetortError(f"{run.name}: no epoch was finished, so there is nothing to keep")
    progress.at("writing what was learnt")
    return TrainResult.of(state)


def _find_input_bound(run: StepContext, heard: Listener) -> None:
    """Whether the steps waited for their images."""
    seconds = sum(heard.seconds)
    if not seconds:
        return
    waiting = sum(heard.waiting) / seconds
    bound = waiting > INPUT_BOUND and seconds > JUDGED_SECONDS
    run.add_finding(
        "train.input_bound", "warning" if bound else "info", run.name,
        f"{waiting:.0%} of the training time was spent waiting for images ({heard.images / seconds:,.0f} "
        "images a second)",
        measured=round(waiting, 4), limit=INPUT_BOUND, row="1.2", advice=heard.remedy if bound else "",
    )  # fmt: skip
    run.tracker.metrics({"input_waiting": waiting, "images_per_second": heard.images / seconds})


def forget(folder: Path) -> None:
    """Remove a finished job's checkpoints."""
    cluster.forget(folder)
    shared.drop(folder / cluster.RESCUED)


def labels(spec: TrainSpec, split: str) -> np.ndarray:
    """Labels int64 of a split, in the order of its predictions."""
    index = open_index(spec.manifest)
    return np.asarray(index.labels[index.rows(split)], dtype=np.int64)


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
    run: StepContext,
    spec: TrainSpec,
    tensors: dict[str, Any],
    lineage: list[Lineage],
    out: Path,
    size: int | None = None,
) -> None:
    """Write ``model.safetensors`` and ``model.json`` of a trained network; see ``save_model``."""
    save_model(
        spec, tensors, lineage, run.product(out / "model.safetensors"), run.product(out / "model.json"), size
    )


def save_model(
    spec: TrainSpec,
    tensors: dict[str, Any],
    lineage: list[Lineage],
    model: Path,
    card_path: Path,
    size: int | None = None,
) -> None:
    """The same into two files.

    Args:
        size: pixels a side of the images that it is made for; None: the job's.
    """
    module = build.create(spec.arch, len(spec.class_names))
    module.load_state_dict(tensors)
    mean, std = build.preprocessing(spec.arch)
    card = ModelCard(
        arch=spec.arch,
        class_names=list(spec.class_names),
        input_size=[3, *[size or spec.size] * 2],
        mean=list(mean),
        std=list(std),
        data_fingerprint=known_fingerprint(spec.manifest),
        lineage=lineage,
        sha256="",
    )
    checkpoint.save(model, card_path, module.eval(), card)

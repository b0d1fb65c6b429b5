"""The nodes of a Ray cluster, before training starts there and while it runs: what they have, who lives.

``check`` asks each node what ``node.look`` says of it, and judges the answers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from components.common import links, progress
from components.common.errors import RetortError
from components.common.progress import counted
from components.common.storage import state_dir
from components.dataset import manifest as manifests
from components.dataset import s3
from components.models import build, checkpoint, cost
from components.step import StepContext
from components.training import node, remote
from components.training.node import Ask, Node
from components.training.params import Ray
from components.training.preflight import RAY_BYTES, Fault, Needs, disk_faults, machine_faults, needs
from components.training.spec import TrainSpec

log = logging.getLogger(__name__)

ANSWER_SECONDS = 120.0  # of a node, imports included
LOOK_SECONDS = 5.0  # between two looks at which nodes live
SAMPLE = 4  # images that each node is asked for
HERE = "ray.io/node-id"  # Ray's own label of a node
_checked: set[tuple[str, str]] = set()  # connections to clusters whose nodes were looked at


def sample(manifest: Path, root: str) -> tuple[str, ...]:
    """Where a few of a manifest's images lie."""
    batch = next(pq.ParquetFile(manifest).iter_batches(SAMPLE, columns=["path"]))
    return tuple(manifests.image_path(root, path) for path in batch["path"].to_pylist())


def check(run: StepContext, spec: TrainSpec, ray: Ray) -> None:
    """Look at every node of the running cluster, unless it is this machine's own, before workers start there.

    Raises:
        FindingsError: with ``preflight.*``, when a node lacks something, or the cluster as a whole.
        RetortError: when a node does not answer.
    """
    import ray as ray_core

    here = ray_core.get_runtime_context()
    connection = here.get_node_id(), here.get_job_id()  # of local clusters each has a node of its own
    if connection in _checked:  # several runs may share it
        return
    totals = ray_core.cluster_resources()
    faults = list(cluster_faults(totals.get("CPU", 0), totals.get("GPU", 0), ray))
    if ray.address:
        progress.at("asking each node of the cluster")
        where = spec.phases[0].net
        needed = needs(spec, ray, cost.on_meta(lambda: build.create(spec.arch, len(spec.class_names))))
        images = () if spec.shards else sample(spec.manifest, spec.root)
        alive = [one for one in ray_core.nodes() if one["Alive"]]
        answers = _ask(ray, alive, images, paths(spec))
        for one, answer in zip(alive, answers, strict=True):
            faults += node_faults(answer)
            most = min(_room(one["Resources"], ray), ray.workers)
            if most:
                faults += machine_faults(answer.there, _on_one(needed, most), where, answer.name)
                faults += disk_faults(answer.there, needed.disk, f"{answer.name}'s copy of the inputs")
        names = ", ".join(answer.name for answer in answers)
        log.info(f"{run.name}: {counted(len(answers), 'node')} answered: {names}")
    for fault in faults:
        run.add_finding(**vars(fault))
    run.stop_on_errors()
    _checked.add(connection)


def paths(spec: TrainSpec) -> tuple[str, ...]:
    """Files of the driver that workers read."""
    teachers = [folder / checkpoint.FILE for folder in (spec.teacher, *spec.teachers) if folder is not None]
    found = [spec.manifest, spec.start, *teachers]
    return tuple(str(path) for path in found if path is not None)


def _ask(ray: Ray, alive: list[dict[str, Any]], images: Sequence[str], files: Sequence[str]) -> list[Node]:
    import ray as ray_core
    from ray.exceptions import GetTimeoutError, RayError

    storage = remote.open_storage(ray.storage) if ray.storage else None
    ask = Ask(storage, str(state_dir().resolve()), s3.stores(), tuple(images), tuple(files))
    asked = []
    for one in alive:
        options: dict[str, Any] = {
            "num_cpus": 0, "max_retries": 0, "label_selector": {HERE: one["NodeID"]},
        }  # fmt: skip
        asked.append(ray_core.remote(**options)(node.look).remote(one["NodeManagerAddress"], ask))
    answers = []
    for one, answer in zip(alive, asked, strict=True):
        name = _name(one)
        try:
            answers.append(ray_core.get(answer, timeout=ANSWER_SECONDS))
        except GetTimeoutError:
            raise RetortError(
                f"ray.address: node {name} does not answer within {ANSWER_SECONDS:.0f} s; 'ray status' shows "
                "what it does: stop it ('ray stop' there), or wait until it is free"
            ) from None
        except RayError as error:
            raise RetortError(
                f"ray.address: node {name} cannot run our code: {_last_line(error)}; it needs the same "
                "Python environment as this machine (requirements.lock)"
            ) from None
    return answers


def _name(one: dict[str, Any]) -> str:
    """What a node of ``ray.nodes()`` is called."""
    return f"{one['NodeManagerHostname']} ({one['NodeManagerAddress']})"


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)


def _room(resources: dict[str, float], ray: Ray) -> int:
    """How many workers fit on a node."""
    fits = resources.get("CPU", 0) / ray.cpus_per_worker
    if ray.gpus_per_worker:
        fits = min(fits, resources.get("GPU", 0) / ray.gpus_per_worker)
    return int(fits)


def _on_one(needed: Needs, workers: int) -> Needs:
    """What a node with some of the workers needs; Ray listens there already."""
    share = workers / needed.workers
    fixed = RAY_BYTES + round((needed.fixed - RAY_BYTES) * share)
    return replace(needed, workers=workers, fixed=fixed, shm=round(needed.shm * share), ray=False)


def cluster_faults(cpus: float, gpus: float, ray: Ray) -> Iterator[Fault]:
    """More asked for than all nodes have: Ray would wait for ever."""
    advice = (
        "; a cluster that grows by itself is waited for with 'checks.waive: [preflight.resources]'"
        if ray.address
        else ""
    )
    least = ray.workers if ray.min_workers is None else min(ray.min_workers, ray.workers)
    wanted = least * ray.cpus_per_worker
    there = "the cluster has" if ray.address else "this machine has"
    if wanted > cpus:
        yield Fault(
            rule="preflight.resources", level="error", subject="ray.workers",
            message=f"{counted(least, 'worker')} x {ray.cpus_per_worker:g} cores = {wanted:g}, and {there} "
            f"{cpus:g}: Ray would wait for ever",
            measured=cpus, limit=wanted, row="5.1",
            advice=f"Set ray.workers to {max(1, int(cpus / ray.cpus_per_worker))}, lower "
            f"ray.cpus_per_worker, or add nodes{advice}.",
        )  # fmt: skip
    wanted = least * ray.gpus_per_worker
    if wanted > gpus:
        fits = int(gpus / ray.gpus_per_worker)
        yield Fault(
            rule="preflight.resources", level="error", subject="ray.gpus_per_worker",
            message=f"{counted(least, 'worker')} x {ray.gpus_per_worker:g} GPUs = {wanted:g}, and {there} "
            f"{gpus:g}: Ray would wait for ever",
            measured=gpus, limit=wanted, row="5.1",
            advice=(f"Set ray.workers to {fits}" if fits else "Set ray.gpus_per_worker to 0")
            + f", or add nodes with GPUs ('ray start --num-gpus'){advice}.",
        )  # fmt: skip


def node_faults(there: Node) -> Iterator[Fault]:
    """What a node has otherwise than the driver, or cannot reach."""
    if there.code != links.code_hash():
        yield Fault(
            rule="preflight.code", level="error", subject=there.name,
            message=f"{there.name} imports another version of this program than the driver's, which goes to "
            "each node with the job",
            measured=there.code[:12], limit=links.code_hash()[:12], row="5.1",
            advice="Remove the one that stands first on its path (PYTHONPATH, or a checkout in the folder in "
            "which 'ray start' ran).",
        )  # fmt: skip
    here = node.versions()
    other = {name: version for name, version in there.versions.items() if version != here[name]}
    if other:
        told = ", ".join(f"{name} {version} (here {here[name]})" for name, version in other.items())
        yield Fault(
            rule="preflight.versions", level="error", subject=there.name,
            message=f"{there.name} has {told}",
            measured=other, limit=here, row="5.1",
            advice="Install what requirements.lock names there, or use the same image on all nodes.",
        )  # fmt: skip
    if there.storage:
        yield Fault(
            rule="preflight.storage", level="error", subject=there.name, message=there.storage,
            measured=None, limit=None, row="5.1", advice="",
        )  # fmt: skip
    if there.unseen:
        yield Fault(
            rule="preflight.images", level="error", subject=there.name,
            message=f"{there.name} cannot read an image: {there.unseen}",
            measured=None, limit=None, row="5.1",
            advice="Put the images where every node reads them: s3://bucket/prefix as data.source, a folder "
            "that all nodes mount at the same path, or shards ('retort shard', with ray.storage).",
        )  # fmt: skip


class Watch:
    """Which nodes live while training runs; each change is said once."""

    def __init__(self, ray: Ray) -> None:
        self._ray = ray
        self._looked = 0.0
        self._names: dict[str, str] = {}
        self._waits = False

    def __call__(self) -> None:
        """Look, if it is time to."""
        now = time.monotonic()
        if not self._ray.address or now - self._looked < LOOK_SECONDS:
            return
        import ray as ray_core

        self._looked = now
        alive = [one for one in ray_core.nodes() if one["Alive"]]
        room = sum(_room(one["Resources"], self._ray) for one in alive)
        self.tell({one["NodeID"]: _name(one) for one in alive}, room)

    def tell(self, names: dict[str, str], room: int) -> None:
        """Say what changed since the last look.

        Args:
            names: of the nodes that live.
            room: workers that fit on them.
        """
        ray = self._ray
        known, self._names = self._names, names
        if known:
            for node in known.keys() - names.keys():
                log.warning(f"ray: node {known[node]} is lost")
            for node in names.keys() - known.keys():
                log.info(f"ray: node {names[node]} has joined")
        least = ray.workers if ray.min_workers is None else min(ray.min_workers, ray.workers)
        waits = room < least
        if waits and not self._waits:
            log.warning(
                f"ray: the nodes that are left have room for {room} of {counted(least, 'worker')}: training "
                "waits until others join ('ray start --address=...'); Ctrl-C stops it, the same command goes "
                "on later"
            )
        self._waits = waits

"""Ray: start or find it, run a training function on its workers, hear from them, stop it cleanly.

A node needs no file of the driver's: our code goes to it with the job (Ray's ``py_modules``), so that none
trains another version; what a specification names comes from ``ray.storage``.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import pickle
import re
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common import object_store, shared, signals
from components.common.environment import collect_less_often, environment
from components.common.errors import RetortError, Terminated
from components.common.storage import disk_full, read_json, remove, state_dir, write_json
from components.dataset import s3
from components.training import kept, reaper, remote
from components.training.params import Ray, refuse_kuberay
from components.training.stall import Stall

if TYPE_CHECKING:
    import torch

    from components.training.context import Exchange

log = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0  # for a cluster that should be there
POLL_SECONDS = 0.2
END_SECONDS = 10.0  # for the thread that waits for the trainer, once Ray is stopped
WAIT = timedelta(minutes=30)  # of a worker for the others, in one call; Ray sees a lost one sooner
ASK_SECONDS = 0.5  # between two questions of a worker, whether it is to stop
BEAT_SECONDS = 2.0  # between two signs of life
STOP_SECONDS = 20.0  # for workers that were asked to save and return; Kubernetes kills after 30
STATE = "state.pt"  # in each checkpoint
RESCUED = "rescued.pt"  # in a run's folder: the last whole checkpoint, of which Ray knows no more
STORED = "storage.json"  # in a run's folder: that its checkpoints lie in a storage, and in which
CODE = Path(__file__).parents[1]  # the package that goes to the nodes
THREAD = "ray-train"
OBJECT_STORE_BYTES = 100_000_000  # of a local cluster; images never pass through it
REPO_ROOT = Path(__file__).parents[2]
# failures of these kinds lie in code or in data: the next worker would fail alike
CERTAIN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    TypeError,
    ValueError,
)
# ... and those that say this are what a worker sees when another one is gone
BY_OTHERS = re.compile("connection|peer|gloo|nccl|socket|timed out|timeout", re.IGNORECASE)
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # else what still runs after an interruption starts another cluster
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "TRAIN_ENABLE_SHARE_CUDA_VISIBLE_DEVICES": "1",  # of a node's workers: else NCCL cannot go card to card
    # a report waits until Ray has asked for the one before, every two seconds by default: longer than an
    # epoch of a small data set takes, and until then its checkpoint is not known to Ray
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
}
# for each worker, whoever started its node: Ray passes the driver's environment on to a local cluster only
WORKER_SETTINGS = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic matrix products on a GPU
}
# this machine is not going to be taken away: no actor that looks out for it
LOCAL_SETTINGS = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}

Event = dict[str, Any]
State = dict[str, Any]


@contextmanager
def running(params: Ray) -> Iterator[None]:
    """A Ray cluster to work with: a local one, stopped at the end, or the one at ``params.address``.

    Raises:
        RetortError: when nothing answers at the address.
    """
    refuse_kuberay(params)
    if params.address.startswith("ray://"):
        _answers(params.address)
    settings = SETTINGS if params.address else {**SETTINGS, **LOCAL_SETTINGS}
    ours = {key: os.environ.get(key, value) for key, value in settings.items()}
    with environment(ours), nullcontext() if params.address else reaper.beside(), _connected(params):
        yield


@contextmanager
def _connected(params: Ray) -> Iterator[None]:
    import ray

    # Ray's driver takes over SIGTERM; the command line's own handler must stay in charge
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if params.address:
        options["address"] = params.address
        options["runtime_env"] = {
            "py_modules": [str(CODE)],
            "excludes": ["__pycache__"],
            "env_vars": {**SETTINGS, **WORKER_SETTINGS},
        }
    else:
        options.update(
            address="local",
            num_cpus=max(1, round(params.workers * params.cpus_per_worker)),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
        )
    try:
        with (
            nullcontext() if params.address else signals.defer_signals()
        ):  # a local one starts within seconds
            ray.init(**options)
    except SystemExit:  # by a handler that Ray has while it starts
        raise Terminated from None
    except Exception as error:
        if (
            not isinstance(error, (ConnectionError, TimeoutError, RuntimeError))
            and type(error) is not Exception
        ):
            raise  # a bare one is how Ray says that its node took more than 30 s to start
        first = str(error).splitlines()[0] if str(error) else repr(error)
        if not params.address:
            raise RetortError(
                f"Ray did not start on this machine ({first}); it may be too busy, or short of memory: run "
                "the same command again when less runs beside it"
            ) from None
        raise RetortError(
            f"ray.address: '{params.address}': Ray does not answer ({first}); "
            "start a cluster, correct the address, or use '' for a local one"
        ) from None
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, handler)
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        signals.raise_pending()
        yield
    finally:
        ray.shutdown()
        for thread in threading.enumerate():
            if thread.name == THREAD:  # still inside Ray's core, it would crash Python's own ending
                thread.join(END_SECONDS)
        if in_main:
            signal.signal(signal.SIGTERM, handler)


def _answers(address: str) -> None:
    """Raise RetortError within seconds when no Ray client server answers: Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").partition("/")[0].rpartition(":")
    if not host or not port.isdigit():
        raise RetortError(f"ray.address: '{address}': expected ray://HOST:PORT, such as ray://head:10001")
    advice = "start the cluster's head (its Ray client port is 10001 by default), or correct the address"
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise RetortError(f"ray.address: '{address}': {error.strerror or error}; {advice}") from None
    import grpc  # type: ignore[import-untyped]

    channel = grpc.insecure_channel(f"{host}:{port}")
    try:
        grpc.channel_ready_future(channel).result(timeout=CONNECT_SECONDS)
    except grpc.FutureTimeoutError:
        raise RetortError(
            f"ray.address: '{address}': something listens, but does not answer as Ray does; {advice}"
        ) from None
    finally:
        channel.close()


class EventQueue:
    """An actor that holds what workers said until the driver asks, and tells them that they are to stop."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stopping = False
        self._asked = False

    def put(self, event: Event) -> None:
        self._events.append(event)

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def stop(self) -> bool:
        """Ask the workers to save and return; whether they look at that at all."""
        self._stopping = True
        return self._asked

    def stopping(self) -> bool:
        self._asked = True
        return self._stopping


class RayContext:
    """A worker's place in a run of Ray Train: ``components.training.context.Context``.

    Checkpoints go to Ray's own storage, a folder of this machine or what ``ray.storage`` names.
    """

    def __init__(self, mailbox: Any, exchange: Exchange | None = None, rescued: str | None = None) -> None:
        import ray
        import ray.train
        import ray.train.torch

        here = ray.train.get_context()
        self.rank: int = here.get_world_rank()
        self.world: int = here.get_world_size()
        self.local_rank: int = here.get_local_rank()
        self.device: torch.device = ray.train.torch.get_device()
        self.exchange = exchange
        self._mailbox, self._rescued = mailbox, rescued
        self._stopping: threading.Event | None = None
        self._node: str = ray.util.get_node_ip_address()
        # what it does, since when, how long that takes, and how many things it has done: changed at once
        self._doing: tuple[str, float, float | None, int] = ("starting", time.monotonic(), None, 0)
        self._beating = False

    @contextmanager
    def group(self) -> Iterator[None]:
        """torch's default process group of all workers, as long as the block runs; one alone needs none."""
        import ray
        import ray.train.collective
        import torch
        from torch import distributed

        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.set_device(self.device)
        if self.world == 1:
            yield
            return
        ip = ray.util.get_node_ip_address()
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            interface = _interface(ip)
            if interface is not None:
                os.environ.setdefault(name, interface)
        server = None
        if self.rank == 0:  # it chooses its port itself, so that no other process takes it meanwhile
            server = distributed.TCPStore(ip, 0, None, True, WAIT, wait_for_workers=False)
        host, port = ray.train.collective.broadcast_from_rank_zero(server and (ip, server.port))
        store = server or distributed.TCPStore(host, port, None, False, WAIT)
        distributed.init_process_group(
            "nccl" if cuda else "gloo", store=store, rank=self.rank, world_size=self.world, timeout=WAIT
        )
        yield
        # not after a failure: the others may be gone, or wait in another call
        distributed.destroy_process_group()

    def load_checkpoint(self) -> State | None:
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            return _state(checkpoint)
        if self._rescued is None:
            return None
        import torch

        return torch.load(self._rescued, map_location="cpu", weights_only=True)

    def save_checkpoint(self, state: State | None) -> None:
        """Keep rank 0's state; returns when it is safe.

        Raises:
            RetortError: when there is no room for it; the checkpoint before it is then whole.
        """
        import ray.train
        import torch

        if self.rank != 0:
            ray.train.report({})
            return
        assert state is not None
        with tempfile.TemporaryDirectory(prefix="retort-checkpoint-") as folder:
            try:
                torch.save(state, Path(folder) / STATE)
            except (OSError, RuntimeError) as error:  # torch's writer has its own words for a full disk
                raise _no_room(folder, error) from error
            try:
                ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(folder))
            except OSError as error:
                raise _no_room(ray.train.get_context().get_storage().experiment_fs_path, error) from error

    def send(self, kind: str, **values: Any) -> None:
        tell(self._mailbox, kind, **values)

    def at(self, what: str, usual: float | None = None) -> None:
        """What this worker does from now on; a thread tells the driver, every other second."""
        self._doing = (what, time.monotonic(), usual, self._doing[3] + 1)
        if not self._beating:
            self._beating = True
            threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while True:
            what, since, usual, count = self._doing
            age = time.monotonic() - since
            self.send("beat", rank=self.rank, node=self._node, what=what, age=age, usual=usual, count=count)
            time.sleep(BEAT_SECONDS)

    def stop_requested(self) -> bool:
        """Whether the driver was told to end: the state is to be saved, and the loop to return, in seconds.

        Each worker learns it at a moment of its own, so they have to agree on the step at which they stop.
        It costs nothing to ask: a thread looks, every half second.
        """
        if self._stopping is None:
            self._stopping = threading.Event()
            threading.Thread(target=self._look, args=(self._stopping,), daemon=True).start()
        return self._stopping.is_set()

    def _look(self, stopping: threading.Event) -> None:
        import ray

        while not stopping.is_set():
            if ray.get(self._mailbox.stopping.remote()):
                stopping.set()
            time.sleep(ASK_SECONDS)


def _interface(ip: str) -> str | None:
    """The network interface that has an address. Without its name gloo takes the host name's, which is a
    loopback address on many hosts: then no other host gets through."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == ip for address in addresses):
            return name
    return None


def _state(checkpoint: Any) -> State:
    """What a checkpoint of Ray Train holds."""
    import torch

    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder) / STATE, map_location="cpu", weights_only=True)


def _no_room(folder: str, error: BaseException) -> BaseException:
    """What to raise when a checkpoint could not be written: one line, if it is for want of room."""
    # torch's writer says only where in its file it stopped
    if not (disk_full(error) or "inline_container" in str(error) or "PytorchStreamWriter" in str(error)):
        return error
    return RetortError(
        f"{folder}: the disk is full, and the last checkpoint could not be written; the one before it is "
        "kept: free some space and run the same command, it goes on from there"
    )


def fit(
    loop: Callable[[Any, Any], None],
    spec: Any,
    params: Ray,
    folder: Path,
    hear: Callable[[Event], None],
) -> State | None:
    """Run ``loop(context, spec)`` on ``params.workers`` workers; ``folder`` keeps the checkpoints they save.

    What they ``send`` reaches ``hear`` here, in this thread. A folder that holds checkpoints of an earlier,
    interrupted run is gone on with. A lost worker is replaced, and all of them go on from the last
    checkpoint, ``params.max_failures`` times. A failure that would only come again ends it at once. At
    SIGTERM workers that look at ``context.stop_requested()`` have some seconds to save and return.

    Returns:
        The state that was saved last, or None when none was.

    Raises:
        RetortError: raised by a worker, or when too many workers were lost.
        Terminated: SIGTERM arrived.
    """
    import ray

    from components.training.nodes import Watch  # not at the top: workers do without what it imports

    storage = remote.open_storage(params.storage) if params.storage else None
    rescued = _rescue(folder)
    if storage is not None:
        spec = remote.publish(storage, spec)
        write_json(folder / STORED, dataclasses.asdict(storage))  # type: ignore[call-overload]
    # beside the driver: another node may be lost
    node = ray.get_runtime_context().get_node_id()
    here: dict[str, Any] = {"num_cpus": 0, "label_selector": {"ray.io/node-id": node}}
    mailbox: Any = ray.remote(**here)(EventQueue).remote()
    outcome: dict[str, Any] = {}
    config = {**sent((loop, spec), mailbox, storage), "rescued": rescued}
    if params.address.startswith("ray://"):  # a thin client: the trainer itself runs in the cluster
        remote_fit = ray.remote(**here)(_fit)

        def work() -> None:
            _keep(outcome, lambda: ray.get(remote_fit.remote(config, params, str(folder))))
    else:

        def work() -> None:
            _keep(outcome, lambda: _fit(config, params, str(folder)))

    # Ray's own SIGINT handling is for the main thread: here that thread listens, so that Ctrl-C and
    # SIGTERM arrive as exceptions and the step's frame can clean up
    thread = threading.Thread(target=work, name=THREAD, daemon=True)
    thread.start()
    errors: list[RetortError] = []
    failures, watch, stall = Failures(), Watch(params), Stall(params.stall_minutes)

    def listen() -> None:
        for event in _taken(mailbox):
            if event["kind"] == "error":
                errors.append(RetortError(event["message"]))
                errors[-1].rule = event["rule"]
            elif event["kind"] == "beat":
                stall.hear(event)
            elif event["kind"] == "failed":
                errors.extend(RetortError(said) for said in failures.judge(event))
            else:
                hear(event)

    try:
        with signals.defer_signals():  # else they are raised inside Ray, which makes other exceptions of them
            while thread.is_alive() and not errors:
                thread.join(POLL_SECONDS)
                signals.raise_pending()
                listen()
                watch()
                stall.need_moving()
    except Terminated:
        with signals.defer_signals():
            if ray.get(mailbox.stop.remote(), timeout=STOP_SECONDS):
                log.info("stopping: the workers save a checkpoint first")
                end = time.monotonic() + STOP_SECONDS
                while thread.is_alive() and time.monotonic() < end:
                    thread.join(POLL_SECONDS)
                    listen()
        raise
    if not errors:
        listen()
    if errors:
        raise errors[0]
    if "error" in outcome:
        error = outcome["error"]
        if disk_full(error):
            raise _no_room(str(folder) if storage is None else storage.uri, error) from None
        raise RetortError(_why(error, params))
    return None if outcome["checkpoint"] is None else _state(outcome["checkpoint"])


def _taken(mailbox: Any) -> list[Event]:
    """What workers said since the last time.

    Raises:
        RetortError: when the cluster's head is gone.
    """
    import ray
    from ray.exceptions import RayError

    try:
        return ray.get(mailbox.take.remote())
    except (RayError, ConnectionError) as error:
        first = (str(error).splitlines() or [repr(error)])[0]
        raise RetortError(
            f"the Ray cluster is gone ({first})\n"
            "start it again, or another: the same command goes on from the last checkpoint"
        ) from None


def import_ahead() -> None:
    """Begin a worker's imports when its process starts: Ray Train takes seconds before it calls the loop."""

    def work() -> None:
        for name in ("ray.train.torch", "components.training.trainer"):
            importlib.import_module(name)

    collect_less_often()
    threading.Thread(target=work, name="imports", daemon=True).start()


def _keep(outcome: dict[str, Any], call: Callable[[], Any]) -> None:
    """Carry a thread's result, or its failure, over to the thread that waits for it."""
    try:
        outcome["checkpoint"] = call()
    except BaseException as error:  # noqa: BLE001
        outcome["error"] = error


def _unpack_and_run(config: dict[str, Any]) -> None:
    """What Ray's worker is given: packed, so that only workers import what the loop needs.

    Ray's controller unpickles the loop and what it is given too, before it starts the workers, and would
    spend seconds on importing networks that it never runs.
    """
    mailbox, storage = config["mailbox"], config["storage"]
    try:
        loop, spec = unpacked(config)
        exchange: Exchange | None = storage and remote.StateExchange(storage)
        if storage is None and shared.place() is not None:
            exchange = kept.SharedExchange()
        context = RayContext(mailbox, exchange, config["rescued"])
        loop(context, spec)
    except RetortError as error:
        tell(mailbox, "error", message=str(error), rule=error.rule)
        raise
    except Exception as error:
        tell(mailbox, "failed", **described(error))
        raise


def sent(value: Any, mailbox: Any, storage: object_store.Storage | None) -> dict[str, Any]:
    """What goes to workers: a value, packed, and where its paths lie."""
    import ray

    return {
        "packed": ray.cloudpickle.dumps(value),
        "mailbox": mailbox,
        "storage": storage,
        "state": str(state_dir().resolve()),
        "stores": s3.stores(),
    }


def unpacked(config: dict[str, Any]) -> Any:
    """What the driver sent, in a worker, with paths of its node, for which it is set up too."""
    import ray

    collect_less_often()
    for name, setting in WORKER_SETTINGS.items():
        os.environ.setdefault(name, setting)
    storage = config["storage"]
    # where the driver's files are not, a node keeps what it makes in a folder of its own
    os.environ["RETORT_STATE"] = config["state"] if storage is None else str(remote.node_cache("state"))
    value = ray.cloudpickle.loads(config["packed"])
    if storage is None:
        return value
    s3.remember_stores(config["stores"])
    return remote.localized(storage, value)


def described(error: Exception) -> dict[str, Any]:
    """A worker's failure as the driver judges it: what, where in our code, and whether it must come again.

    ``certain``: of a kind that no other try changes. ``by_others``: because another worker is gone.
    """
    ours = [  # the environment may lie in the checkout
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if REPO_ROOT in Path(frame.filename).parents and "site-packages" not in frame.filename
    ]
    place = f" ({Path(ours[-1].filename).relative_to(REPO_ROOT)}, line {ours[-1].lineno})" if ours else ""
    first = (str(error).splitlines() or [""])[0]
    return {
        "what": f"{type(error).__name__}: {first}{place}",
        "certain": isinstance(error, CERTAIN),
        "by_others": bool(BY_OTHERS.search(str(error))),
    }


class Failures:
    """Failures of workers, and which of them no new worker would get past."""

    def __init__(self) -> None:
        self._before: set[str] = set()

    def judge(self, event: Event) -> list[str]:
        """The message to stop with, if it is pointless to try again; else none."""
        what = event["what"]
        if event["by_others"]:
            return []
        twice = what in self._before
        self._before.add(what)
        if not (event["certain"] or twice):
            return []
        why = "it happened again on a new worker" if twice else "a new worker would get no further"
        return [
            f"training failed: {what}; {why}\n"
            "the same command goes on from the last checkpoint; please report it, if no file is at fault"
        ]


def _fit(config: dict[str, Any], params: Ray, folder: str) -> Any:
    """The last checkpoint that was reported, or None.

    Not by Ray's TorchTrainer: its controller imports torch before it starts a worker.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    place, storage = Path(folder), config["storage"]
    path, system = str(place.parent), None
    if storage is not None:
        path, system = storage.filesystem()
        path = f"{path}/{remote.CHECKPOINTS}"
    workers: Any = params.workers
    if params.min_workers is not None:
        workers = (min(params.min_workers, workers), workers)
    resources = {"CPU": params.cpus_per_worker}
    if params.gpus_per_worker:
        resources["GPU"] = params.gpus_per_worker
    trainer = _lean(DataParallelTrainer, cleaner=bool(params.address))(
        _unpack_and_run,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=params.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=place.name,
            storage_path=path,
            storage_filesystem=system,
            worker_runtime_env={"worker_process_setup_hook": f"{__name__}.import_ahead"},
            failure_config=FailureConfig(max_failures=params.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    return trainer.fit().checkpoint


def _lean(trainer: type[Any], cleaner: bool) -> type[Any]:
    """Ray Train without the processes that are of no use here: each takes more than a second of a core.

    Args:
        cleaner: whether to keep the one that frees what a killed controller held of a cluster.
    """
    needless = ("DatasetsCallback",) if cleaner else ("DatasetsCallback", "PlacementGroupCleanerCallback")

    class Lean(trainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [one for one in super()._create_default_callbacks() if type(one).__name__ not in needless]

    return Lean


def forget(folder: Path) -> None:
    """Remove a finished run's checkpoints, wherever they were kept."""
    if (folder / STORED).exists():
        content = read_json(folder / STORED)
        kind = object_store.S3Storage if content["uri"].startswith("s3://") else object_store.FolderStorage
        kind(**content).remove(f"{remote.CHECKPOINTS}/{folder.name}")
    remove(folder)


def _rescue(folder: Path) -> str | None:
    """Where the last whole checkpoint is, if Ray's list of them was cut off; else None.

    Ray does not write that list atomically: a full disk, or a kill, leaves it empty.
    """
    kept = folder / RESCUED
    for snapshot in folder.glob("*snapshot*.json"):
        try:
            json.loads(snapshot.read_text(encoding="utf-8"))
        except ValueError:
            snapshot.unlink()
            found = next(filter(_whole, sorted(folder.glob(f"checkpoint_*/{STATE}"), reverse=True)), None)
            if found is not None:
                os.replace(found, kept)
            elif not kept.exists():
                log.warning(
                    f"{folder}: its list of checkpoints was cut off, and none is whole; training starts over"
                )
            for rest in folder.glob("checkpoint_*"):
                remove(rest)
    return str(kept) if kept.exists() else None


def _whole(state: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    import torch

    try:
        torch.load(state, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return False
    return True


def _why(error: BaseException, params: Ray) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else repr(error)
    advice = "; more memory or fewer ray.workers may help" if _lost(error) else ""
    if params.storage and "AWS Error" in last:
        advice = f"; the store of ray.storage ({params.storage}) was away: see that it answers on every node"
    return (
        f"training failed {params.max_failures + 1} times (ray.max_failures: {params.max_failures}): {last}\n"
        f"the same command goes on from the last checkpoint{advice}"
    )


def _lost(error: BaseException) -> bool:
    """Whether a worker's process ended, as when memory runs out; not when all of them raised an error."""
    failed = getattr(error, "worker_failures", {}).values()
    return not failed or any(type(one).__module__.partition(".")[0] == "ray" for one in failed)


def tell(mailbox: Any, kind: str, **values: Any) -> None:
    """Send an event to the driver; it does not wait."""
    mailbox.put.remote({"kind": kind, **values})

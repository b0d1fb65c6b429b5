"""Trials on Ray Tune: many trainings of one worker each, of which those without promise are stopped early.

The second and last place, beside ``cluster.py``, that knows Ray. Which recipes are tried, and what they show,
is the business of ``tune.py``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from components.common import signals
from components.common.environment import environment
from components.common.errors import RetortError
from components.common.storage import remove
from components.tools.params import Tune
from components.training import cluster, remote
from components.training.context import Event, Exchange
from components.training.params import Ray
from components.training.spec import TrainSpec

METRIC = "macro_recall"  # of the validation split
SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the command line's own is in charge
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "30",  # for a trial that was stopped to leave its process to the next
    "RAY_AIR_NEW_OUTPUT": "0",
}


class TuneContext:
    """A trial's place, alone in its world; an epoch is told to Ray Tune, which may end the trial there."""

    rank, world, local_rank = 0, 1, 0
    exchange: Exchange | None = None

    def __init__(self, number: int, place: Path, mailbox: Any, gpu: bool) -> None:
        import torch

        self.device = torch.device("cuda" if gpu else "cpu")
        self._number, self._place, self._mailbox = number, place, mailbox

    def group(self) -> AbstractContextManager[None]:
        return nullcontext()

    def load_checkpoint(self) -> dict[str, Any] | None:
        import torch

        if not self._place.exists():
            return None
        return torch.load(self._place, map_location="cpu", weights_only=True)

    def save_checkpoint(self, state: dict[str, Any] | None) -> None:
        import torch

        if not self._place.parent.is_dir():  # on another machine: the trial would begin anew
            return
        partial = self._place.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._place)

    def send(self, kind: str, **values: Any) -> None:
        if kind not in ("epoch", "stopped", "done", "failed", "error"):
            return  # progress of many trials at a time says little
        cluster.tell(self._mailbox, kind, trial=self._number, **values)
        if kind == "epoch":
            from ray import tune

            tune.report({METRIC: values["row"]["val_macro_recall"]})

    def at(self, what: str, usual: float | None = None) -> None:
        pass  # nobody waits for a trial alone

    def stop_requested(self) -> bool:
        return False


def run(
    specs: Sequence[TrainSpec], ray: Ray, settings: Tune, epochs: int, folder: Path,
    hear: Callable[[Event], None],
) -> None:  # fmt: skip
    """Train the specs, ``ray.workers`` of them at a time, in a cluster that is running.

    The asynchronous successive halving algorithm (ASHA; Li et al., "A system for massively parallel
    hyperparameter tuning", 2020, alg. 2) ends a trial after 1, r, r^2, ... epochs unless it is among the best
    1 / r of those that came as far.

    Args:
        epochs: of a trial that is not stopped.
        folder: for checkpoints of trials, so that a search that was interrupted goes on.
        hear: gets events with the number of their ``trial``: ``epoch`` (with its row), ``stopped`` (with
            what a finding says), ``failed`` (with ``what``; another try may follow), ``done``.

    Raises:
        RetortError: raised by a trial, or Ray is at fault.
    """
    import ray as core

    remove(folder / "ray")  # Tune's own notes of a search that was interrupted
    mailbox: Any = core.remote(num_cpus=0)(cluster.EventQueue).remote()
    storage = remote.open_storage(ray.storage) if ray.storage else None
    shared = list(specs) if storage is None else remote.publish(storage, list(specs))
    config = cluster.sent(shared, mailbox, storage)
    outcome: dict[str, BaseException] = {}
    local = not ray.address.startswith("ray://")

    def work() -> None:
        arguments = config, len(specs), ray, settings, epochs, str(folder)
        try:
            if local:
                _tune(*arguments)
            else:  # a thin client: the search itself runs in the cluster
                core.get(core.remote(num_cpus=0)(_tune).remote(*arguments))
        except BaseException as error:  # noqa: BLE001 - carried over to the thread that waits
            outcome["error"] = error

    errors: list[RetortError] = []

    def listen() -> None:
        for event in core.get(mailbox.take.remote()):
            if event["kind"] == "error":
                errors.append(RetortError(event["message"]))
            else:
                hear(event)

    with environment({key: os.environ.get(key, value) for key, value in SETTINGS.items()}):
        thread = threading.Thread(target=work, name=cluster.THREAD, daemon=True)
        thread.start()
        while thread.is_alive() and not errors:
            thread.join(cluster.POLL_SECONDS)
            signals.raise_pending()
            listen()
    if not errors:
        listen()
    if errors:
        raise errors[0]
    if "error" in outcome:
        lines = [line for line in str(outcome["error"]).splitlines() if line.strip()]
        raise RetortError(f"tune: the search failed: {lines[-1].strip() if lines else outcome['error']!r}")


def _tune(config: dict[str, Any], count: int, ray: Ray, settings: Tune, epochs: int, folder: str) -> None:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    resources = {"cpu": ray.cpus_per_worker, "gpu": ray.gpus_per_worker}
    trainable = tune.with_resources(
        tune.with_parameters(_trial, sent=config, folder=folder, gpu=ray.gpus_per_worker > 0),
        resources,
    )
    tuner = tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(list(range(count)))},
        tune_config=tune.TuneConfig(
            scheduler=ASHAScheduler(
                metric=METRIC, mode="max", max_t=epochs, grace_period=min(settings.first_epochs, epochs),
                reduction_factor=settings.reduction, stop_last_trials=False,
            ),
            max_concurrent_trials=ray.workers,
            reuse_actors=True,  # imports are most of what a short trial takes
        ),
        run_config=tune.RunConfig(
            name="ray", storage_path=folder, verbose=0, failure_config=tune.FailureConfig(ray.max_failures)
        ),
    )  # fmt: skip
    tuner.fit()


def _trial(config: dict[str, Any], sent: dict[str, Any], folder: str, gpu: bool) -> None:
    number = config["trial"]
    context = TuneContext(number, Path(folder, f"{number}.pt"), sent["mailbox"], gpu)
    try:
        spec = cluster.unpacked(sent)[number]
        from components.training import trainer

        trainer.train(context, spec)
    except RetortError as error:
        context.send("error", message=str(error))
        raise
    except Exception as error:
        context.send("failed", **cluster.described(error))
        raise
    context.send("done")

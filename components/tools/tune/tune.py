"""The command ``tune``: search for a better recipe, and then let seeds decide whether it is one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from components.common import progress
from components.common.progress import counted, log_if_due
from components.common.storage import (
    need,
    read_json,
    remove,
    sha256_json,
    state_dir,
    write_json,
)
from components.models.params import Net
from components.step import StepContext, step
from components.tools.params import TuneParams
from components.tools.tune import report, trials
from components.tools.tune.report import FIXED, TUNED, Outcome
from components.tools.tune.space import Tried, Values, applied, axes, choose, described, proposals
from components.tracking.tracker import Tracker, ending
from components.training import cluster, driver, listener, metrics, preflight
from components.training.context import Event
from components.training.report import headline
from components.training.spec import Phase, TrainSpec

log = logging.getLogger(__name__)

STATE = "tune"  # below .retort: what was tried, by the hash of all of it, and finished trainings


def tune(params: TuneParams, *, manifest: Path, plan: Path, weights: Path, out: Path) -> None:
    """Try recipes with a scheduler that stops the hopeless ones, then train the best one with seeds.

    A trial is chosen by what one seed showed on the validation split, among many: that alone is no proof.
    So the best recipe and the fixed one of params.yaml are trained again, with ``tune.seeds`` other seeds
    each, and compared image by image. Every trial and every training is a run of the MLflow experiment
    ``<registry.name>-tune``; what is finished is kept under ``.retort/`` and not repeated. The test split
    decides nothing: its figures are beside the others.

    Writes ``results.csv`` (a row a trial), ``seeds.csv`` (a row a training), ``metrics.json`` and
    ``best.yaml``, a piece of params.yaml.

    Args:
        manifest: the clean manifest.
        plan: ``plan.json`` of the audits.
        weights: folder with the network's start weights.

    Raises:
        FindingsError: preflight.*; train.finite.
        RetortError: a file, the plan, Ray or a worker is at fault; no trial came to its end.
    """
    settings = params.tune
    net: Net = getattr(params, settings.of)
    registry = params.registry.model_copy(update={"name": f"{params.registry.name}-tune"})
    params = params.model_copy(update={"registry": registry})
    with step("tune", params, out, [manifest, plan]) as run:
        need(manifest, "validate")
        epochs = settings.epochs or net.train.epochs
        recipes = proposals(axes(settings, net), settings.trials, params.general.seed)
        start = driver.start_weights(weights, settings.of, net)
        read = driver.load_plan(run, plan, manifest)

        def spec_of(values: Values) -> TrainSpec:
            own = applied(net, values)
            phases = (Phase("finetune", "net", epochs, own.lr),)
            made = driver.make_spec(params, own, params.ray, params.data, manifest, read, start, phases)
            return replace(made, allow_flat_loss=True)

        specs = [spec_of(values) for values in recipes]
        alone = [_alone(spec, params.ray.workers) for spec in specs]
        preflight.preflight(run, specs[0], params.ray, settings.of, trainings=2 * settings.seeds)
        preflight.check_memory(run, alone[0], params.ray, settings.of)
        log.info(
            f"{run.name}: {settings.trials} recipes x up to {counted(epochs, 'epoch')}, {params.ray.workers} "
            f"at a time; then the best and the fixed one x {counted(settings.seeds, 'seed')}"
        )
        with ExitStack() as stack:

            @cache
            def connect() -> None:
                """Start Ray, or find it: once, and only if something is left to train."""
                progress.at("starting Ray" if not params.ray.address else "connecting to Ray")
                stack.enter_context(cluster.running(params.ray))

            tried = _search(run, params, alone, recipes, epochs, connect)
            best = choose(tried)
            outcomes = _compare(run, params, specs[0], specs[best.number], connect) if best.number else []
        actual = {split: driver.labels(specs[0], split) for split in ("val", "test")}
        report.write(run, params.tune, net, tried, best, outcomes, actual, specs[0].class_names, out)


# --- trials ------------------------------------------------------------------------------------------------


def _alone(spec: TrainSpec, workers: int) -> TrainSpec:
    """One worker that takes the batches of all, so that rates and weight decay mean the same later."""
    train = spec.train.model_copy(update={"batch_size": spec.train.batch_size * workers})
    return replace(spec, workers=1, train=train)


def _search(
    run: StepContext, params: TuneParams, alone: Sequence[TrainSpec], recipes: Sequence[Values], epochs: int,
    connect: Callable[[], None],
) -> list[Tried]:  # fmt: skip
    """All trials, or those of an earlier run with the same specs and the same way to stop them."""
    settings, ray = params.tune, params.ray
    rest = [settings.first_epochs, settings.reduction, ray.workers]
    folder = state_dir(STATE, sha256_json([[spec.key() for spec in alone], rest])[:24]).resolve()
    kept = folder / "search.json"
    if kept.exists():
        log.info(f"{run.name}: {counted(len(recipes), 'trial')} were finished by an earlier run")
        return [Tried(**content) for content in read_json(kept)]
    tried = [Tried(number, values) for number, values in enumerate(recipes)]
    connect()
    progress.at("the first trials: imports, data, network")
    hearing = _Hearing(run, params, tried, epochs, folder)
    started = time.monotonic()
    with hearing.tracked():
        trials.run(alone, ray, settings, epochs, folder, hearing)
    for one in tried:
        if one.end == "stopped" and len(one.rows) >= epochs:  # stopped at its last epoch is not stopped
            one.end = "done"
    stopped = sum(one.end == "stopped" for one in tried)
    taken = sum(len(one.rows) for one in tried)
    log.info(
        f"{run.name}: {counted(len(tried), 'trial')} in {listener.duration(time.monotonic() - started)}: "
        f"{stopped} stopped early, {taken:,} of {len(tried) * epochs:,} epochs taken"
    )
    remove(folder)  # checkpoints of trials
    write_json(kept, [vars(one) for one in tried])
    return tried


class _Hearing:
    """What trials tell: rows for the table, a line now and then, and an MLflow run each."""

    def __init__(
        self, run: StepContext, params: TuneParams, tried: Sequence[Tried], epochs: int, folder: Path
    ) -> None:
        self._run, self._params, self._tried, self._epochs = run, params, tried, epochs
        self._folder, self._started, self._promised = folder, time.monotonic(), False
        self._trackers: dict[int, tuple[Tracker, float]] = {}

    def __call__(self, event: Event) -> None:
        one = self._tried[event["trial"]]
        if event["kind"] == "epoch":
            row = event["row"]
            if any(row["epoch"] == known["epoch"] for known in one.rows):  # told again after a restart
                return
            one.rows.append(row)
            taken = sum(len(other.rows) for other in self._tried)
            done = sum(other.end == "done" for other in self._tried)
            progress.at(f"trials: {counted(taken, 'epoch')} taken, {done} of {len(self._tried)} at their end")
            self._tracker(one).metrics(
                {name: row[name] for name in row if name not in ("phase", "epoch")}, step=row["epoch"]
            )
            leader = max(self._tried, key=lambda other: (len(other.rows) >= self._epochs, other.score))
            log_if_due(
                f"{self._run.name}: trial {one.number} ({described(one.values)}): epoch {row['epoch']} of "
                f"{self._epochs}, macro recall {row['val_macro_recall']:.2%}; the best so far is trial "
                f"{leader.number} with {leader.score:.2%}"
            )
        elif event["kind"] == "stopped":
            one.end = event["message"]
            log.info(f"{self._run.name}: trial {one.number} ({described(one.values)}): {event['message']}")
        elif event["kind"] == "failed":
            one.end = event["what"]
        elif event["kind"] == "done":
            one.end = "done" if one.rows else one.end
            self._finish(one, "FINISHED")
            self._promise()

    def _promise(self) -> None:
        """How long it will take, by the first trial that came to its end."""
        at_once = min(self._params.ray.workers, len(self._tried))
        rounds = -(-len(self._tried) // at_once) - 1
        if not self._promised and rounds:
            seconds = (time.monotonic() - self._started) * rounds
            log.info(f"{self._run.name}: the other trials will take {listener.duration(seconds)} at most")
        self._promised = True

    def _tracker(self, one: Tried) -> Tracker:
        if one.number not in self._trackers:
            tracker = Tracker(f"trial {one.number}", self._params.registry)
            of = self._params.tune.of
            net = applied(getattr(self._params, of), one.values).model_dump(mode="json")
            tracker.start({of: net}, {})
            tracker.tags({"kind": "trial", "trial": str(one.number), "recipe": described(one.values)})
            self._trackers[one.number] = tracker, time.monotonic()
        return self._trackers[one.number][0]

    def _finish(self, one: Tried, status: str) -> None:
        if one.number in self._trackers:
            tracker, started = self._trackers.pop(one.number)
            tracker.tags({"end": one.end})
            tracker.metrics({"best_val_macro_recall": one.score})
            tracker.finish(status, time.monotonic() - started, self._folder / str(one.number))

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """Every run that was opened is closed: a trial that was stopped early has done what it should."""
        with ending(self._finish_all):
            yield

    def _finish_all(self, status: str) -> None:
        for number in list(self._trackers):
            self._finish(self._tried[number], status)


# --- the comparison ----------------------------------------------------------------------------------------


def _compare(
    run: StepContext, params: TuneParams, fixed: TrainSpec, tuned: TrainSpec, connect: Callable[[], None]
) -> list[Outcome]:
    """Both recipes with the same seeds, none of which a trial has had; seed by seed."""
    seeds = range(params.general.seed + 1, params.general.seed + 1 + params.tune.seeds)
    jobs = [
        (who, replace(spec, seed=seed)) for seed in seeds for who, spec in ((FIXED, fixed), (TUNED, tuned))
    ]
    places = [state_dir(STATE) / "trainings" / spec.key()[:24] / "result.json" for _, spec in jobs]
    left = [at for at, place in enumerate(places) if not place.exists()]
    log.info(
        f"{run.name}: the best recipe against the fixed one: {counted(len(jobs), 'training')}, "
        f"{len(jobs) - len(left)} of them finished by an earlier run"
    )
    for at in left:
        connect()
        _train(run, params, *jobs[at], places[at])
    return [
        Outcome(
            who, spec.seed,
            {split: np.array(said, np.int64) for split, said in read_json(place)["predictions"].items()},
        )
        for (who, spec), place in zip(jobs, places, strict=True)
    ]  # fmt: skip


def _train(run: StepContext, params: TuneParams, who: str, spec: TrainSpec, place: Path) -> None:
    """One training as an MLflow run of its own; ``place`` keeps what came out."""
    name = f"{who} seed {spec.seed}"
    tracker = Tracker(name, params.registry)
    tracker.start(
        {params.tune.of: {"optimizer": spec.optimizer.model_dump(), "train": spec.train.model_dump()}}, {}
    )
    tracker.tags({"kind": "training", "recipe": who, "seed": str(spec.seed)})
    started = time.monotonic()
    with ending(lambda status: tracker.finish(status, time.monotonic() - started, place.parent)):
        own = StepContext(f"{run.name}: {name}", params, place.parent, tracker)
        own.report = run.report  # what stops a training stops the step
        checkpoints = driver.checkpoints(run.name, spec)
        result = driver.fit(own, spec, params.ray, checkpoints)
        predictions = result.predictions["net"]
        measured = {
            split: metrics.evaluate(driver.labels(spec, split), predictions[split], spec.class_names)
            for split in ("val", "test")
        }
        tracker.summary(headline(measured))
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, {"predictions": {split: predictions[split].tolist() for split in ("val", "test")}})
    driver.forget(checkpoints)

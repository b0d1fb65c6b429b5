"""The command ``compare-weights``: what start weights are worth on this data, measured with its noise."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from components.common.errors import RetortError
from components.common.page import Page
from components.common.storage import (
    human_bytes,
    need,
    need_disk,
    read_json,
    remove,
    state_dir,
    write_json,
)
from components.dataset import manifest as manifests
from components.models.card import RULE, first_difference, read_card
from components.models.checkpoint import CARD, FILE
from components.models.params import Net
from components.step import StepContext, step
from components.tools.compare_weights import report
from components.tools.compare_weights.report import CONFIGURED, ROW, Outcome
from components.tools.params import CompareWeightsParams
from components.tracking.tracker import Tracker, ending
from components.training import cluster, driver, listener, preflight
from components.training.paired import gain, interval
from components.training.report import write_history
from components.training.spec import Phase, TrainSpec
from components.weights.source import public
from components.weights.weights import prepare_net

log = logging.getLogger(__name__)

RANDOM, CHAMPION = "random", "champion"  # beside the configured ones
STATE = "compare-weights"  # below .retort: finished runs, by the hash of their spec


@dataclass(frozen=True)
class Candidate:
    """Start weights to compare. ``start`` is the prepared backbone; None: random."""

    name: str
    weights: str  # without passwords
    start: Path | None


def compare_weights(
    params: CompareWeightsParams, *, manifest: Path, plan: Path, champion: Path | None, out: Path
) -> None:
    """Finetune one network from several weights, with the same budget and the same seeds each.

    Every finetune is a run of the MLflow experiment ``<registry.name>-compare-weights``. What is finished is
    kept under ``.retort/`` and not repeated. Writes ``results.csv`` (a row a finetune), ``history.csv`` (a
    row an epoch), ``metrics.json`` (means, gains, their intervals, the choice).

    Args:
        manifest: the clean manifest.
        plan: ``plan.json`` of the audits.
        champion: folder with the champion's ``model.safetensors`` and ``model.json``; None: there is none.

    Raises:
        FindingsError: weights cover too little of the network; preflight.shm; train.finite.
        RetortError: there is nothing to compare; a file, the plan, Ray or a worker is at fault.
    """
    settings = params.compare_weights
    net: Net = getattr(params, settings.of)
    registry = params.registry.model_copy(update={"name": f"{params.registry.name}-compare-weights"})
    params = params.model_copy(update={"registry": registry})
    with step("compare-weights", params, out, [manifest, plan]) as run:
        need(manifest, "validate")
        epochs = settings.epochs or net.train.epochs
        phases = (Phase("finetune", "net", epochs, net.lr),)
        audited = driver.load_plan(run, plan, manifest)
        base = driver.make_spec(params, net, params.ray, params.data, manifest, audited, None, phases)
        actual = driver.labels(base, settings.split)
        if not len(actual):
            raise RetortError(
                f"{manifest}: no rows in the split '{settings.split}'; see compare_weights.split"
            )
        wanted = choose(run, params, net, champion)
        if CHAMPION in wanted and champion is not None:
            _find_champion(run, champion, base.class_names)
        trainings = len(wanted) * settings.seeds
        preflight.preflight(run, base, params.ray, settings.of, trainings)
        folder, proofs = state_dir(STATE, "weights"), Page()
        try:
            candidates = _prepare(run, params, net, wanted, folder, proofs)
            outcomes = _run_all(run, params, base, candidates, epochs)
            _write(run, params, candidates, outcomes, actual, base.class_names, out)
        finally:
            remove(folder)
            run.page.sections += proofs.sections  # behind the answer that a person came for


def choose(run: StepContext, params: CompareWeightsParams, net: Net, champion: Path | None) -> dict[str, str]:
    """The weights to compare, by name: the configured ones, random ones, the champion's, and those given.

    Raises:
        RetortError: when a given name is taken, or there is only one candidate.
    """
    of, given = params.compare_weights.of, params.compare_weights.candidates
    found = {CONFIGURED: net.weights}
    if net.weights != "none":
        found[RANDOM] = "none"
    if champion is not None:
        arch = read_card(champion / CARD).arch
        if (
            arch.name == net.arch.name
        ):  # of other blocks or another head: the weights are its plain backbone's
            found[CHAMPION] = str(champion / FILE)
        else:
            run.add_finding(
                "weights.source", "info", CHAMPION,
                f"the champion is a {arch.name}: its weights do not fit {of}.arch ({net.arch.name}); "
                "it is left out",
                measured=arch.name, limit=net.arch.name, row=ROW,
            )  # fmt: skip
    for name, weights in given.items():
        if name in (CONFIGURED, RANDOM, CHAMPION):
            raise RetortError(
                f"compare_weights.candidates: '{name}' is the name of weights that are compared anyway; "
                "choose another one"
            )
        found[name] = weights
    if len(found) == 1:
        raise RetortError(
            f"compare_weights.candidates: there is nothing to compare with, since {of}.weights is none; "
            "give some, such as -o 'compare_weights.candidates={imagenet: FILE}'"
        )
    return found


def _find_champion(run: StepContext, champion: Path, class_names: Sequence[str]) -> None:
    """That the champion was trained for other classes is no fault here, but worth knowing."""
    own = read_card(champion / CARD).class_names
    label = first_difference(own, dict(enumerate(class_names)))
    if label is None:
        return
    named = f"'{own[label]}'" if label < len(own) else "nothing"
    run.add_finding(
        RULE, "info", CHAMPION,
        f"the champion has other classes: it calls label {label} {named}, the data call it "
        f"'{class_names[label]}'; only its backbone is compared, so that is no fault",
        measured=len(own), limit=len(class_names), row="1.1",
    )  # fmt: skip


def _prepare(
    run: StepContext,
    params: CompareWeightsParams,
    net: Net,
    wanted: Mapping[str, str],
    folder: Path,
    proofs: Page,
) -> list[Candidate]:
    """Fetch, convert and prove each candidate's weights, as the step ``weights`` does; on their own page."""
    staging = StepContext(
        run.name, params, folder, run.tracker
    )  # their files are none of this step's products
    staging.report, staging.page = run.report, proofs
    candidates = []
    for name, weights in wanted.items():
        start = None
        if weights != "none":
            pinned = net.weights_sha256 if name == CONFIGURED else None
            own = net.model_copy(update={"weights": weights, "weights_sha256": pinned})
            path = prepare_net(
                staging, params.data.s3, name, own, folder, section=params.compare_weights.of
            ).path
            start = None if path is None else path.resolve()
        candidates.append(Candidate(name, public(weights), start))
    run.stop_on_errors()
    return candidates


# --- the finetunes ---------------------------------------------------------------------------------------


def _run_all(
    run: StepContext,
    params: CompareWeightsParams,
    base: TrainSpec,
    candidates: Sequence[Candidate],
    epochs: int,
) -> list[Outcome]:
    """All finetunes, seed by seed, so that a comparison that is broken off has compared something."""
    first = params.general.seed
    pairs = [
        (candidate, replace(base, start=candidate.start, seed=seed, allow_flat_loss=True))
        for seed in range(first, first + params.compare_weights.seeds)
        for candidate in candidates
    ]
    places = [state_dir(STATE) / spec.key()[:24] for _, spec in pairs]
    left = [at for at, place in enumerate(places) if not (place / "result.json").exists()]
    images = manifests.check(base.manifest).num_rows
    kept_bytes = len(left) * (8 * images + 10_000)  # predictions as text, and a history
    need_disk(state_dir(STATE), kept_bytes, "results of finetunes")
    prepared = sum(candidate.start.stat().st_size for candidate in candidates if candidate.start)
    log.info(
        f"{run.name}: {len(candidates)} candidates x {params.compare_weights.seeds} seeds = {len(pairs)} "
        f"finetunes of {epochs} epochs, {len(pairs) - len(left)} of them finished by an earlier run; "
        f"{human_bytes(prepared)} of disk for prepared weights until the end, up to "
        f"{human_bytes(kept_bytes)} for results, which are kept"
    )
    if left:
        with cluster.running(params.ray):
            for done, at in enumerate(left):
                started = time.monotonic()
                _finetune(run, params, *pairs[at], places[at])
                if done == 0 and len(left) > 1:
                    taken = time.monotonic() - started
                    log.info(
                        f"{run.name}: a finetune takes about {listener.duration(taken)}; the other "
                        f"{len(left) - 1} will take about {listener.duration(taken * (len(left) - 1))}"
                    )
    return [
        _read(candidate.name, spec.seed, place, params.compare_weights.split)
        for (candidate, spec), place in zip(pairs, places, strict=True)
    ]


def _finetune(
    run: StepContext, params: CompareWeightsParams, candidate: Candidate, spec: TrainSpec, place: Path
) -> None:
    """One finetune as an MLflow run of its own; ``place`` keeps what came out."""
    with _tracked(params, candidate, spec, place) as tracker:
        own = StepContext(f"{run.name}: {candidate.name} seed {spec.seed}", params, place, tracker)
        own.report = run.report  # what stops a finetune stops the step
        checkpoints = driver.checkpoints(run.name, spec)
        result = driver.fit(own, spec, params.ray, checkpoints)
        predictions = result.predictions["net"]
        tracker.summary(
            {
                f"{split}_top1": float((predictions[split] == driver.labels(spec, split)).mean())
                for split in ("val", "test")
                if len(predictions[split])
            }
        )
        place.mkdir(parents=True, exist_ok=True)
        write_history(place / "history.csv", result.history)
        write_json(
            place / "result.json",
            {
                "history": result.history,
                "predictions": {split: predictions[split].tolist() for split in ("val", "test")},
            },
        )
    driver.forget(checkpoints)


@contextmanager
def _tracked(
    params: CompareWeightsParams, candidate: Candidate, spec: TrainSpec, place: Path
) -> Iterator[Tracker]:
    """The MLflow run of one finetune, beside that of the step."""
    of = params.compare_weights.of
    net = getattr(params, of).model_dump(mode="json")
    tracker = Tracker(f"{candidate.name} seed {spec.seed}", params.registry)
    # what tells runs apart is a tag: their parent, which lists their parameters too, has all of them
    tracker.start({of: {key: value for key, value in net.items() if not key.startswith("weights")}}, {})
    tracker.tags({"candidate": candidate.name, "weights": candidate.weights, "seed": str(spec.seed)})
    started = time.monotonic()
    with ending(lambda status: tracker.finish(status, time.monotonic() - started, place)):
        yield tracker


def _read(candidate: str, seed: int, place: Path, split: str) -> Outcome:
    content = read_json(place / "result.json")
    return Outcome(candidate, seed, np.array(content["predictions"][split], np.int64), content["history"])


# --- what they show --------------------------------------------------------------------------------------


def _write(
    run: StepContext,
    params: CompareWeightsParams,
    candidates: Sequence[Candidate],
    outcomes: Sequence[Outcome],
    actual: np.ndarray,
    class_names: Sequence[str],
    out: Path,
) -> None:
    settings = params.compare_weights
    weights = {c.name: c.weights for c in candidates}
    said = {c.name: np.stack([o.predicted for o in outcomes if o.candidate == c.name]) for c in candidates}
    top1 = {name: (predicted == actual).mean(axis=1).tolist() for name, predicted in said.items()}
    found = {name: interval(values) for name, values in top1.items()}
    gains = {name: gain(actual, said[CONFIGURED], said[name]) for name in said if name != CONFIGURED}
    best = max(found, key=lambda name: found[name][0])
    behind = {name: gain(actual, said[best], said[name]) for name in said if name != best}
    tied = [name for name, (value, half) in behind.items() if half is None or value <= half]
    metrics = {
        "split": settings.split,
        "images": len(actual),
        "seeds": settings.seeds,
        "candidates": {
            name: {"weights": weights[name], "top1": mean, "half_width": half, "by_seed": top1[name]}
            for name, (mean, half) in found.items()
        },
        "gain": {name: {"top1": value, "half_width": half} for name, (value, half) in gains.items()},
        "choice": {"candidate": best, "not_told_apart_from": tied},
    }
    for name, (value, half) in gains.items():
        report.find_gain(run, settings.of, weights, name, value, half, len(actual), settings)
    report.write_tables(run, weights, outcomes, actual, class_names, settings.split, out)
    write_json(run.product(out / "metrics.json"), metrics)
    report.show(run, weights, found, gains, best, tied, outcomes, settings)
    run.tracker.summary({f"{name}_top1": mean for name, (mean, _) in found.items()})
    run.tracker.summary({f"gain_over_{name}": value for name, (value, _) in gains.items()})
    run.tracker.tags({"choice": best})

"""The step ``benchmark``: measure the exported models here, on this data, and recommend one configuration."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from components.benchmark.choice import Choice, Pair, Result, choose
from components.benchmark.engines import ENGINES, Job
from components.benchmark.params import BenchmarkParams
from components.benchmark.processors import processors
from components.benchmark.report import metrics, write
from components.benchmark.sweep import Config, Sweep, sweep
from components.benchmark.timing import ratio
from components.common.errors import RetortError
from components.common.progress import at
from components.common.storage import human_bytes, read_json, sha256_file
from components.dataset import manifest as manifests
from components.export import exported
from components.export.formats import FORMATS
from components.export.precisions import PRECISIONS, of_own_file
from components.models.card import names_finding
from components.step import StepContext, name_of, step

PROOF_IMAGES = 16  # on which an engine must agree before it is timed
SAMPLE = 1024  # validation images on which accuracy is measured, where export did not
PREPROCESSING_SHARE = 0.15  # of the time budget
MIN_IMAGES = 8  # on which preprocessing is measured, whatever the time
NETWORK = "network alone"
PREPROCESSING = (
    "read and decode the file",
    "crop and resize, outside the graph",
    "normalise, outside the graph",
    NETWORK,
    "network with all but decoding inside the graph",
)
NOISY = 0.25  # spread of identical rounds above which numbers are only rough


def benchmark(params: BenchmarkParams, *, manifest: Path, exports: Mapping[str, Path], out: Path) -> None:
    """Write ``results.csv``, ``choice.json``, ``metrics.json``, ``curves.png`` and ``curves.html``.

    Args:
        exports: by candidate name, the folder that export wrote. A name in ``benchmark.candidates`` that is
            not among them is taken for such a folder's path.

    Raises:
        RetortError: when a candidate has no exported model, or nothing could be measured at all.
    """
    settings = params.benchmark
    folders = {name: exports.get(name, Path(name)) for name in settings.candidates if _there(name, exports)}
    inputs = [manifest, *(folder / "model.onnx" for folder in folders.values())]
    with step("benchmark", params, out, inputs) as run:
        started = time.perf_counter()
        _need_models(folders)
        rows = exported.rows(manifest, "val")
        manifests.record_use(run.tracker, "clean", manifest, "val")
        at("reading the models, and what an image costs")
        models = {name: _Model(name, folder) for name, folder in folders.items()}
        _check_names(run, models, manifest)
        threads = _threads(run, settings.threads)
        configs = sorted(
            Config(batch, count, name, engine, precision)
            for batch in set(settings.batch_sizes)
            for count in threads
            for name in models
            for engine in settings.engines
            for precision in dict.fromkeys(settings.precisions)
        )
        files = {key: path for model in models.values() for key, path in model.files.items()}
        at("decoding images")
        some = rows.spread(PROOF_IMAGES)
        images = {name: model.images(params, some) for name, model in models.items()}
        spent = time.perf_counter() - started
        budget = (1 - PREPROCESSING_SHARE) * settings.time_budget_s - spent
        done = sweep(configs, files, images, budget_s=budget, seed=params.general.seed)
        _say_unmeasured(run, done, settings.time_budget_s)
        if not done.timings:
            raise RetortError(
                f"benchmark.time_budget_s {settings.time_budget_s:g}: no configuration could be measured; "
                "give more time or other engines"
            )
        results = _results(params, models, done, rows)
        chosen = replace(choose(results, settings.latency_budget_ms), pairs=_against(models, results, done))
        at("measuring the preprocessing")
        costs = _preprocessing(params, models[chosen.recommended.result.model], rows, started)
        _find(run, params, results, chosen, done, len(rows))
        write(run, params, results, chosen, costs, out)
        _track(run, results, chosen)


def _there(name: str, exports: Mapping[str, Path]) -> bool:
    """A retraining may have no teacher; all else that is asked for is measured, or missed."""
    return name in exports or name not in ("student", "teacher") or Path(name).exists()


def _need_models(folders: Mapping[str, Path]) -> None:
    for name, folder in folders.items():
        if not (folder / "model.onnx").is_file():
            raise RetortError(
                f"benchmark.candidates '{name}': {folder / 'model.onnx'}: no such file; run 'retort export"
                f"{' --of teacher' if name == 'teacher' else ''}' first, or give a folder that export wrote"
            )


def _check_names(run: StepContext, models: Mapping[str, _Model], manifest: Path) -> None:
    """Each candidate calls its classes what the data call them: else accuracies do not compare."""
    data = exported.class_names(manifest)
    for name, model in models.items():
        found = names_finding(
            model.about.class_names, data, name, name_of(model.files[name, "fp32"]),
            "Train and export it on this data, or leave it out of benchmark.candidates.",
        )  # fmt: skip
        if found["level"] != "info":
            run.add_finding(**found)
    run.stop_on_errors()


def _onnx_files() -> dict[str, str]:
    """The file of each precision that has one, in an export's folder."""
    return {precision: FORMATS["onnx"].file(precision) for precision in of_own_file()}


class _Model:
    """An exported model: its files by precision, what export measured, and what one image costs."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        proof = read_json(folder / "parity.json")
        proved = {file: about["sha256"] for file, about in proof.get("files", {}).items()}
        self.files = {
            (name, precision): folder / file
            for precision, file in _onnx_files().items()
            # an int8 file of another export may have stayed behind: it is no output that DVC restores
            if (folder / file).is_file() and proved.get(file) == sha256_file(folder / file)
        }
        if (name, "fp32") not in self.files:
            raise RetortError(
                f"{folder / 'model.onnx'}: not the file of its parity.json; run 'retort export' again"
            )
        self.about = exported.read(folder / "model.onnx")
        self.params, self.macs = cost(folder / "model.onnx")
        compared = proof["compared"]
        self.top1 = {
            precision: float(compared[f"{file}, batches"]["top1"])
            for precision, file in _onnx_files().items()
            if f"{file}, batches" in compared
        }

    def images(self, params: BenchmarkParams, rows: exported.Rows) -> np.ndarray:
        """``rows`` as the graph takes them."""
        size = self.about.size
        _, pixels = next(rows.images(params.data.root).squares(size, max(len(rows), 1)))
        return self.about.feed(pixels)


def family(arch: str) -> str:
    """The family of an architecture's name: what stands before its size (``resnet50d``: ``resnet``)."""
    return re.sub(r"_?(?<!v)\d+[a-z]?(_.*)?$", "", arch) or arch


def cost(path: Path) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one image, counted on the exported graph.

    Convolutions, fully connected layers and matrix products are counted; bias, activations and pooling not.
    """
    import onnx

    model = onnx.load(path)
    shapes = {item.name: list(item.dims) for item in model.graph.initializer}
    floating = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    params = sum(
        int(np.prod(item.dims))
        for item in model.graph.initializer
        if item.data_type in floating and item.dims
    )
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    for value in [*inferred.value_info, *inferred.input, *inferred.output]:
        # a symbolic size is the batch: one image
        shapes[value.name] = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
    macs = 0
    for node in model.graph.node:
        out = int(np.prod(shapes.get(node.output[0], [0])))
        if node.op_type == "Conv":
            macs += out * int(np.prod(shapes[node.input[1]][1:]))
        elif node.op_type == "Gemm":
            macs += int(np.prod(shapes[node.input[1]]))
        elif node.op_type == "MatMul" and node.input[0] in shapes:
            macs += out * shapes[node.input[0]][-1]
    return params, macs


def _threads(run: StepContext, wanted: Sequence[int]) -> list[int]:
    """Those that the processors allow; more would measure the scheduler."""
    have = processors()
    kept = sorted({count for count in wanted if 1 <= count <= have.threads})
    left = sorted(set(wanted) - set(kept))
    if left:
        run.add_finding(
            "benchmark.threads",
            "info" if kept else "warning",
            f"{', '.join(map(str, left))} threads",
            f"Not measured: {have.count:g} {have.limit}."
            + ("" if kept else f" {have.threads} measured instead."),
            measured=max(left),
            limit=have.threads,
            row="1.5",
        )
    return kept or [have.threads]


def _say_unmeasured(run: StepContext, done: Sweep, budget_s: float) -> None:
    reasons: dict[tuple[str, str], list[Config]] = {}
    for config, reason in done.refused.items():
        reasons.setdefault((f"{config.engine} {config.precision}", reason), []).append(config)
    for (subject, reason), configs in reasons.items():
        wrong = "other answers" in reason
        run.add_finding(
            "benchmark.engine",
            "warning" if wrong else "info",
            subject,
            f"Not measured ({len(configs)} configurations): {reason}.",
            advice="A faster wrong answer is no answer; use another engine for this model." if wrong else "",
            row="1.5",
        )
    if done.unmeasured:
        names = "; ".join(str(config) for config in done.unmeasured[:3])
        run.add_finding(
            "benchmark.time_budget",
            "warning",
            f"{len(done.unmeasured)} configurations",
            f"{budget_s:g} s were not enough to measure them (or memory was short): {names}"
            f"{', ...' if len(done.unmeasured) > 3 else ''}.",
            measured=len(done.unmeasured),
            limit=0,
            advice="Raise benchmark.time_budget_s, or ask for fewer threads, batch sizes or precisions.",
            row="1.5",
        )


def _results(
    params: BenchmarkParams, models: Mapping[str, _Model], done: Sweep, rows: exported.Rows
) -> list[Result]:
    reduced: dict[tuple[str, str], float] = {}
    results = []
    for config, timing in done.timings.items():
        model = models[config.model]
        kind = config.model, config.precision
        if PRECISIONS[config.precision].convert is None and kind not in reduced:
            reduced[kind] = _top1_within(params, model, config, rows)
        top1 = reduced[kind] if kind in reduced else model.top1[config.precision]
        path = model.files.get((config.model, config.precision)) or model.files[config.model, "fp32"]
        results.append(
            Result(
                model=config.model,
                family=family(model.about.arch),
                arch=model.about.arch,
                engine=config.engine,
                threads=config.threads,
                batch=config.batch,
                precision=config.precision,
                p50_ms=round(timing.p50_ms, 4),
                p95_ms=round(timing.p95_ms, 4),
                noise=round(timing.noise, 4),
                throughput=round(1e3 * config.batch / timing.p50_ms, 1),
                size_bytes=path.stat().st_size,
                params=model.params,
                macs=model.macs,
                val_top1=round(top1, 6),
            )
        )
    return results


def _top1_within(params: BenchmarkParams, model: _Model, config: Config, rows: exported.Rows) -> float:
    """Top-1 in a precision that the engine computes in: on the validation split, or an even sample of it."""
    some, batch = rows.spread(SAMPLE), 16
    path = model.files[model.name, "fp32"]
    run = ENGINES[config.engine].open(Job(path, config.precision, config.threads, batch))
    right = 0
    for place, pixels in some.images(params.data.root).squares(model.about.size, batch):
        filled = pixels[np.arange(batch) % len(pixels)]
        found = run(model.about.feed(filled)).argmax(axis=1)[: len(pixels)]
        right += int((found == some.labels[place]).sum())
    return right / len(some)


def _against(models: Mapping[str, _Model], results: Sequence[Result], done: Sweep) -> list[Pair]:
    """Student over teacher, p50 in the same configuration and the same rounds."""
    pairs = []
    for config, timing in done.timings.items():
        other = Config(config.batch, config.threads, "teacher", config.engine, config.precision)
        if config.model != "student" or other not in done.timings:
            continue
        middle, low, high = ratio(timing, done.timings[other])
        pairs.append(
            Pair(
                engine=config.engine,
                precision=config.precision,
                threads=config.threads,
                batch=config.batch,
                student_p50_ms=round(timing.p50_ms, 4),
                teacher_p50_ms=round(done.timings[other].p50_ms, 4),
                ratio=round(middle, 4),
                ratio_low=round(low, 4),
                ratio_high=round(high, 4),
                size_ratio=round(_size(results, config) / _size(results, other), 4),
            )
        )
    return pairs


def _size(results: Sequence[Result], config: Config) -> int:
    return next(r.size_bytes for r in results if (r.model, r.precision) == (config.model, config.precision))


def _preprocessing(
    params: BenchmarkParams, model: _Model, rows: exported.Rows, started: float
) -> list[tuple[str, float]]:
    """Milliseconds per image, medians, of what stands before the network: outside the graph and inside it."""
    from components.dataset.images import central_square
    from components.export import graph

    about = model.about
    path = model.files[model.name, "fp32"]
    steps: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="retort-benchmark-") as folder:
        inside = exported.session(path, 1)
        alone = None
        if not about.in_graph:
            import onnx

            whole = graph.with_preprocessing(onnx.load(path), about.size, about.mean, about.std)
            onnx.save(whole, Path(folder) / "whole.onnx")
            alone, inside = inside, exported.session(Path(folder) / "whole.onnx", 1)
        images = rows.spread(64).images(params.data.root)
        for number in range(len(images.paths)):
            if (
                len(next(iter(steps.values()), [])) >= MIN_IMAGES
                and _elapsed(started) > params.benchmark.time_budget_s
            ):
                break
            marks = [time.perf_counter()]
            image = images.whole(number)
            marks.append(time.perf_counter())
            square = central_square(image, about.size)[None]
            marks.append(time.perf_counter())
            normal = exported.normalise(square, about.mean, about.std)
            marks.append(time.perf_counter())
            if alone is not None:
                exported.run(alone, normal)
            marks.append(time.perf_counter())
            exported.run(inside, np.asarray(image)[None])
            marks.append(time.perf_counter())
            for name, seconds in zip(PREPROCESSING, np.diff(marks), strict=True):
                steps.setdefault(name, []).append(1e3 * float(seconds))
    if alone is None:
        del steps[NETWORK]
    return [(name, float(np.median(values))) for name, values in steps.items()]


def _elapsed(started: float) -> float:
    return time.perf_counter() - started


def _find(
    run: StepContext,
    params: BenchmarkParams,
    results: Sequence[Result],
    chosen: Choice,
    done: Sweep,
    validation_images: int,
) -> None:
    recommended = chosen.recommended.result
    run.add_finding(
        "benchmark.choice",
        "info",
        recommended.name(),
        f"Recommended: {chosen.recommended.why}. p50 {recommended.p50_ms:.3g} ms, p95 "
        f"{recommended.p95_ms:.3g} ms, {recommended.throughput:.0f} images/s, top-1 "
        f"{recommended.val_top1:.2%} on {validation_images} validation images, "
        f"{human_bytes(recommended.size_bytes)}.",
        measured=recommended.p50_ms,
        row="2.4",
    )
    budget = chosen.latency_budget
    if budget is not None:
        fits = budget.chosen
        near = fits is not None and fits.p50_ms * (1 + fits.noise) > budget.budget_ms
        run.add_finding(
            "benchmark.latency_budget",
            "warning" if fits is None or near else "info",
            f"{budget.budget_ms:g} ms",
            f"Nothing fits: the fastest configuration takes {budget.fastest_measured_ms:.3g} ms."
            if fits is None
            else f"{budget.fitting} of {budget.of} configurations keep the budget; the most accurate "
            f"takes {fits.p50_ms:.3g} ms"
            + (f", which is nearer to the budget than its noise of {fits.noise:.0%}." if near else "."),
            measured=budget.fastest_measured_ms if fits is None else fits.p50_ms,
            limit=budget.budget_ms,
            advice="Take a smaller student, a smaller global.image_size, or int8; or allow more time."
            if fits is None
            else "",
            row="5.3",
        )
    _find_noise(run, results)
    _find_pair(run, chosen)
    run.add_finding(
        "benchmark.curves",
        "info",
        f"{len(results)} configurations",
        f"Measured in {done.seconds:.0f} s; accuracy against latency, size and compute are drawn in "
        "curves.png and curves.html, all numbers stand in results.csv.",
        measured=len(results),
        row="5.3",
    )


def _find_noise(run: StepContext, results: Sequence[Result]) -> None:
    worst = max(results, key=lambda result: result.noise)
    middle = float(np.median([result.noise for result in results]))
    run.add_finding(
        "benchmark.noise",
        "warning" if middle > NOISY else "info",
        "identical rounds",
        f"The p50 of identical rounds spreads by {middle:.0%} (median of all; worst {worst.noise:.0%}: "
        f"{worst.name()}). Smaller differences mean nothing here, and none is claimed.",
        measured=round(middle, 4),
        limit=NOISY,
        advice="Other work ran beside the benchmark; run it again on a quiet machine."
        if middle > NOISY
        else "",
        row="1.5",
    )


def _find_pair(run: StepContext, chosen: Choice) -> None:
    pair = chosen.pair
    if pair is None:
        return
    faster, smaller = pair.ratio_high < 1, pair.size_ratio < 1
    run.add_finding(
        "benchmark.student",
        "info" if faster and smaller else "warning",
        f"{pair.engine} {pair.precision}, threads {pair.threads}, batch {pair.batch}",
        f"The student takes {pair.ratio:.2f} x the teacher's time ({pair.ratio_low:.2f} to "
        f"{pair.ratio_high:.2f} over rounds side by side) and has {pair.size_ratio:.2f} x its size.",
        measured=pair.ratio,
        limit=1,
        advice=""
        if faster and smaller
        else "Distilling gains no speed or size here: choose a smaller student.",
        row="2.4",
    )


def _track(run: StepContext, results: Sequence[Result], chosen: Choice) -> None:
    for model, numbers in metrics(results, chosen).items():
        run.tracker.metrics({f"{model}_{key}": float(value) for key, value in numbers.items()})
    best = chosen.recommended.result
    headline = {
        key: float(getattr(best, key)) for key in ("p50_ms", "p95_ms", "throughput", "size_bytes", "val_top1")
    }
    pair = chosen.pair
    if pair is not None:
        headline["p50_ratio"] = pair.ratio
    run.tracker.summary(headline)
    run.tracker.tags({"recommended": f"{best.model} {best.engine} {best.precision}"}, above=True)

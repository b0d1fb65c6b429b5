"""Which configuration to deploy: pure rules over measured results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from components.benchmark.engines import ENGINES
from components.common.progress import counted
from components.export.precisions import PRECISIONS

ACCURACY_MARGIN = (
    0.01  # top-1: within one point of the best counts as accurate enough where speed or size decides
)
NOISE_BELIEVED = 0.25  # a greater spread is the machine's bad day, and would make everything equal


@dataclass(frozen=True)
class Result:
    """A row of ``results.csv``. Latencies are of one call, a whole batch; ``throughput`` is images a second.

    ``noise``: spread of identical rounds over their median, 0..; ``macs``: multiply-accumulates of one image.
    """

    model: str
    family: str
    arch: str
    engine: str
    threads: int
    batch: int
    precision: str
    p50_ms: float
    p95_ms: float
    noise: float
    throughput: float
    size_bytes: int
    params: int
    macs: int
    val_top1: float

    def name(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        batch = "one image at a time" if self.batch == 1 else f"{self.batch} images at a time"
        return f"{self.model} ({self.arch}), {self.engine} {self.precision}, {threads}, {batch}"


@dataclass(frozen=True)
class Answer:
    """A configuration, and why it is that one."""

    result: Result
    why: str

    def summary(self) -> dict[str, Any]:
        return asdict(self.result) | {"why": self.why}


@dataclass(frozen=True)
class Budget:
    """How a latency budget was kept: by ``fitting`` of ``of`` configurations; by none: ``chosen`` is None."""

    budget_ms: float
    fitting: int
    of: int
    chosen: Result | None
    fastest_measured_ms: float


@dataclass(frozen=True)
class Pair:
    """Student and teacher in one configuration, side by side.

    ``ratio`` is the student's p50 to the teacher's; ``ratio_low`` and ``ratio_high`` are its 10th and 90th
    percentile over rounds.
    """

    engine: str
    precision: str
    threads: int
    batch: int
    student_p50_ms: float
    teacher_p50_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    size_ratio: float


@dataclass(frozen=True)
class Choice:
    """What is recommended, what answers each need, and what was compared for it."""

    recommended: Answer
    answers: dict[str, Answer]
    latency_budget: Budget | None
    pairs: list[Pair] = field(default_factory=list)

    @property
    def pair(self) -> Pair | None:
        """Student against teacher in the recommended configuration, or else the first there is."""
        best = self.recommended.result
        keys = ("engine", "precision", "threads", "batch")
        same = [one for one in self.pairs if all(getattr(one, key) == getattr(best, key) for key in keys)]
        return next(iter([*same, *self.pairs]), None)

    def summary(self) -> dict[str, Any]:
        """What ``choice.json`` says."""
        return {
            "schema_version": 1,
            "recommended": self.recommended.summary(),
            "answers": {need: answer.summary() for need, answer in self.answers.items()},
            "latency_budget": asdict(self.latency_budget) if self.latency_budget else None,
            "student_against_teacher": [asdict(pair) for pair in self.pairs],
        }


def fastest(results: Iterable[Result]) -> Result:
    """The lowest p50; where noise cannot tell, the smaller file, fewer threads, the simpler engine."""
    results = list(results)
    best = min(results, key=lambda result: (result.p50_ms, -result.noise))
    as_fast = [
        r for r in results if r.p50_ms <= best.p50_ms * (1 + min(max(r.noise, best.noise), NOISE_BELIEVED))
    ]
    return min(as_fast, key=_plainness)


def _plainness(result: Result) -> tuple[Any, ...]:
    return (
        result.size_bytes,
        result.threads,
        list(ENGINES).index(result.engine),
        list(PRECISIONS).index(result.precision),
        result.p50_ms,
        -result.val_top1,
        result.model,
    )


def accurate_enough(results: Sequence[Result]) -> list[Result]:
    """Those within ``ACCURACY_MARGIN`` of the best top-1."""
    best = max(result.val_top1 for result in results)
    return [result for result in results if result.val_top1 >= best - ACCURACY_MARGIN]


def under_budget(results: Iterable[Result], budget_ms: float) -> Result | None:
    """The most accurate whose p50 keeps the budget, the fastest of those; None when nothing fits."""
    fitting = [result for result in results if result.p50_ms <= budget_ms]
    if not fitting:
        return None
    best = max(result.val_top1 for result in fitting)
    return fastest(result for result in fitting if result.val_top1 == best)


def choose(results: Sequence[Result], budget_ms: float | None) -> Choice:
    """Recommend a configuration, and answer each need.

    Latency is judged at the smallest batch measured, throughput over all. With a budget, the most accurate
    under it is recommended; without one, or where nothing fits, the fastest of those that are accurate
    enough (within ``ACCURACY_MARGIN`` of the best).
    """
    smallest = min(result.batch for result in results)
    single = [result for result in results if result.batch == smallest]
    good = accurate_enough(single)
    speed = fastest(good)
    least = min(result.size_bytes for result in good)
    threads = min(result.threads for result in good)
    margin = f"within {100 * ACCURACY_MARGIN:g} point of the most accurate"
    answers = {
        "speed": Answer(speed, f"the fastest {margin}"),
        "size": Answer(fastest(r for r in good if r.size_bytes == least), f"the smallest file {margin}"),
        "mobile-like": Answer(
            fastest(r for r in good if r.threads == threads),
            f"the fastest {margin} on {counted(threads, 'thread')}, one image at a time",
        ),
        "server-like": Answer(
            max(accurate_enough(results), key=lambda r: (r.throughput, -r.batch)),
            f"the most images a second {margin}",
        ),
    }
    recommended, why = speed, answers["speed"].why
    within = None
    if budget_ms is not None:
        fits = under_budget(single, budget_ms)
        quickest = min(single, key=lambda result: result.p50_ms)
        within = Budget(
            budget_ms,
            fitting=sum(result.p50_ms <= budget_ms for result in single),
            of=len(single),
            chosen=fits,
            fastest_measured_ms=quickest.p50_ms,
        )
        if fits:
            recommended, why = fits, f"the most accurate with a p50 under {budget_ms:g} ms"
        else:
            why = f"nothing keeps {budget_ms:g} ms; this is {why}"
    return Choice(Answer(recommended, why), answers, within)

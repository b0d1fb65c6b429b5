"""What would help most on this data, told from what a training measured.

Each cause is judged by itself: how far it is seen, and how many points of macro recall its remedy is likely
to bring. The order of the advice is that of those points, which are estimates from rules of thumb, not
promises; where the literature has a figure it is named.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from components.step import StepContext
from components.training import health, report
from components.training.inputs.index import open_index
from components.training.sampling import training_rows
from components.training.spec import TrainSpec
from components.training.state import TrainResult

log = logging.getLogger(__name__)

WORTH = 0.005  # a gain of less is not worth a person's time
DOUBLED = (
    0.2  # of the errors, that twice the labels take away: n^-0.33, the middle of what Hestness et al. found
)
GAP = 0.05  # between training and validation, from which a network has learnt images by heart
UNFIT = 0.93  # macro recall on the training images below which a network has not learnt even them
SUREST = 1 / 3  # of the images: those whose label a network is surest about
SPREAD = 0.75  # of the entropy of errors that are spread evenly over all pairs of classes
FLAT = 0.55  # of the error rate, still there among them: labels are wrong however easy the image
FITTED = 0.98  # ... and from which on it has
STARVED = 0.5  # of the median class's images
BEHIND = 0.15  # below the median class's recall
MOST = 4  # pieces of advice that are told


@dataclass(frozen=True)
class Asked:
    """What a network says of some images beside what they are.

    Attributes:
        actual, said: classes int64 [n].
        sure: float32 [n], the probability that it gives to what it says.
    """

    actual: np.ndarray
    said: np.ndarray
    sure: np.ndarray

    def recall(self, class_num: int) -> np.ndarray:
        """Of each class, float64 [C]; NaN where there is no image of it."""
        there = np.bincount(self.actual, minlength=class_num)
        right = np.bincount(self.actual[self.actual == self.said], minlength=class_num)
        with np.errstate(invalid="ignore", divide="ignore"):
            return right / there


@dataclass(frozen=True)
class Facts:
    """What is known when a training is done; all of it measured, nothing asked of a person.

    Attributes:
        who: the section of params.yaml that the network is of: teacher or student.
        rows: its history, one an epoch (``trainer.Trainer`` says what is in them), in order.
        val, learnt: what the network that is kept says of the validation images, and of some (at most
            ``trainer.JUDGED_ROWS``) of those that it learnt from, as they are.
        class_names: C of them.
        counts: labelled training images of each class, int64 [C].
        steps: of all epochs together.
        rate, usual: learning rate at its highest, and what is usual for the optimizer at this batch size
            (``health.usual_rate``).
        augment: recipe of the training images.
        loaded: whether it started from trained weights.
        balanced: whether the plan draws rare classes more often.
        pool, used: unlabelled images that are there, and those that were learnt from.
        teacher: the teacher's macro recall on the same validation images; None: there was none.
        finetuned: how many of ``rows``, at their end, are the short finetune's.
        epochs_key: of params.yaml, that says how many epochs the others are; empty: ``train.epochs``.
    """

    who: str
    rows: Sequence[dict[str, Any]]
    val: Asked
    learnt: Asked
    class_names: Sequence[str]
    counts: np.ndarray
    steps: int
    rate: float
    usual: float
    augment: str = "light"
    loaded: bool = True
    balanced: bool = False
    pool: int = 0
    used: int = 0
    teacher: float | None = None
    finetuned: int = 0
    epochs_key: str = ""

    # what most causes ask for
    recalls: np.ndarray = field(init=False)
    reached: float = field(init=False)
    fitted: float = field(init=False)

    def __post_init__(self) -> None:
        classes = len(self.class_names)
        recalls = self.val.recall(classes)
        object.__setattr__(self, "recalls", recalls)
        object.__setattr__(self, "reached", float(np.nanmean(recalls)))
        object.__setattr__(self, "fitted", float(np.nanmean(self.learnt.recall(classes))))

    @property
    def main(self) -> Sequence[dict[str, Any]]:
        """The rows without those of the short finetune."""
        return self.rows[: len(self.rows) - self.finetuned]

    @property
    def gap(self) -> float:
        """Macro recall on training images less that on validation: what was learnt by heart."""
        return max(0.0, self.fitted - self.reached)

    @property
    def per_class(self) -> float:
        """Labelled images of the median class."""
        return float(np.median(self.counts[self.counts > 0]))


@dataclass(frozen=True)
class Advice:
    """One remedy.

    Attributes:
        cause: one of ``CAUSES``.
        gain: macro recall that it may bring, a share; what orders the advice.
        seen: what was measured that speaks for it.
        remedy: what to do, with the key of params.yaml.
        told: whether ``gain`` is more than an order, and may be said.
    """

    cause: str
    gain: float
    seen: str
    remedy: str
    told: bool = True

    def __str__(self) -> str:
        about = f" (about {100 * self.gain:+.0f} points)" if self.told and self.gain >= 0.01 else ""
        return f"{self.remedy}{about}: {self.seen}"


def advise(facts: Facts) -> list[Advice]:
    """What would help, the most first; empty where nothing is seen that would."""
    found = [advice for cause in CAUSES.values() if (advice := cause(facts)) is not None]
    return sorted((a for a in found if a.gain >= WORTH), key=lambda a: -a.gain)[:MOST]


def tell(run: StepContext, facts: Facts) -> list[Advice]:
    """Say it: finding ``train.advice``, a section of the page, a line on the terminal; returns it."""
    found = advise(facts)
    first = f"{found[0]}." if found else "nothing stands out that would help; more labels always may."
    run.add_finding(
        "train.advice", "info", facts.who,
        f"macro recall {facts.reached:.1%} on validation, {facts.fitted:.1%} on images it learnt from; what "
        f"would help most: {first}",
        measured={advice.cause: round(advice.gain, 4) for advice in found}, row="2.3",
    )  # fmt: skip
    report.show_advice(run.page, facts.who, found)
    log.info(f"{run.name}: what would help most: {first}")
    return found


def facts(spec: TrainSpec, result: TrainResult, net: str, who: str, teacher: float | None = None) -> Facts:
    """What is known of a network of a job that is done.

    Args:
        net: its name in ``result``.
        who: teacher or student: whose keys are named.
        teacher: macro recall of its teacher on validation.
    """
    phases = [phase for phase in spec.phases if phase.net == net]
    names = {phase.name for phase in phases}
    index, asked = open_index(spec.manifest), result.asked[net]
    labels = index.labels
    labelled = training_rows(index, spec.plan)
    rows = [row for row in result.history if row["phase"] in names]
    main = phases[0]  # a short finetune may follow
    own = spec.distill is not None and spec.distill.epochs is not None
    batch = spec.train.batch_size * spec.workers
    return Facts(
        who=who,
        rows=rows,
        val=Asked(
            np.asarray(labels[index.rows("val")], dtype=np.int64), result.predictions[net]["val"],
            asked["val_sure"],
        ),
        learnt=Asked(
            np.asarray(labels[asked["rows"]], dtype=np.int64), asked["classes"], asked["sure"]
        ),
        class_names=spec.class_names,
        counts=np.bincount(labels[labelled], minlength=len(spec.class_names)),
        steps=len(rows) * max(1, -(-len(labelled) // batch)),
        rate=main.lr.initial,
        usual=health.usual_rate(spec.optimizer_of(main).name, batch),
        augment=main.augment or spec.train.augment,
        loaded=spec.start is not None,
        balanced=bool(spec.plan.sampling.by_class),
        pool=len(index.rows("unlabeled")),
        used=result.chosen,
        teacher=teacher,
        finetuned=sum(row["phase"] != main.name for row in rows),
        epochs_key="distill.epochs" if own else "",
    )  # fmt: skip


# --- causes, each with its evidence -------------------------------------------------------------------------


def wrong_labels(known: Facts) -> Advice | None:
    """Labels that are wrong at random are so for easy images too.

    Where images are hard, a network errs mostly on those that it is unsure about. Where labels are wrong it
    errs about as often on the third that it is surest about as on all of them; that rate is the share of
    wrong labels. Judged on training images too: a network that has not learnt them by heart contradicts
    their labels.
    """
    shares, pairs = [], []
    for asked in (known.val, known.learnt):
        order = np.argsort(-asked.sure, kind="stable")[: max(1, int(len(asked.sure) * SUREST))]
        wrong = asked.said != asked.actual
        shares.append((float(wrong[order].mean()), float(wrong.mean()), len(order)))
        missed = order[wrong[order]]
        pairs.append(asked.actual[missed] * len(known.class_names) + asked.said[missed])
    surest, overall = (
        float(np.average([s[i] for s in shares], weights=[s[2] for s in shares])) for i in (0, 1)
    )
    if not 0.04 < surest < 0.5 or surest < FLAT * overall or known.reached < 0.4:
        return None
    # a network that cannot tell some classes apart errs in the same way again and again
    counts = np.unique(np.concatenate(pairs), return_counts=True)[1]
    classes = int((known.counts > 0).sum())
    spread = counts / counts.sum()
    possible = min(int(counts.sum()), classes * (classes - 1))
    if possible > 1 and -float((spread * np.log(spread)).sum()) < SPREAD * np.log(possible):
        return None
    return Advice(
        "wrong labels",
        surest,
        f"of the third of the images that the network is surest about, {surest:.0%} are labelled otherwise, "
        f"nearly as many as of all ({overall:.0%})",
        "look through the labels that 'retort audit' suspects (audit.drop_suspects: true leaves them out)",
    )


def starving_classes(known: Facts) -> Advice | None:
    """Classes with few images that are recognised far less often than the others."""
    recalls, counts = known.recalls, known.counts
    there = ~np.isnan(recalls) & (counts > 0)
    if there.sum() < 2:
        return None
    median, images = float(np.median(recalls[there])), known.per_class
    seen = np.bincount(known.val.actual, minlength=len(recalls))
    behind = there & (recalls < median - BEHIND) & (counts < STARVED * images)
    # no chance of few validation images: that many misses are unlikely for a class like the others
    error = np.sqrt(median * (1 - median) / np.maximum(seen, 1))
    behind &= recalls < median - 2 * error
    if not behind.any() or behind.sum() > 0.5 * there.sum():
        return None
    gain = float((median - recalls[behind]).sum()) / int(there.sum()) * 0.7
    worst = [
        int(place) for place in np.argsort(np.where(behind, recalls, 2.0), kind="stable")[:3] if behind[place]
    ]
    told = []
    for label in worst:
        missed = known.val.said[(known.val.actual == label) & (known.val.said != label)]
        taken = known.class_names[int(np.bincount(missed).argmax())] if len(missed) else ""
        told.append(
            f"{known.class_names[label]} (recall {recalls[label]:.0%}, {counts[label]:,} images"
            + (f", taken for {taken})" if taken else ")")
        )
    names = ", ".join(known.class_names[label] for label in worst)
    draw = "" if known.balanced else ", or draw them more often (audit.distribution: uniform)"
    return Advice(
        "starving classes",
        gain,
        f"{', '.join(told)}, while the median class has a recall of {median:.0%} from {images:,.0f} images",
        f"more images of {names}{draw}",
    )


def high_rate(known: Facts) -> Advice | None:
    """A network that is thrown about: it gets worse between epochs while the rate is high."""
    rows = known.rows
    ratio = known.rate / known.usual
    losses = np.array([row["val_loss"] for row in rows])
    shares = known.counts[known.counts > 0] / known.counts.sum()
    guessing = -float((shares * np.log(shares)).sum())
    thrown = 0.0
    if len(rows) > 2:
        rises = np.diff(losses)[:-1]  # the last epochs' rate is small anyway
        thrown = float(np.clip(rises, 0, guessing).sum()) / guessing
    wild = float(np.clip(losses[:-1] / guessing - 1.5, 0, 2).max()) if len(rows) > 1 else 0.0
    evidence = thrown + wild + 0.5 * (ratio > 30 and known.fitted < 0.5)
    unfit = max(0.0, UNFIT + 0.05 - known.fitted)
    if ratio < 3 or evidence < 0.15 or unfit == 0.0:
        return None
    return Advice(
        "rate too high",
        min(1.0, 0.3 + evidence) * unfit + known.gap * 0.1,
        f"lr.initial {known.rate:g} is {ratio:.0f} times what is usual for this batch, and validation loss "
        f"jumped ({', '.join(f'{loss:.3g}' for loss in losses[:6])})",
        f"a lower rate (try {known.who}.lr.initial: {known.usual:.2g} to {3 * known.usual:.2g})",
    )


def low_rate(known: Facts) -> Advice | None:
    """A rate so small that little has moved."""
    ratio = known.rate / known.usual
    if ratio > 0.1 or known.fitted > UNFIT:
        return None
    return Advice(
        "rate too low",
        0.6 * (UNFIT - known.fitted),
        f"lr.initial {known.rate:g} is {ratio:.2g} times what is usual for this batch; even training images "
        f"are recognised to {known.fitted:.0%} only",
        f"a higher rate (try {known.who}.lr.initial: {known.usual:.2g})",
    )


def _late(known: Facts) -> tuple[float, float]:
    """Macro recall at half of the epochs, and at their end, the best so far each; the finetune aside."""
    recalls = np.maximum.accumulate([row["val_macro_recall"] for row in known.main])
    return float(recalls[max(0, len(recalls) // 2 - 1)]), float(recalls[-1])


def more_epochs(known: Facts) -> Advice | None:
    """It still gets better, and images that it has learnt from are not all known yet."""
    unfit = max(0.0, FITTED - known.fitted)
    if unfit < 0.01:
        return None
    epochs = len(known.main)
    if epochs > 1:
        half, end = _late(known)
        gain = min(end - half, 1 - end) * 0.6
        told = f"macro recall rose from {half:.0%} to {end:.0%} in the second half"
    else:
        gain, told = 0.5 * unfit, "one epoch does not show where it ends"
    return Advice(
        "more epochs",
        min(unfit, gain) + known.gap * 0.1 * (gain > 0.02),
        f"{told}, after {epochs} epochs of {known.steps // max(1, len(known.rows)):,} steps; training images "
        f"are recognised to {known.fitted:.0%}",
        f"more epochs ({known.epochs_key or f'{known.who}.train.epochs'}: {2 * epochs} or more)",
    )


def larger_network(known: Facts) -> Advice | None:
    """It stopped getting better, and does not know even what it has learnt from."""
    unfit = max(0.0, UNFIT - known.fitted)
    if len(known.main) < 3 or unfit == 0.0:
        return None
    half, end = _late(known)
    return Advice(
        "larger network",
        0.5 * unfit * max(0.0, 1 - (end - half) / unfit),
        f"even images that it has learnt from are recognised to {known.fitted:.0%} only, and the second half "
        f"of the epochs brought {100 * (end - half):.1f} points",
        f"a larger network ({known.who}.arch), or larger images (global.image_size)",
    )


def weaker_augmentation(known: Facts) -> Advice | None:
    """Images are changed so much that a short training learns little from them."""
    seen = known.rows[-1].get("train_top1")
    if known.augment not in ("strong", "deit", "standard") or seen is None or known.fitted > UNFIT:
        return None
    harder = known.fitted - float(seen)
    if harder < 0.1:
        return None
    return Advice(
        "weaker augmentation",
        0.4 * harder,
        f"of augmented images {seen:.0%} are recognised, of the same as they are {known.fitted:.0%}",
        f"a weaker recipe ({known.who}.train.augment: flip), or many more epochs",
        told=False,
    )


def more_labels(known: Facts) -> Advice | None:
    """It knows what it has learnt from, and not what is new."""
    if known.gap < GAP:
        return None
    recalls, there = known.recalls, ~np.isnan(known.recalls)
    worst = [int(at) for at in np.argsort(np.where(there, recalls, 2.0), kind="stable")[:3] if there[at]]
    names = ", ".join(f"{known.class_names[at]} ({recalls[at]:.0%})" for at in worst)
    return Advice(
        "more labels",
        DOUBLED * known.gap * (1.0 if known.per_class < 1000 else 0.6),
        f"training images are recognised to {known.fitted:.0%}, others to {known.reached:.0%}, with "
        f"{known.per_class:,.0f} labels a class",
        f"more labels, twice as many first of {names}",
    )


def unlabelled_images(known: Facts) -> Advice | None:
    """A pool that is there and not used, where labels are few."""
    if known.gap < GAP or known.used or known.pool < 0.5 * known.counts.sum() or known.per_class > 300:
        return None
    how = "distil with them" if known.who == "teacher" else "learn from them"
    return Advice(
        "unlabelled images",
        DOUBLED * known.gap * 1.2,
        f"{known.pool:,} unlabelled images lie there unused, beside {known.per_class:,.0f} labels a class",
        f"{how} (distill.unlabeled_per_class: {max(100, int(2 * known.per_class))})",
    )


def stronger_augmentation(known: Facts) -> Advice | None:
    """Images learnt by heart, in few guises."""
    if known.gap < GAP or known.augment in ("standard", "strong", "deit"):
        return None
    stronger = "standard" if known.augment == "flip" else "flip, where things may be mirrored"
    return Advice(
        "stronger augmentation",
        DOUBLED * known.gap * (0.5 if known.per_class < 300 else 0.9),
        f"training images are recognised to {known.fitted:.0%}, others to {known.reached:.0%}, with the "
        f"recipe '{known.augment}'",
        f"a stronger recipe ({known.who}.train.augment: {stronger}), with more epochs",
        told=False,
    )


def trained_weights(known: Facts) -> Advice | None:
    """A network that began from nothing."""
    if known.loaded or known.reached > 0.97:
        return None
    return Advice(
        "trained weights",
        0.06 * (1 - known.reached),
        "the network started from random values",
        f"start from trained weights ({known.who}.weights)",
        told=False,
    )


def better_teacher(known: Facts) -> Advice | None:
    """A student that is as good as its teacher has no more to learn from it."""
    if known.teacher is None or known.reached < known.teacher - 0.01:
        return None
    return Advice(
        "better teacher",
        0.25 * (1 - known.reached),
        f"the student reaches {known.reached:.1%}, its teacher {known.teacher:.1%}",
        "a better teacher (teacher.arch, teacher.train.epochs), or a higher distill.label_share",
        told=False,
    )


CAUSES: dict[str, Callable[[Facts], Advice | None]] = {
    "wrong labels": wrong_labels,
    "starving classes": starving_classes,
    "rate too high": high_rate,
    "rate too low": low_rate,
    "more epochs": more_epochs,
    "larger network": larger_network,
    "weaker augmentation": weaker_augmentation,
    "unlabelled images": unlabelled_images,
    "more labels": more_labels,
    "stronger augmentation": stronger_augmentation,
    "better teacher": better_teacher,
    "trained weights": trained_weights,
}

"""Which network is shipped, and what is claimed of distillation: student against control."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from components.common.progress import counted
from components.step import StepContext
from components.training import optim, paired
from components.training.control import NET as CONTROL
from components.training.control import Trained
from components.training.metrics import evaluate, macro_recall
from components.training.paired import Difference
from components.training.params import DistillParams
from components.training.spec import TrainSpec

log = logging.getLogger(__name__)

SURE = 0.05  # chance below which a difference is taken for one
CLAIM = 3  # seeds from which on something is claimed of distilling
ROW = "2.3"
WAY_OUT = (
    "A better teacher (see distill.teacher_margin), labels mixed in (distill.label_share: 0.5), more "
    "distill.epochs or more unlabelled images may turn that."
)


@dataclass(frozen=True)
class Pair:
    """Student and control of one seed; None: there is no control, or it was stopped."""

    seed: int
    student: Trained
    control: Trained | None

    def networks(self) -> list[Trained]:
        return [self.student] if self.control is None else [self.student, self.control]


@dataclass(frozen=True)
class Kept:
    """The network that is shipped: ``net`` is student or control; ``why`` a sentence."""

    net: str
    seed: int
    network: Trained
    why: str


def score(actual: np.ndarray, predicted: np.ndarray) -> float:
    """What networks are chosen by: the mean of top-1 and macro recall on the validation split."""
    return float(((predicted == actual).mean() + macro_recall(actual, predicted)) / 2)


def choose(keep: Literal["better", "student"], actual: np.ndarray, pairs: Sequence[Pair]) -> Kept:
    """The better of student and control, and of its seeds the one with the highest score on validation.

    The higher mean score decides, since both networks are of one size and cost: what is shipped scores no
    lower on validation than what is not. Whether that is beyond chance is told by a paired test of top-1
    (McNemar's exact one; with several seeds the interval over seeds and images).
    The test split has no part in it, so what it says of the network that is shipped stays honest.

    Args:
        actual: labels of the validation split, int64 [n].
    """
    both = [pair for pair in pairs if pair.control is not None]
    seeds = f", of {counted(len(pairs), 'seed')} the one with the highest score" if len(pairs) > 1 else ""
    if keep == "student" or not both:
        reason = "distill.keep is student" if keep == "student" else "there is no control to compare with"
        return _best("student", actual, pairs, f"The distilled student is shipped: {reason}{seeds}.")
    ours = np.stack([pair.student.predictions["val"] for pair in both])
    other = np.stack([pair.control.predictions["val"] for pair in both if pair.control is not None])
    better = _told_apart(actual, ours, other)
    means = [float(np.mean([score(actual, one) for one in said])) for said in (ours, other)]
    tops = [float((said == actual).mean()) for said in (ours, other)]
    numbers = f"{tops[0]:.2%} top-1 with the teacher, {tops[1]:.2%} without it"
    net = CONTROL if means[1] > means[0] else "student"
    ahead = "higher" if means[0] != means[1] else "the same"
    if better == 0:
        told = f"the noise does not tell them apart ({numbers}), and its score on validation is {ahead}"
    elif (better > 0) == (net == "student"):
        told = f"it is better beyond chance ({numbers})"
    else:  # it names the common classes less often, and the rare ones more
        told = (
            f"its mean of top-1 and macro recall is {ahead} ({max(means):.2%} to {min(means):.2%}), although "
            f"its top-1 is lower beyond chance ({numbers})"
        )
    named = {
        "student": "The distilled student is shipped",
        CONTROL: "The student trained WITHOUT the teacher is shipped, not the distilled one",
    }
    return _best(net, actual, both, f"{named[net]}: {told}{seeds}.")


def _told_apart(actual: np.ndarray, ours: np.ndarray, other: np.ndarray) -> int:
    """1: the student is better beyond chance; -1: the control is; 0: neither. Arrays int64 [seeds, n]."""
    if len(ours) == 1:
        # one-sided both ways, at half the level each
        if paired.worse(actual, ours[0], other[0]) < SURE / 2:
            return -1
        return int(paired.worse(actual, other[0], ours[0]) < SURE / 2)
    value, half = paired.gain(actual, ours, other)
    assert half is not None
    return int(value > half) - int(value < -half)


def _best(net: str, actual: np.ndarray, pairs: Sequence[Pair], why: str) -> Kept:
    networks = [(pair.seed, pair.student if net == "student" else pair.control) for pair in pairs]
    there = [(seed, one) for seed, one in networks if one is not None]
    seed, network = max(there, key=lambda each: score(actual, each[1].predictions["val"]))
    return Kept(net, seed, network, why)


def say_kept(run: StepContext, kept: Kept) -> None:
    """The first line of the report, and one on the terminal."""
    run.page.text("What is shipped", kept.why)
    run.add_finding(
        "distill.kept", "info" if kept.net == "student" else "warning", kept.net, kept.why,
        measured=kept.net, row=ROW,
        advice="" if kept.net == "student" else f"{WAY_OUT} distill.keep: student ships it all the same.",
    )  # fmt: skip
    log.info(f"{run.name}: {kept.why}")


def measured(
    run: StepContext,
    params: DistillParams,
    spec: TrainSpec,
    actual: dict[str, np.ndarray],
    pairs: Sequence[Pair],
    kept: Kept,
    names: Sequence[str],
) -> dict[str, Any]:
    """What ``metrics.json`` holds: of the network that is shipped, of both, and the gain."""

    def of(network: Trained) -> dict[str, Any]:
        return {split: evaluate(actual[split], network.predictions[split], names) for split in actual}

    first = next((pair for pair in pairs if pair.control is not None), pairs[0])
    written: dict[str, Any] = {
        **of(kept.network), "kept": kept.net, "seed": kept.seed, "distilled": of(first.student),
        "unlabelled_images": first.student.chosen,
    }  # fmt: skip
    if first.control is not None:
        written["control"] = of(first.control)
        written["gain"] = find_gain(run, actual, pairs, unequal(params, spec, first))
    return written


def unequal(params: DistillParams, spec: TrainSpec, pair: Pair) -> str:
    """In which the control's budget is not that of the student, in words; empty: in nothing."""
    parts = []
    settings, epochs = params.distill, spec.phases[0].epochs
    if settings.teacher_labels == "cached" and settings.crops < epochs:
        parts.append(
            f"the student saw {counted(settings.crops, 'view')} of each image again and again, the control a "
            "fresh one in each epoch"
        )
    phase = spec.phases[0]
    scale = optim.loss_scale(spec.optimizer_of(phase), phase.task, len(spec.class_names), spec.distill)
    if abs(scale - 1) > 0.05:
        parts.append(
            f"the student's rate was {1 / scale:.2g} times the control's, for the gradient of its loss is "
            f"{scale:.2g} times as large"
        )
    if spec.teachers:
        parts.append(f"{counted(len(spec.teachers), 'more network')} answered beside the student's teacher")
    if pair.control is not None and pair.control.chosen != pair.student.chosen:
        parts.append(
            f"the control's steps were matched to {counted(pair.control.chosen, 'unlabelled image')}, the "
            f"student had {pair.student.chosen:,}"
        )
    return "; ".join(parts)


def find_gain(
    run: StepContext, actual: dict[str, np.ndarray], pairs: Sequence[Pair], differs: str = ""
) -> dict[str, Any]:
    """What is claimed: of two networks with one seed, of distilling from three on."""
    both = [(pair.student, pair.control) for pair in pairs if pair.control is not None]
    found: dict[str, Difference] = {}
    for split in ("val", "test"):
        if not len(actual[split]):  # own splits may have none
            continue
        ours = np.stack([student.predictions[split] for student, _ in both])
        other = np.stack([alone.predictions[split] for _, alone in both])
        if len(both) == 1:
            found[split] = paired.top1(actual[split], ours[0], other[0])
        else:
            value, half = paired.gain(actual[split], ours, other)
            assert half is not None
            found[split] = Difference(value, value - half, value + half)
    gain, images = found["val"], counted(len(actual["val"]), "validation image")
    if len(both) < CLAIM:
        message = (
            f"the students with and without the teacher differ by {gain} in top-1 on {images}; with "
            f"{counted(len(both), 'seed')} that says nothing of distilling as such"
        )
    else:
        message = (
            f"distilling gains {gain} in top-1, over {counted(len(both), 'seed')} and {images}, beside the "
            "same student without a teacher on as many steps"
        )
    if differs:
        message += f". Not equal: {differs}"
    harm = gain.high < 0
    if harm:
        advice = WAY_OUT
    else:
        advice = "" if len(both) >= CLAIM else "distill.seeds: 3 would tell what distilling gains."
    run.add_finding(
        "distill.gain", "warning" if harm else "info", "student", message,
        measured=round(gain.value, 6), limit=0.0, row=ROW, advice=advice,
    )  # fmt: skip
    run.tracker.summary({f"gain_{split}": difference.value for split, difference in found.items()})
    written: dict[str, Any] = {"seeds": len(both)}
    for split, difference in found.items():
        written |= {
            f"{split}_top1": difference.value,
            f"{split}_low": difference.low,
            f"{split}_high": difference.high,
        }
    return written

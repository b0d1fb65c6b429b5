"""The rule on the student's learning rate: not above what ImageNet-1k training used with that optimizer.

A rate belongs to its optimizer. SGD's step is rate x gradient; that of Adam, LAMB and RMSProp hardly depends
on the gradient's size, so one kind's figure says nothing of another. Hence two cases:

* The architecture was trained with the same kind of optimizer: its figure is the limit, in proportion to the
  batch (Goyal et al. 2017; DeiT's and Swin's AdamW recipes scale so, too).
* It was not, or nobody knows: the limit is ``ALLOWED`` times the highest figure published for any network
  with that kind of optimizer, scaled to the batch as ``recipes.json`` says (in proportion for SGD and
  RMSProp, by the square root for Adam and LAMB). Figures of one kind, at one batch, differ by
  four among networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from components.common.errors import RetortError
from components.common.findings import Level
from components.common.storage import read_json
from components.step import StepContext
from components.training.params import CheckParams

RULE, ROW = "distill.initial_lr", "2.3"
RECIPES = Path(__file__).parent.with_name("recipes.json")
ALLOWED = 3.0  # times the highest published rate of other networks: figures of one kind differ by four
TOLERANCE = 1e-9  # relative: a limit is worked out in floating point


@dataclass(frozen=True)
class Limit:
    """The highest initial rate for a total batch, and how that is known.

    ``own``: it is of this architecture and kind of optimizer, or what a person gave for them. ``known``: how
    this architecture was trained is known, if with another optimizer.
    """

    rate: float
    why: str
    own: bool = False
    known: bool = True


@cache
def recipes() -> dict[str, Any]:
    """``recipes.json``: ``recipes`` by architecture, ``kinds`` of optimizers, ``published`` figures."""
    content: dict[str, Any] = read_json(RECIPES)
    return content


def kind_of(optimizer: str) -> str | None:
    """The kind that an optimizer's name in a recipe, or in ``params.yaml``, belongs to; None: unknown."""
    for kind, content in recipes()["kinds"].items():
        if optimizer.lower() in {kind, *(name.lower() for name in content["names"])}:
            return str(kind)
    return None


def scaled(kind: str, lr: float, batch: int, total: int) -> float:
    """A rate that was used for ``batch`` images a step, for ``total`` of them, as its kind scales."""
    ratio = total / batch
    return lr * (ratio**0.5 if recipes()["kinds"][kind]["scaling"] == "sqrt" else ratio)


def reference(params: CheckParams) -> tuple[float, int, str, str] | None:
    """Initial rate, total batch, optimizer's kind and origin of the student's ImageNet-1k training, if known.

    A recipe of the student's own kind of optimizer goes before others of the same architecture.

    Raises:
        RetortError: when only one of ``reference_lr`` and ``reference_batch`` is given.
    """
    settings = params.distill
    lr, batch = settings.reference_lr, settings.reference_batch
    kind = params.student.optimizer.name
    if (lr is None) != (batch is None):
        raise RetortError("distill.reference_lr and distill.reference_batch go together: give both or none")
    if lr is not None and batch is not None:
        return lr, batch, settings.reference_optimizer or kind, "distill.reference_lr and reference_batch"
    name = params.student.arch.name.partition(".")[0]  # timm appends the weights' tag after a point
    found = []
    for recipe in recipes()["recipes"]:
        timm = recipe["timm"]
        if name in {timm, f"{timm}_paddle", recipe["paddle"].lower()} - {None}:
            total = recipe["batch_per_card"] * recipe["cards"]
            own = kind_of(recipe["optimizer"]) or recipe["optimizer"]
            found.append((recipe["initial_lr"], total, own, f"the recipe of {recipe['paddle']}"))
    return min(found, key=lambda each: each[2] != kind, default=None)


def limit(params: CheckParams, total: int) -> Limit:
    """The highest rate for the student's network and optimizer at a total batch."""
    kind, name = params.student.optimizer.name, params.student.arch.name
    known = reference(params)
    aside = "nobody said how it was trained on ImageNet-1k"
    if known is not None:
        lr, batch, used, origin = known
        if kind_of(used) == kind:
            rate = lr * total / batch
            return Limit(
                rate,
                f"ImageNet-1k training used {lr:g} at {batch} with {used}, which is {rate:.4g} at {total} "
                f"({origin})",
                own=True,
            )
        aside = f"{lr:g} at {batch} ({origin}) was {used}'s, which says nothing of {kind}"
    figures = [figure for figure in recipes()["published"] if figure["kind"] == kind]
    highest = max(figures, key=lambda each: scaled(kind, each["lr"], each["batch"], total))
    top = scaled(kind, highest["lr"], highest["batch"], total)
    law = recipes()["kinds"][kind]
    by = "by the square root of the batch" if law["scaling"] == "sqrt" else "in proportion to the batch"
    return Limit(
        ALLOWED * top,
        f"no rate of {name} with {kind} is known ({aside}); the highest published for any network with "
        f"{kind} is {highest['lr']:g} at {highest['batch']} ({highest['network']}: {highest['source']}), "
        f"which is {top:.4g} at {total} {by} ({law['scaling_source']}); up to {ALLOWED:g} times that is let "
        "through",
        own=False,
        known=known is not None,
    )


def judge(run: StepContext, params: CheckParams) -> None:
    """That the learning rate is not above that of ImageNet-1k training, for the same number of images.

    SGD's rate is divided by the task's ``gradient_scale`` before it is used, so that a step is as large as
    with the labels' loss: what is judged is the rate that is asked for, which is that of such a step.
    """
    student = params.student
    asked, total = student.lr.initial, student.train.batch_size * params.ray.workers
    allowed = limit(params, total)
    give = "distill.reference_lr, reference_batch and reference_optimizer"
    if asked > allowed.rate * (1 + TOLERANCE):
        level: Level = "error"
        advice = f"Set student.lr.initial to {allowed.rate:.4g} or less, or raise the total batch."
        if not allowed.own:
            advice += f" If it was trained with a higher one, give {give}."
    elif not allowed.known:
        level, advice = "warning", f"Give {give}, if you know them."
    else:
        level, advice = "info", ""
    run.add_finding(
        RULE, level, "student.lr.initial",
        f"{asked:g} with {student.optimizer.name} at a total batch of {total}; {allowed.why}",
        measured=asked, limit=allowed.rate, row=ROW, advice=advice,
    )  # fmt: skip

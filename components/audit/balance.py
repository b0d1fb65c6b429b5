"""The arithmetic of balancing: wanted distributions, class weights, the loss. Knows no files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from components.audit.params import Audit
from components.audit.plan_schema import LOSSES, Loss
from components.common.errors import RetortError

if TYPE_CHECKING:
    from numpy.typing import NDArray

REPEATS = 10.0  # times an epoch that an image may be drawn before a uniform distribution is learning by heart
BETA = 0.999  # of the effective number of samples; the middle of the paper's values
ALIKE = 1.1  # largest weight to smallest, up to which weights change nothing worth saying


@dataclass(frozen=True)
class Balance:
    """What sampling and loss are to be.

    Attributes:
        by_class: float64 [C], the weight of every row of a class beside its weight by source.
        expected: float64 [C], what each class's count in an epoch becomes.
    """

    distribution: str
    by_class: NDArray[np.float64]
    expected: NDArray[np.float64]
    why: str
    loss: Loss


def balance(
    counts: NDArray[np.int64], mass: NDArray[np.float64], labels: NDArray[np.int64], audit: Audit
) -> Balance:
    """The weights that turn classes of these sizes into the wanted distribution, and the loss beside them.

    With ``p`` the wanted shares and ``N`` the rows of an epoch, ``by_class = N p / mass``: then the rows'
    weights add up to N, and class c is drawn ``N p[c]`` times, whatever its sources weigh.

    Args:
        counts: int64 [C], training rows of each class.
        mass: float64 [C], the sum of their weights by source; ``counts`` where sources weigh the same.
        labels: int64 [C].

    Raises:
        RetortError: when ``audit.distribution`` is a list that does not fit the classes.
    """
    rows = float(counts.sum())
    name, why = _distribution(mass, rows, audit)
    shares = _shares(mass, labels, audit.distribution if name == "own list" else name)
    expected = rows * shares
    by_class = np.divide(expected, mass, out=np.ones_like(mass), where=mass > 0)
    return Balance(name, by_class, expected, why, _loss(labels, expected, by_class, name, audit))


def ratio(sizes: NDArray[np.float64] | NDArray[np.int64]) -> float:
    """The largest class to the smallest one that has images; 1.0 when there is but one."""
    there = sizes[sizes > 0]
    return float(there.max() / there.min()) if len(there) else 1.0


def effective_number(
    counts: NDArray[np.int64] | NDArray[np.float64], beta: float = BETA
) -> NDArray[np.float64]:
    """``(1 - beta^n) / (1 - beta)``, float64 [C] (Cui et al., "Effective Number of Samples", 2019, eq. 2)."""
    return -np.expm1(counts * np.log(beta)) / (1 - beta)


def _distribution(mass: NDArray[np.float64], rows: float, audit: Audit) -> tuple[str, str]:
    """The distribution's name, and why it is that one."""
    asked = audit.distribution
    if isinstance(asked, list):
        return "own list", "audit.distribution gives a share for each class."
    if asked != "auto":
        return asked, f"audit.distribution asks for {asked}."
    uneven, limit = ratio(mass), audit.imbalance_ratio
    if uneven <= limit:
        return "natural", (
            f"The largest class weighs {uneven:.1f} x the smallest, and audit.imbalance_ratio is {limit:g}: "
            "rows are drawn as they are."
        )
    there = mass[mass > 0]
    repeats = rows / len(there) / there.min()
    if repeats <= REPEATS:
        return "uniform", (
            f"The largest class weighs {uneven:.1f} x the smallest, and drawing all alike repeats the "
            f"smallest class's images {repeats:.1f} times an epoch, which augmentation can bear."
        )
    return "square_root", (
        f"The largest class weighs {uneven:.1f} x the smallest. Drawing all alike would repeat the smallest "
        f"class's images {repeats:.0f} times an epoch and learn them by heart: square roots meet half-way."
    )


def _shares(
    mass: NDArray[np.float64], labels: NDArray[np.int64], wanted: str | list[float]
) -> NDArray[np.float64]:
    """The wanted shares of the classes, float64 [C], 1.0 in all; a class without rows gets none."""
    if isinstance(wanted, list):
        asked = np.array(wanted, np.float64)
        if len(asked) != labels.max() + 1:
            raise RetortError(
                f"audit.distribution: {len(asked)} shares for {labels.max() + 1} classes; "
                "give one a class, in the order of the labels"
            )
        sizes = asked[labels]
    else:
        sizes = {"natural": mass, "square_root": np.sqrt(mass), "uniform": np.ones_like(mass)}[wanted]
    sizes = np.where(mass > 0, sizes, 0.0)
    if not sizes.any():
        raise RetortError("audit.distribution: no class that has training images gets a share above 0")
    return sizes / sizes.sum()


def _loss(
    labels: NDArray[np.int64],
    expected: NDArray[np.float64],
    by_class: NDArray[np.float64],
    distribution: str,
    audit: Audit,
) -> Loss:
    left = ratio(expected)
    drawn = f"As drawn ({distribution}), the largest class comes {left:.1f} x as often as the smallest"
    if audit.loss == "class_balanced":
        # who asks for both gets both; where the distribution is ours, one must not undo the other
        found, most = _class_balanced(labels, expected, by_class, bounded=audit.distribution == "auto")
        why = f"audit.loss asks for it. {drawn}; the weights make up for that, not for what sampling did"
        return Loss(name="class_balanced", arguments=found, why=f"{why}{most}.")
    if audit.loss == "auto" and left > audit.imbalance_ratio:
        found, most = _class_balanced(labels, expected, by_class, bounded=True)
        weights = list(found["weights"].values())
        if max(weights) > ALIKE * min(weights):
            why = f"{drawn}, above audit.imbalance_ratio ({audit.imbalance_ratio:g}): "
            why += "the loss weighs the rest"
            return Loss(name="class_balanced", arguments=found, why=f"{why}{most}.")
        why = f"{drawn}; by sampling alone its images count {_times(by_class.max())} times an epoch, "
        return Loss(name="cross_entropy", why=why + "and weighing them higher would learn them by heart.")
    if audit.loss == "auto":
        why = f"{drawn}, at most audit.imbalance_ratio ({audit.imbalance_ratio:g}): nothing is left to weigh."
        return Loss(name="cross_entropy", why=why)
    return Loss(name=audit.loss, arguments=dict(LOSSES[audit.loss]), why="audit.loss asks for it.")


def _class_balanced(
    labels: NDArray[np.int64],
    expected: NDArray[np.float64],
    by_class: NDArray[np.float64],
    bounded: bool,
) -> tuple[dict[str, Any], str]:
    """Weights by label, in inverse proportion to the effective number of what is drawn; 1.0 on average.

    ``bounded``: no class's weight, to that of the class that needs none, times how often sampling repeats its
    images, is above REPEATS (or above that repetition itself): else the two together would give the uniform
    distribution that was refused.

    Returns:
        The loss's arguments, and words about the bound where it holds some weight down.
    """
    there = expected > 0
    raw = 1 / effective_number(expected[there])
    most = ""
    if bounded:
        relative = raw / raw.min()
        limits = np.maximum(REPEATS / by_class[there], 1.0)
        if (relative > limits).any():
            times = _times(max(REPEATS, float(by_class[there].max())))
            most = f", as far as no image counts more than {times} times an epoch"
            raw = np.minimum(relative, limits)
    return {"beta": BETA, "weights": by_label(labels[there], raw / raw.mean(), text=True)}, most


def _times(number: float) -> str:
    return f"{number:.3g}"


def by_label(
    labels: NDArray[np.int64], values: NDArray[np.float64] | NDArray[np.int64], text: bool = False
) -> dict:
    """``{label: value}``; floats with nine significant digits, ``text``: labels as JSON's keys are."""
    keys = map(str, labels.tolist()) if text else labels.tolist()
    exact = values.tolist() if values.dtype.kind == "i" else [float(f"{value:.9g}") for value in values]
    return dict(zip(keys, exact, strict=True))

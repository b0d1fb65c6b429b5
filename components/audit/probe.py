"""The probe: classifiers that are fitted in closed form, many times over, on features of images.

A Gaussian discriminant with one covariance for all classes (Fisher, 1936), shrunk towards a multiple of
the identity (Friedman, "Regularized Discriminant Analysis", 1989). All that it needs of a set of images is
their moments, and moments add up: leaving out a fold or adding a class's synthetic images costs one
factorisation, not another pass over the images.

All in float64: in float32 the last principal components are rounding errors, others on another processor,
and a verdict on one image hung on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

FOLDS = 5
NONE = -20.0  # log of a class's share below which it has no images at all
FIRST_NOISE = -4.0  # logit of the share of wrong labels where the search for it starts
LOGITS = (-12.0, 0.0)  # and where it ends: at most every second label is wrong
SIGNIFICANT = 6.63  # chi-squared with one degree of freedom, 1 in 100
FLAT = 0.2  # of the features' usual deviation: below it a feature counts as constant
COMPONENTS = 512  # beyond it, neither accuracy nor suspect labels get better, and all gets slower
NOTHING = 1e-9  # of the greatest variance: what rounding leaves of none
SHRINKAGE = (0.03, 0.1, 0.3, 0.6)  # of which the out-of-fold likelihood chooses


@dataclass
class Moments:
    """Counts float64 [C], sums float64 [C, D] and second moments float64 [D, D] of a set of vectors."""

    counts: NDArray[np.float64]
    sums: NDArray[np.float64]
    squares: NDArray[np.float64]

    @classmethod
    def of(cls, vectors: NDArray[np.float64], places: NDArray[np.int64], classes: int) -> Moments:
        """Of vectors float64 [n, D] of the classes ``places`` int64 [n]."""
        sums = np.zeros((classes, vectors.shape[1]))
        np.add.at(sums, places, vectors)
        counts = np.bincount(places, minlength=classes).astype(np.float64)
        return cls(counts, sums, vectors.T @ vectors)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.counts + other.counts, self.sums + other.sums, self.squares + other.squares)

    def __mul__(self, weight: float) -> Moments:
        return Moments(self.counts * weight, self.sums * weight, self.squares * weight)

    def __sub__(self, other: Moments) -> Moments:
        return self + other * -1.0


class Discriminant:
    """Log-likelihoods of classes, up to what they share; a class without images has minus infinity."""

    def __init__(self, moments: Moments, shrinkage: float) -> None:
        from scipy.linalg import cho_factor, cho_solve

        there = moments.counts > 0.5
        means = moments.sums / np.maximum(moments.counts, 1e-12)[:, None]
        total = moments.counts.sum()
        within = (moments.squares - (means.T * moments.counts) @ means) / max(total - there.sum(), 1.0)
        size = len(within)
        scale = max(float(np.trace(within)) / size, 1e-6)
        within *= 1 - shrinkage
        within[np.diag_indices(size)] += shrinkage * scale
        self._weights = cho_solve(cho_factor(within, lower=True, overwrite_a=True), means.T)
        self._offsets = np.where(there, -0.5 * (means.T * self._weights).sum(axis=0), -np.inf)

    def __call__(self, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        """Vectors float64 [n, D] -> float64 [n, C]."""
        return vectors @ self._weights + self._offsets


def standardised(vectors: NDArray[np.float32], by: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Every feature minus its mean, over its standard deviation, as the rows ``by`` have them; [n, D].

    A feature that hardly varies there is not blown up: what it does elsewhere says nothing.
    """
    result = vectors.astype(np.float64)
    mean, deviation = result[by].mean(axis=0), result[by].std(axis=0)
    floor = FLAT * float(np.sqrt((deviation**2).mean())) or 1.0
    result -= mean
    result /= np.maximum(deviation, floor)
    return result


def compressed(vectors: NDArray[np.float64], by: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The principal components of the rows ``by`` (at most COMPONENTS of them), float64 [n, D'].

    The vectors are ``standardised`` by the same rows, so their mean there is 0. Directions in which those
    rows do not vary are left out: which they are, rounding alone would say.
    """
    learnt = vectors[by]
    variances, directions = np.linalg.eigh(learnt.T @ learnt)  # ascending
    chosen = slice(-min(COMPONENTS, 1 + int((variances[:-1] > NOTHING * variances[-1]).sum())), None)
    return vectors @ directions[:, chosen]


def folds(places: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """A fold 0 .. FOLDS-1 for each row, int64 [n]; every class is spread evenly over them."""
    order = np.random.default_rng(seed).permutation(len(places))
    order = order[np.argsort(places[order], kind="stable")]
    result = np.empty(len(places), np.int64)
    result[order] = np.arange(len(places)) % FOLDS
    return result


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Float64 [n, C] -> probabilities."""
    exps = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exps / exps.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class Calibration:
    """Scores of one model or several to probabilities, where a share of the labels is wrong.

    The given label is taken to be right with probability ``1 - noise`` (then softmax of the weighted sum of
    the models' scores says it), else any of the C classes. All numbers maximise the likelihood of the given
    labels: wrong ones do not make a model look unsure of the right ones, and a model that does not fit the
    data gets little weight. ``noise`` is 0 unless it explains the labels significantly better than none
    (likelihood ratio, SIGNIFICANT).
    """

    weights: NDArray[np.float64]  # of each model's scores, and last of the log of the classes' shares
    noise: float
    prior: NDArray[np.float64]  # log of the classes' shares, [C]
    likelihood: float  # mean log-likelihood of the labels

    @classmethod
    def of(cls, scores: Sequence[NDArray[np.float64]], places: NDArray[np.int64]) -> Calibration:
        """Scores float64 [n, C] of each model, none of which has seen these rows; their labels int64 [n]."""
        counts = np.bincount(places, minlength=scores[0].shape[1])
        prior = np.log(np.maximum(counts, 1e-12) / len(places))
        able = np.logical_and.reduce([np.isfinite(one) for one in scores])
        judged = able[np.arange(len(places)), places]  # others are of classes that nothing has learnt
        scores, able, places = [one[judged] for one in scores], able[judged], places[judged]
        models = [*(np.where(able, one, 0.0) for one in scores), np.where(able, prior, 0.0)]
        if not len(places):
            return cls(np.ones(len(models)), 0.0, prior, 0.0)
        start = [1 / max(float(one.std()), 1e-12) for one in models[:-1]]
        plain, cost = _most_likely(models, able, places, [*start, 1.0], None)
        noisy, noisy_cost = _most_likely(models, able, places, plain.tolist(), FIRST_NOISE)
        if 2 * len(places) * (cost - noisy_cost) < SIGNIFICANT:
            return cls(plain, 0.0, prior, -cost)
        return cls(noisy[:-1], _sigmoid(noisy[-1]), prior, -noisy_cost)

    def probabilities(self, scores: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Of the true classes, float64 [n, C]; of a class that a model does not know, 0."""
        able = np.logical_and.reduce([np.isfinite(one) for one in scores])
        total = self.weights[-1] * self.prior
        for weight, one in zip(self.weights, scores, strict=False):
            total = total + weight * np.where(able, one, 0.0)
        return softmax(np.where(able, total, -np.inf))

    def wrong(self, given: NDArray[np.float64]) -> NDArray[np.float64]:
        """The probability that a label is wrong, [n], of the probabilities [n] of the given labels."""
        by_chance = self.noise / max(int((self.prior > NONE).sum()), 1)
        return by_chance / np.maximum(by_chance + (1 - self.noise) * given, 1e-300)


def _most_likely(
    models: Sequence[NDArray[np.float64]],
    able: NDArray[np.bool_],
    places: NDArray[np.int64],
    start: list[float],
    noise: float | None,
) -> tuple[NDArray[np.float64], float]:
    """Weights of models (float64 [n, C] each), last of them the prior's, and minus the mean log-likelihood.

    Args:
        noise: where the search for the noise starts, as a logit, which then stands behind the weights; None:
            there is none.
    """
    from scipy.optimize import minimize

    rows = np.arange(len(places))
    classes = max(len(np.unique(places)), 1)
    of_given = [np.broadcast_to(one, able.shape)[rows, places] for one in models]

    def cost(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        share = 0.0 if noise is None else _sigmoid(values[-1])
        total = sum(weight * one for weight, one in zip(values, models, strict=False))
        told = softmax(np.where(able, total, -np.inf))
        given = told[rows, places]
        likely = np.maximum((1 - share) * given + share / classes, 1e-12)
        by_label = (1 - share) * given / likely
        slope = [
            -float((by_label * (mine - (told * one).sum(axis=1))).mean())
            for mine, one in zip(of_given, models, strict=True)
        ]
        if noise is not None:
            slope.append(-float(((1 / classes - given) / likely).mean()) * share * (1 - share))
        return -float(np.log(likely).mean()), np.array(slope)

    bounds: list[tuple[float, float | None]] = [*[(0.0, None)] * (len(models) - 1), (0.0, 1.0)]
    first = start if noise is None else [*start, noise]
    found = minimize(
        cost, first, jac=True, method="L-BFGS-B", bounds=bounds if noise is None else [*bounds, LOGITS],
        options={"ftol": 1e-12, "gtol": 1e-7},
    )  # fmt: skip
    return found.x, float(found.fun)


def _sigmoid(value: float) -> float:
    return float(1 / (1 + np.exp(-value)))


class Folded:
    """Rows that judge themselves out of fold: each by a discriminant fitted on the other folds.

    Args:
        vectors: float64 [n, D].
        places: int64 [n], the rows' classes, 0 .. classes - 1.
        seed: of the folds.
    """

    def __init__(
        self, vectors: NDArray[np.float64], places: NDArray[np.int64], classes: int, seed: int
    ) -> None:
        self.vectors, self.places, self.classes = vectors, places, classes
        self.fold = folds(places, seed)
        self._parts = [
            Moments.of(vectors[self.fold == k], places[self.fold == k], classes) for k in range(FOLDS)
        ]
        self.moments = self._parts[0]
        for part in self._parts[1:]:
            self.moments = self.moments + part

    def scores(self, shrinkage: float, added: Moments | None = None) -> NDArray[np.float64]:
        """Scores float64 [n, C]; ``added`` are moments of further rows that every fold learns from."""
        everything = self.moments if added is None else self.moments + added
        result = np.empty((len(self.places), self.classes))
        for k, part in enumerate(self._parts):
            chosen = self.fold == k
            if chosen.any():
                result[chosen] = Discriminant(everything - part, shrinkage)(self.vectors[chosen])
        return result

    def best(self) -> tuple[float, NDArray[np.float64]]:
        """The shrinkage under which the labels are most likely, and its scores."""
        tried = []
        for shrinkage in SHRINKAGE:
            scores = self.scores(shrinkage)
            tried.append((Calibration.of([scores], self.places).likelihood, shrinkage, scores))
        _, shrinkage, scores = max(tried, key=lambda one: one[0])
        return shrinkage, scores

"""Accuracy from counts, against values worked out by hand and scikit-learn's answers."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, recall_score

from components.training import metrics


def test_macro_recall_is_the_mean_over_classes_that_occur() -> None:
    actual, predicted = np.array([0, 0, 0, 0, 2]), np.array([0, 0, 0, 1, 1])
    assert metrics.macro_recall(actual, predicted) == pytest.approx((0.75 + 0) / 2)


def test_it_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    actual = rng.integers(0, 30, 2000)
    predicted = np.where(rng.uniform(size=2000) < 0.6, actual, rng.integers(0, 40, 2000))
    assert metrics.macro_recall(actual, predicted) == pytest.approx(
        balanced_accuracy_score(actual, predicted)
    )
    said = metrics.evaluate(actual, predicted, [f"c{i}" for i in range(40)])
    by_class = recall_score(actual, predicted, labels=range(30), average=None)
    assert list(said["per_class"].values()) == pytest.approx(by_class.tolist())
    assert said["top1"] == (actual == predicted).mean()
    assert said["images"] == 2000
    assert metrics.evaluate(actual[:0], predicted[:0], []) == {"images": 0}

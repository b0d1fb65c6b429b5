"""How well a network did on a split: from the counts of classes, at a cost that does not grow with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def recalls(actual: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The classes that occur, int64 [K], and the share of each one's images that was recognised [K].

    Args:
        actual, predicted: classes int64 [n].
    """
    images = np.bincount(actual)
    right = np.bincount(actual[actual == predicted], minlength=len(images))
    classes = np.flatnonzero(images)
    return classes, right[classes] / images[classes]


def macro_recall(actual: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over the classes that occur of the share of their images that were recognised."""
    return float(recalls(actual, predicted)[1].mean())


def evaluate(actual: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Top-1, macro recall over the classes that occur, and recall per class; each 0..1.

    Args:
        actual, predicted: classes int64 [n].
    """
    if not len(actual):
        return {"images": 0}
    classes, recall = recalls(actual, predicted)
    return {
        "top1": float((actual == predicted).mean()),
        "macro_recall": float(recall.mean()),
        "per_class": {
            class_names[label]: share for label, share in zip(classes.tolist(), recall.tolist(), strict=True)
        },
        "images": len(actual),
    }

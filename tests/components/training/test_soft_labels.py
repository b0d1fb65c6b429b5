"""Soft labels on disk, and the choice of unlabelled images."""

from pathlib import Path

import numpy as np
import pytest

from components.training import soft_labels


def store(
    folder: Path, rows: list[int], prob: list[list[float]], index: list[list[int]] | None = None
) -> Path:
    folder.mkdir()
    np.save(folder / "rows.npy", np.array(rows))
    np.save(folder / "prob.npy", np.array(prob, dtype=np.float16))
    if index is not None:
        np.save(folder / "index.npy", np.array(index, dtype=np.int32))
    return folder


def test_whole_labels_are_looked_up_by_row(tmp_path: Path) -> None:
    folder = store(tmp_path / "s", [7, 2], [[0.75, 0.25, 0], [0, 0.5, 0.5]])
    labels = soft_labels.SoftLabels(folder, 3, 10)
    assert labels(np.array([2, 7, 2])).tolist() == [[0, 0.5, 0.5], [0.75, 0.25, 0], [0, 0.5, 0.5]]
    with pytest.raises(AssertionError, match="without a soft label"):
        labels(np.array([3]))


def test_what_the_kept_classes_leave_is_spread_over_the_others(tmp_path: Path) -> None:
    folder = store(tmp_path / "s", [0], [[0.5, 0.25]], [[3, 1]])
    label = soft_labels.SoftLabels(folder, 6, 1)(np.array([0]))[0]
    assert label.tolist() == pytest.approx([0.0625, 0.25, 0.0625, 0.5, 0.0625, 0.0625])


def test_the_most_confident_of_each_class_are_chosen(tmp_path: Path) -> None:
    prob = [[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.3, 0.7], [0.9, 0.1]]
    labels = soft_labels.SoftLabels(store(tmp_path / "s", [14, 11, 12, 13, 10], prob), 2, 20)
    assert soft_labels.choose(labels, 2).tolist() == [10, 13, 14], "equal confidence: the lower row first"
    assert soft_labels.choose(labels, 100).tolist() == [10, 11, 12, 13, 14]
    assert soft_labels.choose(labels, 0).tolist() == []


def test_room_that_soft_labels_take() -> None:
    assert soft_labels.stored_bytes(1000, 10, None) == 1000 * (8 + 10 * 2)
    assert soft_labels.stored_bytes(1000, 100_000, None) == 1000 * (8 + 1000 * 6)
    assert soft_labels.stored_bytes(1000, 1000, 5) == 1000 * (8 + 5 * 6)

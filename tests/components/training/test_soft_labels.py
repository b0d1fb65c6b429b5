"""Soft labels on disk, and the choice of unlabelled images."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import distributed as dist

from components.dataset import images
from components.models.card import read_card
from components.training import loader, soft_labels
from tests.components.training.conftest import CLASSES, SIZE


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


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one worker, this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_damaged_soft_labels_are_made_again(data: SimpleNamespace) -> None:
    teacher = soft_labels.Teacher(data.teacher, torch.device("cpu"))
    samples = loader.open_samples(data.manifest, data.root, SIZE)
    rows, folder, said = samples.rows("train"), Path("labels"), []

    def make() -> soft_labels.SoftLabels:
        return soft_labels.make(
            folder, teacher, loader.Views(samples, "light", 3), rows, 0, CLASSES, 16, 0,
            lambda count: None, said.append,
        )  # fmt: skip

    expected = make()(rows)
    assert said == []
    prob, content = folder / "prob.npy", (folder / "prob.npy").read_bytes()

    def reverse() -> None:
        np.save(prob, np.load(prob)[:, ::-1].copy())

    for damage, word in (
        (lambda: prob.write_bytes(content[:200]), "200 bytes"),
        (lambda: prob.write_bytes(b""), "0 bytes"),
        ((folder / "rows.npy").unlink, "rows.npy is missing"),
        ((folder / soft_labels.SEAL).unlink, "No such file"),
        (reverse, "checksum"),
    ):
        damage()
        assert torch.equal(make()(rows), expected)
        assert len(said) == 1
        assert word in said[0]
        assert "the teacher is asked again" in said.pop()
    make()
    assert said == [], "whole ones are read"


def test_labels_of_another_teacher_view_or_code_have_another_name(
    data: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = read_card(data.teacher / "model.json")

    def name(**changes: object) -> str:
        return soft_labels.key(
            card.model_copy(update=changes), "data", np.arange(3), [SIZE, 0, "light", 7], 4
        )

    names = {name(), name(mean=[0.1, 0.2, 0.3]), name(std=[0.5, 0.5, 0.5]), name(sha256="00")}
    monkeypatch.setattr(soft_labels, "AUGMENTATION", -1)
    names.add(name())
    monkeypatch.setattr(images, "VERSION", -1)
    names.add(name())
    assert len(names) == 6

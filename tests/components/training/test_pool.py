"""Which unlabelled images are chosen: planted answers, counted by hand."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from components.models.params import Train
from components.training import pool, soft_labels
from components.training.inputs.index import open_index
from components.training.precision import Precision
from components.training.teacher import Teacher
from tests.components.training.conftest import SIZE, plain


def store(
    folder: Path, rows: list[int], prob: list[list[float]], near: list[float] | None = None, chunk: int = 99
) -> soft_labels.SoftLabels:
    folder.mkdir()
    np.save(folder / "rows.npy", np.array(rows))
    cosines = torch.tensor(near or [1.0] * len(rows))
    stored = pool.SureForm.encode(torch.tensor(prob).log(), cosines).numpy()
    for number, start in enumerate(range(0, len(rows), chunk)):
        np.save(folder / f"{number:05}.npy", stored[start : start + chunk])
    return soft_labels.SoftLabels(folder)


def chosen(labels: soft_labels.SoftLabels, per_class: int) -> list[int]:
    return pool.choose(labels, per_class, np.array([50, 50])).rows.tolist()


@pytest.mark.parametrize("chunk", [99, 2])
def test_the_most_confident_of_each_class_are_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(soft_labels, "CHUNK", chunk)
    monkeypatch.setattr(pool, "MERGE", 2)
    prob = [[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.3, 0.7], [0.9, 0.1]]
    order = [4, 1, 2, 3, 0]
    labels = store(tmp_path / "s", [10, 11, 12, 13, 14], [prob[at] for at in order], chunk=chunk)
    assert chosen(labels, 2) == [10, 13, 14]
    assert chosen(labels, 1) == [10, 13], "equal confidence: the lower row"
    assert chosen(labels, 100) == [10, 11, 12, 13, 14]
    assert chosen(labels, 0) == []


def test_no_class_outgrows_the_smallest() -> None:
    def allowed(labelled: list[int], there: list[int]) -> list[int]:
        return pool.balanced(np.array(labelled), np.array(there)).tolist()

    assert allowed([20, 20, 20], [100, 100, 3]) == [72, 72, 3], "four times 20 + 3 in all"
    assert allowed([20, 20, 20], [100, 100, 100]) == [100, 100, 100]
    assert allowed([500, 20, 5], [100, 100, 0]) == [0, 100, 0], "500 to 5 is what it was before"
    assert allowed([5, 0, 5], [9, 9, 9]) == [9, 9, 9], "a class without labels sets no limit"


def test_what_is_unlike_the_validation_images_is_left_out_however_sure_the_teacher_is(tmp_path: Path) -> None:
    sure = [[0.7, 0.3]] * 20 + [[0.4, 0.6]] * 20
    near = [0.5 + at / 100 for at in range(40)]
    limits = pool.Limits.of(store(tmp_path / "validation", list(range(40)), sure, near))
    assert limits.near == pytest.approx(0.51), "two of forty are below what is let in"
    assert limits.sure == pytest.approx(0.65, abs=0.01)
    labels = store(
        tmp_path / "pool", [1, 2, 3, 4], [[0.99, 0.01], [0.6, 0.4], [0.45, 0.55], [0.1, 0.9]],
        [0.2, 0.7, 0.8, 0.3],
    )  # fmt: skip
    found = pool.choose(labels, 5, np.array([9, 9]), limits)
    assert found.rows.tolist() == [2, 3]
    assert (found.asked, found.unlike, found.surer) == (4, 2, 2)
    said = pool.finding(found, 5)
    assert said["level"] == "warning"
    assert (
        "2 are unlike the validation images and left out, of 2 of which the teacher is surer"
        in said["message"]
    )
    assert "data.unlabeled" in said["advice"]


def test_a_pool_of_one_class_and_one_that_is_empty_are_told(tmp_path: Path) -> None:
    labels = store(tmp_path / "s", [1, 2], [[0.9, 0.1], [0.8, 0.2]])
    one = pool.finding(pool.choose(labels, 5, np.array([9, 9])), 5)
    assert one["level"] == "warning"
    assert "one class" in one["advice"]
    none = pool.finding(pool.choose(labels, 5, np.array([9, 9]), pool.Limits(2.0)), 5)
    assert none["level"] == "warning"
    assert none["measured"] == 0
    both = store(tmp_path / "t", [1, 2], [[0.9, 0.1], [0.2, 0.8]])
    assert pool.finding(pool.choose(both, 5, np.array([9, 9])), 5)["level"] == "info"


def test_an_answer_is_its_class_its_probability_and_how_near_it_is() -> None:
    logits = torch.tensor([[1.0, 3.0, -2.0]])
    found = pool.answers(pool.SureForm.encode(logits, torch.tensor([0.25])).numpy())[0]
    assert found["label"] == 1
    assert np.exp(found["log"]) == pytest.approx(logits.softmax(1)[0, 1].item())
    assert found["near"] == 0.25


def test_rubbish_is_further_from_training_images_than_images_are(data: SimpleNamespace) -> None:
    """Noise and flat colours between digits, with a teacher that a few steps have trained."""
    teacher = Teacher(data.teacher, Precision.of(Train(), torch.device("cpu")))
    index = open_index(data.manifest)
    form = pool.FeatureForm(teacher.feature_width)

    def pictures(split: str) -> torch.Tensor:
        return plain(index, data.root, index.rows(split).tolist())

    sure = pool.SureForm(form.read(form.ask(teacher, pictures("train")).numpy()), "bank")
    drawn = torch.Generator().manual_seed(5)
    noise = torch.randint(0, 256, (20, 3, SIZE, SIZE), dtype=torch.uint8, generator=drawn)
    flat = torch.randint(0, 256, (20, 3, 1, 1), dtype=torch.uint8, generator=drawn)
    flat = flat.expand(20, 3, SIZE, SIZE)
    near = [
        pool.answers(sure.ask(teacher, part).numpy())["near"]
        for part in (pictures("val"), pictures("unlabeled"), noise, flat)
    ]
    limit = np.quantile(near[0], pool.LOST, method="lower")
    assert (near[1] >= limit).mean() > 0.8
    assert (near[2] >= limit).mean() < 0.1
    assert (near[3] >= limit).mean() < 0.1


def test_training_rows_that_others_are_compared_with() -> None:
    assert pool.bank_rows(np.arange(5) * 2, 10).tolist() == [0, 2, 4, 6, 8]
    rows = pool.bank_rows(np.arange(1_000_000), 10)
    assert len(rows) == 2048
    assert rows[-1] > 999_000
    assert len(pool.bank_rows(np.arange(1_000_000), 100_000)) == 16_384

"""Which unlabelled images are chosen: planted answers, counted by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

from components.training import pool, soft_labels


def store(folder: Path, rows: list[int], prob: list[list[float]], chunk: int = 99) -> soft_labels.SoftLabels:
    folder.mkdir()
    np.save(folder / "rows.npy", np.array(rows))
    stored = pool.SureForm().encode(torch.tensor(prob).log()).numpy()
    for number, start in enumerate(range(0, len(rows), chunk)):
        np.save(folder / f"{number:05}.npy", stored[start : start + chunk])
    return soft_labels.SoftLabels(folder)


@pytest.mark.parametrize("chunk", [99, 2])
def test_the_most_confident_of_each_class_are_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(soft_labels, "CHUNK", chunk)
    monkeypatch.setattr(pool, "MERGE", 2)
    prob = [[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.3, 0.7], [0.9, 0.1]]
    order = [4, 1, 2, 3, 0]
    labels = store(tmp_path / "s", [10, 11, 12, 13, 14], [prob[at] for at in order], chunk)
    assert pool.choose(labels, 2).tolist() == [10, 13, 14]
    assert pool.choose(labels, 1).tolist() == [10, 13], "equal confidence: the lower row"
    assert pool.choose(labels, 100).tolist() == [10, 11, 12, 13, 14]
    assert pool.choose(labels, 0).tolist() == []


def test_an_answer_is_its_class_its_probability_and_its_energy() -> None:
    logits = torch.tensor([[1.0, 3.0, -2.0]])
    found = pool.answers(pool.SureForm().encode(logits).numpy())[0]
    assert found["label"] == 1
    assert np.exp(found["log"]) == pytest.approx(logits.softmax(1)[0, 1].item())
    assert found["energy"] == pytest.approx(np.log(np.exp([1.0, 3.0, -2.0]).sum()))

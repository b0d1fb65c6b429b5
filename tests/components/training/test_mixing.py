"""Mixtures that belong to an image and a view: drawn and made alike everywhere, asked about as shown."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from components.training.augmentation import Augment, recipe_of
from components.training.inputs.feed import Way, open_feed
from components.training.inputs.index import open_index
from components.training.inputs.pictures import open_store
from components.training.mixing import Brought, Mixer, mixed
from components.training.sampling import Draw, Mixture, in_order
from components.training.spec import TrainSpec
from components.training.tasks import distillation
from components.training.teacher import Teacher
from tests.components.training import local
from tests.components.training.conftest import SIZE
from tests.components.training.test_trainer import changed, distilling, spec  # noqa: F401 - fixtures

DEIT = recipe_of("deit")


def draw(rows: np.ndarray, view: int = 0) -> Draw:
    return Draw(rows, np.full(len(rows), view), len(rows))


def mixture(made: Draw) -> Mixture:
    assert made.mixture is not None
    return made.mixture


def test_a_mixture_depends_on_seed_view_and_row_alone() -> None:
    rows, labels = np.arange(0, 200, 2), np.where(np.arange(200) % 3, 1, -1)
    mixer = Mixer(DEIT, 7, SIZE, rows, labels)
    whole = mixture(mixer(draw(rows)))
    some = mixture(mixer(draw(rows[[31, 4, 77]])))
    for name in ("partners", "share", "boxes"):
        assert np.array_equal(getattr(some, name), getattr(whole, name)[[31, 4, 77]])
    others = [mixture(mixer(draw(rows, 1))), mixture(Mixer(DEIT, 8, SIZE, rows, labels)(draw(rows)))]
    assert all((other.partners != whole.partners).mean() > 0.9 for other in others)
    assert np.isin(whole.partners, rows).all()
    assert ((labels[whole.partners] < 0) == (labels[rows] < 0)).all(), "labelled with labelled"


def test_shares_and_boxes_follow_their_distributions() -> None:
    rows = np.arange(20_000)
    drawn = mixture(Mixer(DEIT, 1, 64, rows, np.zeros(len(rows)))(draw(rows)))
    cut = drawn.boxes[:, 2] > drawn.boxes[:, 0]
    # a box of no pixel is none: of CutMix's uniform shares, those above 1 - 1 / 64^2; or one outside
    assert cut.mean() == pytest.approx(0.5, abs=0.02)
    assert stats.kstest(drawn.share[~cut], stats.beta(0.8, 0.8).cdf).statistic < 0.02
    top, left, bottom, right = drawn.boxes[cut].T
    assert drawn.share[cut] == pytest.approx(1 - (bottom - top) * (right - left) / 64**2)
    assert (drawn.boxes >= 0).all()
    assert (drawn.boxes <= 64).all()
    only = mixture(Mixer(recipe_of("flip", mixup=0.2), 1, 64, rows, np.zeros(len(rows)))(draw(rows)))
    assert not only.boxes.any()


def test_a_mixture_by_hand() -> None:
    pixels = torch.tensor([10, 100, 20, 255], dtype=torch.uint8)[:, None, None, None].expand(4, 3, 4, 4)
    made = mixed(
        pixels,
        Mixture(np.array([5, 6]), np.array([0.25, 0.75], np.float32), np.array([[0, 0, 0, 0], [1, 0, 3, 2]])),
    )
    assert (made[0] == 18).all(), "0.25 x 10 + 0.75 x 20 = 17.5, rounded to even"
    expected = torch.full((4, 4), 100)
    expected[1:3, 0:2] = 255
    assert (made[1] == expected).all()


def test_labels_of_what_came_mixed() -> None:
    came = Brought(torch.tensor([0.25, 0.5]), torch.tensor([3, -1]))
    assert came.partners(torch.tensor([7, 8])).tolist() == [3, -1]
    assert came.targets(torch.tensor([[0.1]])).tolist() == [[pytest.approx(0.1)]]


@pytest.mark.parametrize("recipe", ["deit", "strong"])
def test_every_way_of_feeding_makes_the_same_mixtures(data: SimpleNamespace, recipe: str) -> None:
    index, augment = open_index(data.manifest), Augment(recipe, 3, SIZE)
    rows = index.rows("train").astype(np.int64)
    mixer = Mixer(augment.recipe, 3, SIZE, rows, index.labels)

    def pictures(way: Way, batch: int, workers: int = 0) -> torch.Tensor:
        limit = None if way == "memory" else 0
        part = open_store(index, data.root, SIZE, augment.recipe.source, limit=limit).learn
        with open_feed(part, augment, torch.device("cpu"), workers, way=way) as feed:
            return torch.cat([b.pixels for b in feed(map(mixer, in_order(rows, batch, 2)))])

    whole = pictures("memory", 32)
    assert whole.shape == (len(rows), 3, SIZE, SIZE)
    assert torch.equal(pictures("memory", 7), whole), "whatever the batch"
    assert torch.equal(pictures("threads", 16), whole)
    assert torch.equal(pictures("processes", 16, 1), whole)


def test_the_teacher_was_asked_about_the_very_mixtures_that_the_student_sees(
    distilling: TrainSpec,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: set[bytes] = set()
    seen: list[tuple[torch.Tensor, dict[str, Any]]] = []
    call, forward = Teacher.__call__, distillation.Distillation.forward

    def ask(self: Teacher, pixels: torch.Tensor) -> Any:
        asked.update(picture.numpy().tobytes() for picture in pixels)
        return call(self, pixels)

    def see(self: Any, inputs: torch.Tensor, batch: Any, mix: Any) -> Any:
        seen.append((batch.pixels, batch.extra))
        assert isinstance(mix, Brought)
        return forward(self, inputs, batch, mix)

    monkeypatch.setattr(Teacher, "__call__", ask)
    monkeypatch.setattr(distillation.Distillation, "forward", see)
    assert distilling.distill is not None
    labelled = replace(
        changed(distilling, augment="deit"),
        distill=distilling.distill.model_copy(update={"label_share": 0.5}),
    )
    local.run(replace(labelled, phases=labelled.phases[:1]))
    pictures = [picture for batch, _ in seen for picture in batch]
    assert len(pictures) > 100
    assert all(picture.numpy().tobytes() in asked for picture in pictures)
    assert any(((extra["labels"] < 0) & (extra["partners"] < 0)).any() for _, extra in seen), "unlabelled"
    assert all(((extra["labels"] < 0) == (extra["partners"] < 0)).all() for _, extra in seen)

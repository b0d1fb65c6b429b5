"""One teacher, and several whose answers are averaged."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from components.common.errors import RetortError
from components.models import build, checkpoint
from components.models.card import ModelCard, read_card
from components.models.params import Arch
from components.training.precision import Precision
from components.training.teacher import Teacher, Teachers, open_teacher

CPU = Precision(torch.device("cpu"), False, True, False)


def another(folder: Path, like: Path, **changes: object) -> Path:
    """A teacher with random weights and a card that says otherwise."""
    card = read_card(like / "model.json").model_copy(update={"arch": Arch(name="test_vit"), **changes})
    folder.mkdir()
    torch.manual_seed(4)
    module = build.create(card.arch, len(card.class_names)).eval()
    checkpoint.save(folder / "model.safetensors", folder / "model.json", module, card)
    return folder


def opened(data: SimpleNamespace, *more: Path) -> Teacher:
    card = read_card(data.teacher / "model.json")
    return open_teacher(data.teacher, more, card.class_names, card.input_size[1], CPU)


def pixels(card: ModelCard) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 256, (5, *card.input_size), dtype=torch.uint8)


def test_several_answer_with_the_mean_of_their_probabilities_each_fed_its_own_way(
    data: SimpleNamespace, tmp_path: Path
) -> None:
    other = another(tmp_path / "other", data.teacher, mean=[0.1, 0.2, 0.3], std=[0.9, 0.8, 0.7])
    both = opened(data, other)
    assert isinstance(both, Teachers)
    both.assert_frozen()
    images = pixels(both.card)
    apart = []
    for folder in (data.teacher, other):
        module, card = checkpoint.load(folder)
        scaled = images.float() / 255
        inputs = (scaled - torch.tensor(card.mean).view(3, 1, 1)) / torch.tensor(card.std).view(3, 1, 1)
        with torch.no_grad():
            apart.append(module(inputs).softmax(1))
    assert (apart[0] - apart[1]).abs().max() > 0.05, "they differ"
    torch.testing.assert_close(both(images).probabilities, (apart[0] + apart[1]) / 2)
    assert [card.arch.name for card in both.cards] == [
        read_card(data.teacher / "model.json").arch.name,
        "test_vit",
    ]
    answer, features = both.features(images)
    torch.testing.assert_close(answer.probabilities, (apart[0] + apart[1]) / 2)
    assert features.shape == (5, both.feature_width)
    assert not features.requires_grad


def test_a_certain_teacher_among_others_leaves_logarithms_finite(
    data: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = opened(data, data.teacher)
    call = Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda self, images: type(call(self, images))(
        torch.tensor([[500.0, *[0.0] * (len(self.card.class_names) - 1)]])))  # fmt: skip
    assert torch.isfinite(both(pixels(both.card)[:1]).logits).all()


def test_features_have_mean_0_and_deviation_1(data: SimpleNamespace) -> None:
    teacher = opened(data)
    answer, features = teacher.features(pixels(teacher.card))
    torch.testing.assert_close(answer.logits, teacher(pixels(teacher.card)).logits)
    assert features.mean(1).tolist() == pytest.approx([0] * 5, abs=1e-5)
    assert features.std(1, correction=0).tolist() == pytest.approx([1] * 5, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"class_names": ["one", "two"]}, "trained for 2 classes"),
        ({"input_size": [3, 64, 64]}, "trained at 64 px"),
    ],
)
def test_one_that_does_not_fit_is_named(
    data: SimpleNamespace, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    other = another(tmp_path / "other", data.teacher, **changes)
    with pytest.raises(RetortError, match=rf"distill\.teachers: .*other: {said}"):
        opened(data, other)
    names = read_card(data.teacher / "model.json").class_names
    renamed = another(tmp_path / "renamed", data.teacher, class_names=names[::-1])
    with pytest.raises(RetortError, match=r"distill\.teachers: .*renamed: its classes are named otherwise"):
        opened(data, renamed)
    with pytest.raises(RetortError, match=r"nowhere.*model\.json"):
        opened(data, tmp_path / "nowhere")

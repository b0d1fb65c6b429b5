"""Soft labels on disk: what is looked up, what is proved before it is used, and by whom it is made."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from components.common import object_store
from components.dataset import images
from components.models.card import read_card
from components.models.params import Train
from components.training import augmentation, label_form, remote, soft_labels
from components.training.augmentation import Augment, recipe_of
from components.training.group import Group
from components.training.inputs.feed import Feed, open_feed
from components.training.inputs.index import open_index
from components.training.inputs.pictures import open_store
from components.training.label_form import LabelForm
from components.training.precision import Precision
from components.training.teacher import Teacher
from tests.components.training.conftest import CLASSES, SIZE, plain

CPU = Precision.of(Train(), torch.device("cpu"))
TOP_TWO = LabelForm(CLASSES, 2)


def write(folder: Path, rows: list[int], stored: np.ndarray, chunk: int = 99) -> soft_labels.SoftLabels:
    folder.mkdir()
    np.save(folder / "rows.npy", np.array(rows))
    for number, start in enumerate(range(0, len(rows), chunk)):
        np.save(folder / f"{number:05}.npy", stored[start : start + chunk])
    return soft_labels.SoftLabels(folder)


def store(folder: Path, rows: list[int], prob: list[list[float]], form: LabelForm, chunk: int = 99) -> Any:
    return write(folder, rows, form.encode(torch.tensor(prob).log()).numpy(), chunk)


def looked_up(labels: soft_labels.SoftLabels, rows: list[int], form: LabelForm) -> list[list[float]]:
    answers = soft_labels.Answers(None, [labels], form)  # type: ignore[arg-type]
    taken = answers.take(np.array(rows), np.zeros(len(rows), np.int64))
    return answers.dense({name: torch.from_numpy(part) for name, part in taken.items()}).tolist()


def test_whole_labels_are_looked_up_by_row(tmp_path: Path) -> None:
    form = LabelForm.of(3, None)
    assert form.whole
    labels = store(tmp_path / "s", [2, 7], [[0, 0.5, 0.5], [0.75, 0.25, 0]], form)
    found = looked_up(labels, [2, 7, 2], form)
    assert found == [pytest.approx(row, abs=2e-4) for row in ([0, 0.5, 0.5], [0.75, 0.25, 0], [0, 0.5, 0.5])]
    for row in (3, 9):
        with pytest.raises(AssertionError, match="without a soft label"):
            labels.take(np.array([row]))


def test_they_lie_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft_labels, "CHUNK", 2)
    prob, form = [[i / 10, 1 - i / 10] for i in range(5)], LabelForm.of(2, None)
    labels = store(tmp_path / "s", [1, 3, 5, 7, 9], prob, form, chunk=2)
    assert np.allclose(looked_up(labels, [9, 1, 5], form), [prob[4], prob[0], prob[2]], atol=1e-3)


def test_room_that_soft_labels_take() -> None:
    assert soft_labels.stored_bytes(1000, 10, None) == 1000 * (8 + 10 * 2), "all of few classes"
    assert soft_labels.stored_bytes(1000, 1000, None) == 1000 * (8 + 20 * 3 + 2)
    assert soft_labels.stored_bytes(1000, 100_000, None) == 1000 * (8 + 15 * 4 + 2)
    assert soft_labels.stored_bytes(1000, 1000, 5) == 1000 * (8 + 5 * 3 + 2)
    assert soft_labels.stored_bytes(1000, 1000, 1000) == 1000 * (8 + 1000 * 2)


@pytest.fixture
def feed(data: SimpleNamespace) -> Iterator[Feed]:
    index = open_index(data.manifest)
    made = open_store(index, data.root, SIZE)
    with open_feed(made.learn, Augment("light", 3, SIZE), torch.device("cpu")) as opened:
        yield opened


@pytest.fixture
def maker(data: SimpleNamespace, feed: Feed) -> Callable[..., soft_labels.SoftLabels]:
    """Asks the teacher about one view of the training rows, and keeps what a form keeps."""
    teacher, index = Teacher(data.teacher, CPU), open_index(data.manifest)

    def make(
        folder: str | Path, form: soft_labels.Form = TOP_TWO, view: int = 0, **values: Any
    ) -> soft_labels.SoftLabels:
        rows = index.rows("train").astype(np.int64)
        shown = {"number": view, "pictures": Augment("light", 3, SIZE).key(CPU.device)}
        what = soft_labels.about(teacher.cards, index.fingerprint, rows, shown, form, CPU)
        said = values.pop("said", None)
        asker = soft_labels.Asker(
            values.pop("teacher", teacher), feed, view, form, 16, values.pop("advance", lambda count: None)
        )
        return soft_labels.make(
            Path(folder), {**what, **values.pop("what", {})}, asker, rows, Group(0, 1, True),
            print if said is None else said.append, values.pop("exchange", None),
        )  # fmt: skip

    return make


Maker = Callable[..., soft_labels.SoftLabels]


def test_they_are_what_the_teacher_says_of_the_very_view(data: SimpleNamespace, maker: Maker) -> None:
    """Asked here without feed, store or cache: pictures by hand, and a forward of the network."""
    index, form = open_index(data.manifest), LabelForm.of(CLASSES, None)
    labels = maker("labels", form, view=3)
    rows = index.rows("train")[[5, 40, 41]].astype(np.int64)
    pixels = Augment("light", 3, SIZE)(plain(index, data.root, rows.tolist()), rows, np.full(3, 3))
    expected = Teacher(data.teacher, CPU)(pixels).logits.softmax(1)
    assert np.allclose(looked_up(labels, rows.tolist(), form), expected, atol=5e-4)


def test_damaged_soft_labels_are_made_again(maker: Maker) -> None:
    said: list[str] = []
    folder, rows = Path("labels"), maker("labels", said=said).rows[:]
    expected = maker("labels", said=said).take(rows)
    assert said == []
    stored = folder / "00000.npy"
    content = stored.read_bytes()

    def reverse() -> None:
        np.save(stored, np.load(stored)[::-1].copy())

    for damage, word in (
        (lambda: stored.write_bytes(content[:200]), "200 bytes"),
        (lambda: stored.write_bytes(b""), "0 bytes"),
        ((folder / "rows.npy").unlink, "rows.npy is missing"),
        ((folder / soft_labels.ABOUT).unlink, "about.json is missing"),
        ((folder / soft_labels.SEAL).unlink, "No such file"),
        (reverse, "checksum"),
    ):
        damage()
        assert np.array_equal(maker("labels", said=said).take(rows), expected)
        assert len(said) == 1
        assert word in said[0]
        assert "the teacher is asked again" in said.pop()
    maker("labels", said=said)
    assert said == [], "whole ones are read"


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("teacher", "00", "another teacher"),
        ("normalisation", [[0.1, 0.2, 0.3], [1, 1, 1]], "another normalisation"),
        ("view", {"number": 7}, "another view"),
        ("augmentation", -1, "another augmentation (-1, now "),
        ("decoder", "none", 'another decoder ("none", now '),
        ("precision", ["cuda", "bf16"], 'another precision (["cuda", "bf16"], now ["cpu", "float32"])'),
    ],
)
def test_a_folder_that_holds_labels_of_something_else_is_not_used(
    maker: Maker, part: str, value: object, words: str
) -> None:
    maker("labels", what={part: value})
    said: list[str] = []
    maker("labels", said=said)
    assert words in said[0]
    assert "the teacher is asked again" in said[0]


def test_each_part_that_decides_labels_gives_them_another_name(
    data: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = read_card(data.teacher / "model.json")
    form, view = LabelForm.of(CLASSES, None), {"number": 0, "pictures": ["light", SIZE]}

    def name(**changes: Any) -> str:
        values = {
            "data": "data",
            "rows": np.arange(3),
            "view": view,
            "form": form,
            "precision": CPU,
        } | changes
        return soft_labels.name_of(soft_labels.about([values.pop("card", card)], **values))

    assert name() == name()
    names = [
        name(),
        *(
            name(card=card.model_copy(update=change))
            for change in (
                {"mean": [0.1, 0.2, 0.3]}, {"std": [0.5, 0.5, 0.5]}, {"sha256": "00"},
                {"input_size": [3, 8, 8]},
            )
        ),
        name(data="other"),
        name(rows=np.arange(4)),
        name(view=view | {"number": 1}),
        name(view=view | {"pictures": ["flip", SIZE]}),
        name(form=LabelForm.of(CLASSES, 2)),
        name(form=LabelForm.of(CLASSES, None, 2.0)),
        name(precision=Precision(CPU.device, True, True, False)),
        name(precision=Precision(torch.device("cuda"), False, True, False)),
    ]  # fmt: skip
    for module in (augmentation, images, label_form):
        with monkeypatch.context() as changed:
            changed.setattr(module, "VERSION", -1)
            names.append(name())
    assert len(set(names)) == len(names) == 16


def test_the_key_of_a_view_holds_all_that_makes_it() -> None:
    names = {
        json.dumps(Augment(recipe_of(recipe), seed, size).key(device))
        for recipe in ("light", "flip", "standard")
        for seed in (1, 2)
        for size in (32, 48)
        for device in (torch.device("cpu"), torch.device("cuda"))
    }
    assert len(names) == 24


def test_an_interrupted_labelling_goes_on_with_its_chunks(
    maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soft_labels, "CHUNK", 20)
    asked = 0

    def advance(count: int) -> None:
        nonlocal asked
        asked += count
        if asked > stop:
            raise KeyboardInterrupt

    stop = 1000
    expected = maker("whole", advance=advance)
    asked, stop = 0, 50
    with pytest.raises(KeyboardInterrupt):
        maker("labels", advance=advance)
    kept = sorted(Path("labels.partial").glob("*.npy"))
    assert len(kept) == 2
    before = [path.stat().st_mtime_ns for path in kept]
    stop = 1000
    labels = maker("labels", advance=advance)
    assert [(Path("labels") / path.name).stat().st_mtime_ns for path in kept] == before, "not asked again"
    rows = expected.rows[:]
    assert np.array_equal(labels.take(rows), expected.take(rows))


def test_nodes_without_a_shared_disk_give_one_another_their_labels(
    maker: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soft_labels, "CHUNK", 20)
    storage = object_store.FolderStorage(str(tmp_path / "storage"))
    asked: list[int] = []
    call = Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda self, pixels: asked.append(1) or call(self, pixels))

    def make(node: str) -> soft_labels.SoftLabels:
        monkeypatch.setenv("RETORT_STATE", str(tmp_path / node))
        return maker(tmp_path / node / "cache" / "labels", exchange=remote.StateExchange(storage))

    first = make("one")
    assert asked
    asked.clear()
    second = make("two")
    assert not asked, "all of them were fetched"
    rows = first.rows[:]
    assert np.array_equal(first.take(rows), second.take(rows))

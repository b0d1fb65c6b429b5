"""Soft labels on disk, and the choice of unlabelled images."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from components.dataset import images
from components.models.card import read_card
from components.models.params import Train
from components.training import augmentation, remote, soft_labels
from components.training.augmentation import Augment
from components.training.group import Group
from components.training.inputs.feed import Feed, open_feed
from components.training.inputs.index import open_index
from components.training.inputs.pictures import open_store
from components.training.precision import Precision
from components.training.teacher import Teacher
from tests.components.training.conftest import CLASSES, SIZE

CPU = Precision.of(Train(), torch.device("cpu"))


def store(
    folder: Path,
    rows: list[int],
    prob: list[list[float]],
    index: list[list[int]] | None = None,
    chunk: int = 99,
) -> soft_labels.SoftLabels:
    folder.mkdir()
    np.save(folder / "rows.npy", np.array(rows))
    for number, start in enumerate(range(0, len(rows), chunk)):
        here = slice(start, start + chunk)
        np.save(folder / f"{number:05}-prob.npy", np.array(prob[here], dtype=np.float16))
        if index is not None:
            np.save(folder / f"{number:05}-index.npy", np.array(index[here], dtype=np.int32))
    return soft_labels.SoftLabels(folder)


def looked_up(labels: soft_labels.SoftLabels, rows: list[int], class_num: int) -> list[list[float]]:
    taken = {name: torch.from_numpy(part) for name, part in labels.take(np.array(rows)).items()}
    return soft_labels.dense(taken, class_num).tolist()


def test_whole_labels_are_looked_up_by_row(tmp_path: Path) -> None:
    labels = store(tmp_path / "s", [2, 7], [[0, 0.5, 0.5], [0.75, 0.25, 0]])
    assert looked_up(labels, [2, 7, 2], 3) == [[0, 0.5, 0.5], [0.75, 0.25, 0], [0, 0.5, 0.5]]
    for row in (3, 9):
        with pytest.raises(AssertionError, match="without a soft label"):
            labels.take(np.array([row]))


def test_they_lie_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft_labels, "CHUNK", 2)
    prob = [[i / 10, 1 - i / 10] for i in range(5)]
    labels = store(tmp_path / "s", [1, 3, 5, 7, 9], prob, chunk=2)
    assert looked_up(labels, [9, 1, 5], 2) == pytest.approx(np.array([prob[4], prob[0], prob[2]]), abs=1e-3)


def test_what_the_kept_classes_leave_is_spread_over_the_others(tmp_path: Path) -> None:
    labels = store(tmp_path / "s", [0], [[0.5, 0.25]], [[3, 1]])
    assert looked_up(labels, [0], 6)[0] == pytest.approx([0.0625, 0.25, 0.0625, 0.5, 0.0625, 0.0625])


@pytest.mark.parametrize("index", [None, [[0, 1]] * 5])
def test_the_most_confident_of_each_class_are_chosen(tmp_path: Path, index: list[list[int]] | None) -> None:
    prob = [[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.3, 0.7], [0.9, 0.1]]
    order = [4, 1, 2, 3, 0]
    labels = store(tmp_path / "s", [10, 11, 12, 13, 14], [prob[at] for at in order], index)
    assert soft_labels.choose(labels, 2).tolist() == [10, 13, 14], "equal confidence: the lower row first"
    assert soft_labels.choose(labels, 1).tolist() == [10, 13]
    assert soft_labels.choose(labels, 100).tolist() == [10, 11, 12, 13, 14]
    assert soft_labels.choose(labels, 0).tolist() == []


def test_room_that_soft_labels_take() -> None:
    assert soft_labels.stored_bytes(1000, 10, None) == 1000 * (8 + 10 * 2)
    assert soft_labels.stored_bytes(1000, 100_000, None) == 1000 * (8 + 1000 * 6)
    assert soft_labels.stored_bytes(1000, 1000, 5) == 1000 * (8 + 5 * 6)


@pytest.fixture
def feed(data: SimpleNamespace) -> Iterator[Feed]:
    index = open_index(data.manifest)
    made = open_store(index, data.root, SIZE)
    with open_feed(made.learn, Augment("light", 3, SIZE), torch.device("cpu")) as opened:
        yield opened


def test_damaged_soft_labels_are_made_again(data: SimpleNamespace, feed: Feed) -> None:
    teacher = Teacher(data.teacher, CPU)
    rows, folder, said = open_index(data.manifest).rows("train").astype(np.int64), Path("labels"), []

    def make() -> soft_labels.SoftLabels:
        return soft_labels.make(
            folder, teacher, feed, rows, 0, CLASSES, 16, Group(0, 1, True), lambda count: None, said.append
        )

    expected = make().take(rows)["prob"]
    assert said == []
    prob, content = folder / "00000-prob.npy", (folder / "00000-prob.npy").read_bytes()

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
        assert np.array_equal(make().take(rows)["prob"], expected)
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
            card.model_copy(update=changes), "data", np.arange(3), [SIZE, 0, "light", 7], 4, CPU
        )

    names = {name(), name(mean=[0.1, 0.2, 0.3]), name(std=[0.5, 0.5, 0.5]), name(sha256="00")}
    monkeypatch.setattr(augmentation, "VERSION", -1)
    names.add(name())
    monkeypatch.setattr(images, "VERSION", -1)
    names.add(name())
    half = Precision(CPU.device, True, True, False)
    names.add(soft_labels.key(card, "data", np.arange(3), [SIZE, 0, "light", 7], 4, half))
    names.add(soft_labels.key(card, "data", np.arange(4), [SIZE, 0, "light", 7], 4, CPU))
    assert len(names) == 8


def test_an_interrupted_labelling_goes_on_with_its_chunks(
    data: SimpleNamespace, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soft_labels, "CHUNK", 20)
    teacher = Teacher(data.teacher, CPU)
    rows = open_index(data.manifest).rows("train").astype(np.int64)
    asked = 0

    def advance(count: int) -> None:
        nonlocal asked
        asked += count
        if asked > stop:
            raise KeyboardInterrupt

    def make(folder: str) -> soft_labels.SoftLabels:
        return soft_labels.make(
            Path(folder), teacher, feed, rows, 0, 2, 16, Group(0, 1, True), advance, print
        )

    stop = 1000
    expected = make("whole")
    asked, stop = 0, 50
    with pytest.raises(KeyboardInterrupt):
        make("labels")
    kept = sorted(Path("labels.partial").glob("*-prob.npy"))
    assert len(kept) == 2
    before = [path.stat().st_mtime_ns for path in kept]
    stop = 1000
    labels = make("labels")
    assert [(Path("labels") / path.name).stat().st_mtime_ns for path in kept] == before, "not asked again"
    for name, part in expected.take(rows).items():
        assert np.array_equal(labels.take(rows)[name], part)


def test_nodes_without_a_shared_disk_give_one_another_their_labels(
    data: SimpleNamespace, feed: Feed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soft_labels, "CHUNK", 20)
    storage = remote.FolderStorage(str(tmp_path / "storage"))
    teacher = Teacher(data.teacher, CPU)
    rows = open_index(data.manifest).rows("train").astype(np.int64)
    asked: list[int] = []

    def make(node: str) -> soft_labels.SoftLabels:
        monkeypatch.setenv("RETORT_STATE", str(tmp_path / node))
        call = Teacher.__call__
        monkeypatch.setattr(Teacher, "__call__", lambda self, pixels: asked.append(1) or call(self, pixels))
        folder = tmp_path / node / "cache" / "labels"
        try:
            return soft_labels.make(
                folder, teacher, feed, rows, 0, 2, 16, Group(0, 1, True), lambda count: None, print,
                remote.StateExchange(storage),
            )  # fmt: skip
        finally:
            monkeypatch.setattr(Teacher, "__call__", call)

    first = make("one").take(rows)
    assert asked
    asked.clear()
    second = make("two").take(rows)
    assert not asked, "all of them were fetched"
    for name, part in first.items():
        assert np.array_equal(second[name], part)

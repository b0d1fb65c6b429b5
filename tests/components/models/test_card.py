"""The model card: a change by hand is noticed, and class names are those of the data or a finding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from components.common.errors import RetortError
from components.models.card import ModelCard, first_difference, names_finding, read_card
from components.models.params import Arch

DATA = {0: "cat", 1: "dog", 2: "eel"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    card = ModelCard(
        arch=Arch(name="linear"), class_names=["cat", "dog", "eel"], input_size=[3, 32, 32],
        mean=[0.485, 0.456, 0.406], std=[1.0, 0.5, 1 / 3], data_fingerprint="data", lineage=[], sha256="00",
    )  # fmt: skip
    card.write(tmp_path / "model.json")
    assert read_card(tmp_path / "model.json") == card
    return tmp_path / "model.json"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("class_names", ["eel", "dog", "cat"]),
        ("class_names", ["a", "b", "c"]),
        ("mean", [0.5, 0.5, 0.5]),
        ("std", [1.0, 0.5, 0.3]),
        ("input_size", [3, 64, 64]),
        ("data_fingerprint", "other"),
        ("sha256", "11"),
    ],
)
def test_a_change_by_hand_is_noticed(path: Path, key: str, value: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(RetortError, match=r"model\.json: changed since it was written"):
        read_card(path)
    assert getattr(read_card(path, changed=True), key) == value


def test_other_white_space_is_no_change_and_cards_of_earlier_versions_have_no_digest(path: Path) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content))
    before = read_card(path)
    del content["digest"]
    path.write_text(json.dumps(content))
    assert read_card(path) == before


@pytest.mark.parametrize(
    ("own", "level", "said"),
    [
        (["cat", "dog", "eel"], "info", "All 3 class names of model.json are those of the data"),
        (["eel", "dog", "cat"], "error", "calls label 0 'eel', the data call it 'cat' (2 of 3 labels differ,"
         " the same names in another order)"),
        (["cat", "dog", "e"], "error", "calls label 2 'e', the data call it 'eel' (1 of 3 labels differ)"),
        (["cat", "dog"], "error", "calls label 2 nothing (it has 2 classes), the data call it 'eel'"),
        (["cat", "eel", "dog", "fox"], "error", "calls label 1 'eel', the data call it 'dog'"),
        (["cat", "dog", "dog"], "error", "calls label 2 'dog', the data call it 'eel'"),
        (["cat", "dog", "eel", "cat"], "error", "several outputs 'cat'"),
        (["cat", "dog", "eel", "3", "4"], "info", "those of the data"),  # global.class_num: 5
        (["cat", "dog", "eel", "fox"], "warning", "also knows 'fox'"),
    ],
)  # fmt: skip
def test_class_names_are_those_of_the_data(own: list[str], level: str, said: str) -> None:
    found = names_finding(own, DATA, "student", "model.json", "The way out.")
    assert (found["rule"], found["row"], found["level"]) == ("model.class_names", "1.1", level)
    assert said in found["message"]
    assert bool(found["advice"]) is (level != "info")


def test_a_class_without_images_is_no_difference() -> None:
    assert first_difference(["cat", "dog", "eel"], {0: "cat", 2: "eel"}) is None
    found = names_finding(["cat", "dog", "eel"], {0: "cat", 2: "eel"}, "student", "model.json", "")
    assert found["level"] == "warning"
    assert "also knows 'dog'" in found["message"]

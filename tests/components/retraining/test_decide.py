"""Are the clean data worth a training? By rows, classes, looks and labels against the champion's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from components.common.errors import FindingsError
from components.common.params import Registry
from components.common.storage import read_json
from components.dataset import manifest as manifests
from components.retraining import champion as champions
from components.retraining import look
from components.retraining.decide import decide
from components.retraining.decision import Decision, read_decision
from components.retraining.look import Answers
from components.retraining.memory import Seen, recall
from components.retraining.params import DecideParams
from tests.components.registry.conftest import SIZE, Project, prepared, project
from tests.conftest import findings

__all__ = ["prepared", "project"]  # fixtures

OUT = Path("outputs/retrain/decide")
CHANGES = Path("outputs/retrain/changes")


def run(project: Project, otherwise: bool = False, clean: str = "", **sections: Any) -> Decision:
    """Run the step after a change that the step before has seen."""
    CHANGES.mkdir(parents=True, exist_ok=True)
    seen = {"data": "data", "code": "code", "params": "params", "rows": 7}
    Decision(go_on=True, reason="new", otherwise=otherwise, clean=clean, **seen).write(
        CHANGES / "decision.json"
    )
    values = {
        "registry": {"name": "digits"}, "data": {"root": str(project.folder / "images")},
        "global": {"image_size": SIZE}, **sections,
    }  # fmt: skip
    decide(
        DecideParams.model_validate(values), manifest=project.folder / "clean.parquet", changes=CHANGES,
        champion=Path("outputs/retrain/champion"), out=OUT,
    )  # fmt: skip
    return read_decision(OUT, "retrain decide")


def change(project: Project, keep: Any = None, **columns: Any) -> None:
    """Rewrite the clean manifest: only rows that ``keep`` says, or another column."""
    file = project.folder / "clean.parquet"
    table = manifests.read(file)
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        field = manifests.SCHEMA.field(name)
        table = table.set_column(place, field, pa.array(values(table), field.type))
    manifests.write(table if keep is None else table.filter(keep(table)), file)


def test_clean_data_that_are_the_champions_end_it_and_are_remembered(project: Project) -> None:
    project.register()
    change(project, path=lambda table: [f"renamed/{path}" for path in table["path"].to_pylist()])
    found = run(project)
    assert not found.go_on
    assert "exactly the images that champion v1 was made from" in found.reason
    assert recall(Registry(name="digits")).seen == Seen("data", "code", "params", 7, found.clean)


def test_copies_inside_a_split_are_nothing_new(project: Project) -> None:
    project.register()
    file = project.folder / "clean.parquet"
    table = manifests.read(file)
    manifests.write(pa.concat_tables([table, table.slice(0, 40)]), file)
    assert not run(project).go_on


def test_the_images_of_a_challenger_that_lost_are_nothing_new(project: Project) -> None:
    """The champion was made from others, but the last retraining saw exactly these."""
    project.register()
    change(project, sha256=other_content)
    found = run(project)
    assert found.go_on
    assert not run(project, clean=found.clean).go_on
    assert run(project, clean=found.clean, otherwise=True).go_on


def test_other_code_trains_on_the_same_data(project: Project) -> None:
    project.register()
    assert run(project, otherwise=True).go_on


def test_without_a_champion_all_begins_with_start_weights(project: Project) -> None:
    found = run(project)
    assert (found.go_on, found.way, found.champion) == (True, "original", None)
    assert list(Path("outputs/retrain/champion").iterdir()) == []
    with pytest.raises(FindingsError, match=r"retrain\.start: Nothing can learn on: there is no champion"):
        run(project, retrain={"from_original": "never"})
    assert not (OUT / "decision.json").exists()


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"student": {"arch": {"name": "resnet18"}}}, "(linear; student.arch.name is resnet18)"),
        ({"student": {"arch": {"name": "linear"}}, "global": {"image_size": 24}}, "made for 16 pixels"),
    ],
    ids=["another network", "another input size"],
)  # fmt: skip
def test_a_champion_that_nothing_can_learn_on_from(
    project: Project, sections: dict[str, Any], said: str
) -> None:
    project.register()
    change(project, keep=lambda table: pc.less(pc.utf8_length(table["path"]), 99), sha256=other_content)
    found = run(project, **sections)
    assert (found.go_on, found.way, found.champion) == (True, "original", 1)
    (finding,) = findings(OUT)["retrain.start"]
    assert finding.level == "warning"
    assert said in finding.message


def other_content(table: pa.Table) -> list[str]:
    return ["f" * 64, *table["sha256"].to_pylist()[1:]]


def test_a_class_that_has_vanished_needs_a_person(project: Project) -> None:
    project.register()
    change(project, keep=lambda table: pc.not_equal(table["class_name"], "digit 3"))
    with pytest.raises(FindingsError, match=r"retrain\.classes: 1 class of champion v1 has no image"):
        run(project)
    drift = findings(OUT)["drift.classes"]
    assert [finding.subject for finding in drift] == ["vanished: 'digit 3'"]
    found = run(project, checks={"waive": ["retrain.classes"]})
    assert found.go_on


# --- what the champion says ---


def ask(project: Project, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, float], shift: float) -> None:
    """New images at every third place; the champion denies shares of labels, and sees a shift in new ones."""
    monkeypatch.setattr(champions, "unfit", lambda *_: "")
    monkeypatch.setattr("components.retraining.decide.unfit", lambda *_: "")

    def answer(folder: Path, root: str, rows: pa.Table, what: str) -> Answers:
        side = "new" if "new" in what else "old"
        named = np.array(rows["class_name"].to_pylist(), np.str_)
        said = named.copy()
        said[: round(wrong[side] * len(said))] = "digit 0"
        random = np.random.default_rng(len(said))
        features = random.normal(shift * (side == "new"), 1.0, (len(said), 4)).astype(np.float32)
        return Answers(features, said, named)

    monkeypatch.setattr(look, "ask", answer)
    table = manifests.read(project.folder / "clean.parquet")
    fresh = [
        f"{number:064x}" if number % 3 == 1 else digest
        for number, digest in enumerate(table["sha256"].to_pylist())
    ]
    change(project, sha256=lambda _: fresh)


@pytest.mark.parametrize(
    ("wrong", "shift", "labels", "drift"),
    [
        ({"old": 0.1, "new": 0.12}, 0.0, "info", "info"),
        ({"old": 0.1, "new": 0.5}, 0.0, "error", "info"),
        ({"old": 0.1, "new": 0.5}, 1.0, "warning", "warning"),
        ({"old": 0.1, "new": 0.1}, 1.0, "info", "warning"),
    ],
    ids=["as ever", "wrong labels", "another light, and errors", "another light"],
)
def test_labels_that_the_champion_denies_are_told_from_images_that_look_otherwise(
    project: Project, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, float], shift: float, labels: str,
    drift: str,
) -> None:  # fmt: skip
    project.register()
    ask(project, monkeypatch, wrong, shift)
    if labels == "error":
        with pytest.raises(FindingsError, match=r"retrain\.labels: The champion contradicts"):
            run(project)
    else:
        found = run(project)
        assert (found.way, found.champion) == ("update", 1)
        assert "300 rows added and 300 rows gone since champion v1: it learns on" in found.reason
    found_by = findings(OUT)
    assert [finding.level for finding in found_by["retrain.labels"]] == [labels]
    assert [finding.level for finding in found_by["retrain.drift"]] == [drift]


def test_a_new_class_lets_the_head_grow(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.register()
    ask(project, monkeypatch, {"old": 0.0, "new": 0.0}, 0.0)
    change(
        project, label=lambda table: [10, *table["label"].to_pylist()[1:]],
        class_name=lambda table: ["letter", *table["class_name"].to_pylist()[1:]],
    )  # fmt: skip
    found = run(project)
    assert found.way == "expand"
    assert "its head grows by 1 class ('letter')" in found.reason
    card = read_json(Path("outputs/retrain/champion/model.json"))
    assert len(card["class_names"]) == 10

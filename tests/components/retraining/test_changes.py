"""Is there anything new? Data, code and parameters against what the last retraining saw."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from components.common.errors import FindingsError
from components.common.params import Registry
from components.common.storage import read_json
from components.retraining import changes as step
from components.retraining import memory
from components.retraining.changes import changes, decide, fingerprint
from components.retraining.memory import Memory, Seen, recall, remember
from components.retraining.params import ChangesParams
from tests.components.registry.conftest import Project, prepared, project
from tests.conftest import findings

__all__ = ["prepared", "project"]  # fixtures

OUT = Path("outputs/retrain/changes")
NOW = Seen("data", "code", "params", 10)


@pytest.mark.parametrize(
    ("was", "champion", "go_on", "otherwise", "said"),
    [
        (None, None, True, False, "no champion yet"),
        (None, 3, True, False, "is not known yet"),
        (NOW, 3, False, False, "nothing has changed: 10 rows"),
        (Seen("other", "code", "params", 8), 3, True, False, "images or labels changed"),
        (Seen("data", "other", "params", 10), 3, True, True, "the code or its libraries changed"),
        (Seen("data", "code", "other", 10), 3, True, True, "parameters changed"),
        (NOW, None, True, False, "no champion yet"),
    ],
)  # fmt: skip
def test_what_is_new(was: Seen | None, champion: int | None, go_on: bool, otherwise: bool, said: str) -> None:
    found = decide(Memory(was, champion), NOW)
    assert (found.go_on, found.otherwise) == (go_on, otherwise)
    assert said in found.reason
    assert (found.data, found.code, found.params, found.rows) == ("data", "code", "params", 10)


def test_what_changes_no_product_is_no_change() -> None:
    plain = ChangesParams()
    elsewhere = ChangesParams.model_validate({
        "data": {"root": "/elsewhere"}, "ray": {"address": "auto"}, "registry": {"name": "other"},
        "retrain": {"budget_minutes": 3.0}, "report": {"thumbnails": False},
    })  # fmt: skip
    assert fingerprint(plain) == fingerprint(elsewhere)
    for section, value in (
        ("student", {"train": {"epochs": 3}}), ("global", {"seed": 8}), ("ray", {"workers": 3}),
        ("retrain", {"epochs": 3}), ("data", {"splits": {"val": 0.3}}), ("export", {"int8": True}),
    ):  # fmt: skip
        assert fingerprint(ChangesParams.model_validate({section: value})) != fingerprint(plain), section


def run(project: Project, registry: dict[str, str] | None = None) -> dict[str, object]:
    params = ChangesParams.model_validate({"registry": {"name": "digits", **(registry or {})}})
    changes(params, manifest=project.folder / "clean.parquet", out=OUT)
    return dict(read_json(OUT / "decision.json"))


def test_a_quiet_week_ends_at_once_and_without_its_images(project: Project) -> None:
    """The manifest knows the content of each image: they may as well be gone."""
    project.register()
    first = run(project)
    assert first["go_on"], "what the champion was made from is not known yet"
    seen = Seen(*(first[name] for name in ("data", "code", "params", "rows")))  # type: ignore[arg-type]
    remember(Registry(name="digits"), seen)
    shutil.rmtree(project.folder / "images")
    assert not run(project)["go_on"]
    assert recall(Registry(name="digits")) == Memory(seen, 1)
    project.write_data(30)  # the images are drawn again: other ones
    again = run(project)
    assert again["go_on"]
    assert "30 rows, 900 then" in str(again["reason"])


def test_what_was_seen_outlives_the_folder_it_was_seen_in(project: Project) -> None:
    """A pod finds it in the registry; while that is away, in the state that is kept."""
    project.register()
    first = run(project)
    seen = Seen(*(first[name] for name in ("data", "code", "params", "rows")))  # type: ignore[arg-type]
    remember(Registry(name="digits"), seen)
    shutil.rmtree(project.folder / ".retort/retrain")
    assert not run(project)["go_on"]


def test_a_tracker_that_is_away_stops_only_what_needs_it(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = "http://127.0.0.1:9"
    with pytest.raises(FindingsError, match=r"retrain\.registry"):
        run(project, {"tracking_uri": away})
    (found,) = findings(OUT)["retrain.registry"]
    assert found.level == "error"
    assert not (OUT / "decision.json").exists()
    params = ChangesParams.model_validate({"registry": {"name": "digits", "tracking_uri": away}})
    now = Seen(
        step.manifests.fingerprint(project.folder / "clean.parquet"), step.code.fingerprint(),
        fingerprint(params), 900,
    )  # fmt: skip
    path = memory._file(params.registry)
    path.write_text(json.dumps(vars(now)))
    assert not run(project, {"tracking_uri": away})["go_on"]
    (found,) = findings(OUT)["retrain.registry"]
    assert found.level == "warning"


@pytest.mark.parametrize("text", ["", "no json", "[]", '{"data": "x"}', "null"])
def test_a_damaged_note_is_no_note(text: str) -> None:
    assert memory._parsed(text) is None

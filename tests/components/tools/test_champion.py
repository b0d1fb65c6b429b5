"""The champion's checkpoint comes back from the registry, byte by byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from components.common.params import Registry
from components.tools.champion import fetch_champion


def test_the_champion_is_fetched_with_its_card(registered: Any, tmp_path: Path) -> None:
    registry = registered.params().registry
    folder = tmp_path / "champion"
    assert fetch_champion(registry, folder) is None, "nothing is registered yet"

    registered.register()
    assert fetch_champion(registry, folder) == folder
    for name in ("model.safetensors", "model.json"):
        assert (folder / name).read_bytes() == (registered.folder / "student" / name).read_bytes()
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "model.json"}


def test_a_tracker_that_is_away_is_said_and_no_reason_to_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = Registry(tracking_uri="http://127.0.0.1:9")
    assert fetch_champion(away, tmp_path) is None
    assert (
        "compare-weights: without the champion: registry.tracking_uri: MLflow at" in capsys.readouterr().err
    )

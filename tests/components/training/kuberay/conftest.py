"""A cluster that behaves, and a pod in it that runs a step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from components.training.kuberay import Work
from tests.components.training.kuberay.cluster import Cluster
from tests.components.training.kuberay.pods import POD, RUN, hurry, make_work


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    hurry(monkeypatch.setattr)
    monkeypatch.setenv("KFP_POD_NAME", POD)
    monkeypatch.setenv("RETORT_RUN", RUN)
    monkeypatch.chdir(tmp_path)
    made = Cluster(tmp_path)
    made.add_pod(POD)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return make_work(tmp_path)

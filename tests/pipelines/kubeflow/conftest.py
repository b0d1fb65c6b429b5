"""A KFP server for a test, and parameters that can run on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.kubeflow import follow
from pipelines.params import Params, load
from tests.pipelines.kubeflow.kfp_server import KfpServer

REPO_ROOT = Path(__file__).resolve().parents[3]
VARIABLES = (
    "RETORT_KFP_TOKEN",
    "KF_PIPELINES_SA_TOKEN_PATH",
    "KF_PIPELINES_ENDPOINT",
    "KF_PIPELINES_UI_ENDPOINT",
)


@pytest.fixture(autouse=True)
def _nothing_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.02)


@pytest.fixture
def serve() -> Iterator[Callable[..., KfpServer]]:
    """Start servers; they end with the test."""
    running: list[KfpServer] = []

    def start(**options: object) -> KfpServer:
        running.append(KfpServer(**options).__enter__())  # type: ignore[arg-type]
        return running[-1]

    yield start
    for server in running:
        server.__exit__()


@pytest.fixture
def server(serve: Callable[..., KfpServer]) -> KfpServer:
    """One that is as new as the client, and has no users."""
    return serve()


def on(host: str, *overrides: str) -> tuple[Params, Params]:
    """Parameters that can run on a cluster: with the overrides, and as the file has them."""
    fixed = [
        f"kubeflow.host={host}",
        "kubeflow.image=registry.example/retort:1.0",
        "registry.tracking_uri=http://mlflow:5000",
    ]
    file = REPO_ROOT / "params.yaml"
    return load(file, [*fixed, *overrides]), load(file, fixed)

"""What a pod is told of what outlives it, and what its log ends with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from components.common.errors import ConfigError, FindingsError
from pipelines.kubeflow import adapter, dag
from pipelines.params import load
from tests.pipelines.kubeflow.test_dag import compiled

REPO_ROOT = Path(__file__).resolve().parents[3]


def settings(*overrides: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(dag.settings(load(REPO_ROOT / "params.yaml", overrides)))
    return found


@pytest.fixture(autouse=True)
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod's environment, which nothing of this test outlives."""
    monkeypatch.chdir(tmp_path)
    for name in ("RETORT_SHARED", "RETORT_STATE_BYTES", "RETORT_STATE", "RETORT_SETTINGS"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)


def tell(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    monkeypatch.setenv("RETORT_SETTINGS", json.dumps(settings(*overrides)))


def test_a_prefix_is_told_to_each_pod_without_being_part_of_a_caches_key() -> None:
    pipeline, pods = compiled("kubeflow.state=s3://pipeline/retort", "kubeflow.scratch=10Gi")
    for each in pods.values():
        told = json.loads(each["podMetadata"]["annotations"]["retort-settings"])["shared"]
        assert told == {"place": "s3://pipeline/retort", "bytes": int(0.9 * 10 * 2**30)}
        assert "pvcMount" not in each
    assert "s3://pipeline" not in json.dumps(pipeline)


def test_a_volume_is_mounted_in_each_pod() -> None:
    _, pods = compiled("kubeflow.state_volume=retort-state")
    for each in pods.values():
        (mount,) = each["pvcMount"]
        assert mount["mountPath"] == "/retort-state"
        assert mount["constant"] == "retort-state"
        assert json.loads(each["podMetadata"]["annotations"]["retort-settings"])["shared"]["place"] == (
            "/retort-state"
        )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("kubeflow.state=s3://a/b", "kubeflow.state_volume=c"), "kubeflow: state and state_volume are two"),
        (("kubeflow.state=s3://bucket",), r"kubeflow\.state: string should match pattern"),
        (("kubeflow.state=/some/folder",), r"kubeflow\.state: string should match pattern"),
    ],
)
def test_what_is_no_one_place_is_refused(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings(*overrides)


def test_a_step_shares_what_its_pod_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch, "kubeflow.state=s3://pipeline/retort")
    adapter.share()
    assert os.environ["RETORT_SHARED"] == "s3://pipeline/retort"
    assert int(os.environ["RETORT_STATE_BYTES"]) == int(0.9 * 20 * 2**30)


def test_a_local_run_has_no_volume_and_no_limit_of_its_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch, "kubeflow.state_volume=retort-state")
    monkeypatch.setenv("RETORT_STATE", "state")
    adapter.share()
    assert "RETORT_SHARED" not in os.environ
    assert "RETORT_STATE_BYTES" not in os.environ


def test_the_log_of_a_failed_step_ends_with_what_was_found_and_where_it_lies(
    caplog: pytest.LogCaptureFixture,
) -> None:
    error = FindingsError(
        "check: distill.teacher_accuracy: The teacher is weak (and 1 more)\nsee report.html"
    )
    error.add_note("distill.teacher_accuracy: The teacher is weak\nreport: s3://p/runs/r/check/report.html")
    adapter._plainly(FindingsError, error, None)
    assert caplog.messages[-1].splitlines()[-2:] == [
        "distill.teacher_accuracy: The teacher is weak",
        "report: s3://p/runs/r/check/report.html",
    ]

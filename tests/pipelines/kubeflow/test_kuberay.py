"""From a training component's pod to a cluster of its own: what is handed on, and when."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.training import kuberay
from pipelines.kubeflow import adapter, dag
from pipelines.params import build
from pipelines.steps import MAIN


@pytest.mark.parametrize("step", ["finetune", "check", "distill"])
def test_a_step_goes_to_a_cluster_of_its_own_with_what_its_pod_hands_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    params = build(
        {
            "data": {"source": "s3://b/photos"},
            "ray": {"address": "kuberay", "storage": "s3://b/p", "workers": 3},
        }
    )
    monkeypatch.setenv("RETORT_SETTINGS", dag.settings(params))
    seen: list[tuple[kuberay.Work, kuberay.Scheduling]] = []

    def run(work: kuberay.Work, scheduling: kuberay.Scheduling) -> None:
        seen.append((work, scheduling))
        work.arguments["out"].mkdir()
        (work.arguments["out"] / "report.html").write_text("<html></html>")

    monkeypatch.setattr(kuberay, "run", run)
    stage = MAIN[step]
    names = [*stage.inputs, *stage.outputs, "page"]
    given: dict[str, Any] = {name: SimpleNamespace(path=str(tmp_path / name)) for name in names}
    given |= {field: value for field, value in dag.arguments(params).items() if field in stage.step.given()}
    given["task_config"] = SimpleNamespace(
        tolerations=[{"key": "gpu", "operator": "Exists"}], node_selector={"pool": "gpus"}, affinity=None
    )
    adapter.run(step, given)
    ((work, scheduling),) = seen
    assert (work.name, work.function) == (step, stage.step.function)
    assert work.params.ray.workers == 3
    assert work.params.ray.address == "kuberay"
    assert set(work.arguments) == set(stage.step.takes)
    assert scheduling == kuberay.Scheduling([{"key": "gpu", "operator": "Exists"}], {"pool": "gpus"}, {})
    assert (tmp_path / "page").read_text() == "<html></html>"

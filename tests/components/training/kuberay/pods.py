"""A pod's view of the cluster, and a step to run there; the waits of a real cluster, as short as a test's."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.common import signals
from components.common.errors import FindingsError
from components.training.kuberay import Work, api, elsewhere, follow, life
from components.training.params import FinetuneParams
from tests.components.training.kuberay.api_server import NAMESPACE

POD = "retort-finetune-pod"
RUN = "7c1d9a52-0001"
SILENCE = 3.0  # seconds: longer than a busy machine keeps a thread waiting


def connect(url: str) -> api.Api:
    from kubernetes import client

    configuration = client.Configuration(host=url)
    configuration.retries = False
    return api.Api(client.ApiClient(configuration), NAMESPACE)


def hurry(set_value: Callable[[Any, str, Any], None]) -> None:
    set_value(life, "PAUSE", 0.02)
    set_value(life, "WHY_SECONDS", 0.1)
    set_value(life, "GRACE", 0.5)
    set_value(life, "GONE_SECONDS", 10.0)
    set_value(life, "WATCH_SECONDS", 1)
    set_value(follow, "AGAIN_SECONDS", 0.05)
    set_value(follow, "REST_SECONDS", 2.0)
    set_value(api, "PAUSES", (0.02, 0.05))
    set_value(api, "AWAY_SECONDS", 5.0)
    set_value(api, "EXPIRED", 0.2)


def make_work(folder: Path, **ray: Any) -> Work:
    """The step finetune on files of no matter; the storage is a folder."""
    inputs = {name: folder / "in" / name for name in ("manifest", "plan", "weights")}
    for path in inputs.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    values = {
        "address": "kuberay", "storage": str(folder / "storage"), "silence_minutes": SILENCE / 60,
        "start_minutes": 20 / 60, "keep_minutes": 2 / 60, **ray,
    }  # fmt: skip
    params = FinetuneParams.model_validate(
        {
            "ray": values,
            "data": {"root": str(folder / "none")},
            "registry": {"tracking_uri": f"sqlite:///{folder.parent}/mlflow.db"},
        }
    )
    return Work(
        name="finetune",
        function="components.training.finetune:finetune",
        parameters="components.training.params:FinetuneParams",
        params=params,
        arguments={**inputs, "out": folder / "out"},
    )


def component(url: str, folder: str, pod: str, run: str) -> None:
    """A pipeline's pod, as a process of its own that runs a step elsewhere, and can be killed."""
    hurry(setattr)
    elsewhere._report = lambda *_: None  # MLflow takes seconds, and is not what is killed here
    signals.catch()
    os.environ |= {"KFP_POD_NAME": pod, "RETORT_RUN": run}
    sys.stderr = Path(folder, f"{pod}.log").open("a")  # noqa: SIM115 - until the process ends
    elsewhere.run(make_work(Path(folder)), api=connect(url))


def step_of_a_test(params: FinetuneParams, *, manifest: Path, out: Path) -> None:
    """Stands for a step's function: what it reads decides what it does."""
    word = manifest.read_text()
    out.mkdir()
    Path(out, "report.json").write_text(f'"{word}, {params.ray.address}, {manifest}"')
    if word == "findings":
        raise FindingsError("finetune: train.learns: it does not learn")
    if word == "break":
        raise ZeroDivisionError("by nothing")
    while word == "wait":
        time.sleep(0.05)

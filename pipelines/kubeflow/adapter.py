"""From the arguments of a component's body to a call of its step. Needs no kfp.

In a component's process (and nowhere else) importing this module makes failures look as they do on the
command line: an error a person can cause is its message, not a traceback; SIGTERM ends the step in order.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from components.common import signals
from components.common.errors import RetortError
from components.common.params import Registry, StepParams
from components.common.shared import VARIABLE
from components.common.storage import read_json, state_dir, write_text
from components.step import known_as
from components.tracking.versioned import PAGE
from pipelines.catalogue import find
from pipelines.steps import DECISION, GO_ON, Stage

log = logging.getLogger(__name__)

MOST_CLASSES = 30  # of a confusion matrix: more fit neither the UI nor what the server keeps of an artifact
# what a pod calls a key (see pods.py), and what boto3 and MLflow call it
KEYS = {
    "RETORT_S3_ACCESS_KEY_ID": "AWS_ACCESS_KEY_ID",
    "RETORT_S3_SECRET_ACCESS_KEY": "AWS_SECRET_ACCESS_KEY",
    "RETORT_MLFLOW_USERNAME": "MLFLOW_TRACKING_USERNAME",
    "RETORT_MLFLOW_PASSWORD": "MLFLOW_TRACKING_PASSWORD",
}


def _plainly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if signals.stopped_by(error) is not None:
        log.info("stopped")
    elif isinstance(error, RetortError):
        # last: what was found, and where the step has put its report
        log.error("\n".join([f"failed: {error}", *getattr(error, "__notes__", [])]))
    else:
        sys.__excepthook__(kind, error, trace)


if os.environ.get("_KFP_RUNTIME") == "true":  # set by kfp for the processes that run a component
    sys.excepthook = _plainly
    signals.catch()


def run(name: str, given: Mapping[str, Any]) -> None:
    """Run the step ``name``, and hand on its page and, where the component has them, its metrics.

    Args:
        given: the arguments of the component's body: sections as dicts, artifacts as kfp's objects.

    Raises:
        KeyError: when the body lacks a section, an input or an output that the step's row names.
        RetortError: when a parameter of the run contradicts the pod's settings.
    """
    pipeline, stage = find(name, given.get("of", ""))
    step = stage.step
    places = {argument: Path(value.path) for argument, value in given.items() if hasattr(value, "path")}
    # where an artifact lies says nothing to a person, and is another place in each run
    left_out = set(step.optional) - set(places)
    names = {
        places[argument]: kept
        for argument, kept in pipeline.places(stage).items()
        if argument not in left_out
    }
    share()
    params = _params(stage, given)
    take_keys()
    with known_as(names):
        if step.pod == "training" and params.ray.address == "kuberay":
            _elsewhere(stage, params, places, given["task_config"])
        else:
            step.call(params, places, stage.option)
    folder = step.folder(places)
    if step.decides:
        write_text(Path(given["go_on"]), GO_ON if read_json(folder / DECISION)["go_on"] else "no")
    if "metrics" in given:
        for number, value in _headline(folder):
            given["metrics"].log_metric(number, value)
    if "confusion" in given:
        _confusion(folder, given["confusion"])
    shutil.copyfile(folder / "report.html", places["page"])


def _elsewhere(stage: Stage, params: Any, places: Mapping[str, Path], task_config: Any) -> None:
    """Run the step in a Ray cluster that Kubernetes makes for it.

    Args:
        task_config: kfp's, with what the pod hands on to workers.
    """
    from components.training import kuberay

    scheduling = kuberay.Scheduling(
        tolerations=task_config.tolerations or (),
        node_selector=task_config.node_selector or {},
        affinity=task_config.affinity or {},
    )
    step = stage.step
    work = kuberay.Work(stage.name, step.function, step.parameters, params, step.arguments(places))
    kuberay.run(work, scheduling)


def close(state: str) -> None:
    """End the run in MLflow.

    Args:
        state: how the steps ended, as Kubeflow says it.
    """
    from components.tracking.closing import close_run

    take_keys()
    close_run(Registry.model_validate(_settings()["registry"]), state)


def share() -> None:
    """Tell the step where it shares state, how much its own disk may hold, and the run's page.

    A local run has no volumes.
    """
    told = _settings().get("shared", {})
    place, pod = str(told.get("place", "")), "RETORT_STATE" not in os.environ
    if place.startswith("s3://") or (place and Path(place).is_dir()):
        os.environ.setdefault(VARIABLE, place)
    if "page" in told:
        os.environ.setdefault(PAGE, str(told["page"]))
    if pod and "bytes" in told:
        os.environ.setdefault("RETORT_STATE_BYTES", str(told["bytes"]))


def take_keys() -> None:
    """Give a pod's keys the names that boto3 and MLflow know, which KFP's launcher must not see.

    Where KFP's own plugin opened a run in MLflow, its login is there already.
    """
    for own, known in KEYS.items():
        if own in os.environ and not (known.startswith("MLFLOW") and "MLFLOW_RUN_ID" in os.environ):
            os.environ[known] = os.environ[own]


def _settings() -> dict[str, Any]:
    """The sections that are no parameters of the run.

    Raises:
        RetortError: when the variable is missing.
    """
    try:
        found: dict[str, Any] = json.loads(os.environ["RETORT_SETTINGS"])
    except (KeyError, ValueError):
        raise RetortError(
            "RETORT_SETTINGS: missing, or no JSON; pods get it from an annotation (KFP 2.4 or newer), "
            "'retort submit --local' sets it"
        ) from None
    return found


def _params(stage: Stage, given: Mapping[str, Any]) -> Any:
    step, settings = stage.step, _settings()
    sections = {}
    for field, name in step.sections().items():
        compiled = settings.get(field, {})
        if field not in step.given():
            sections[name] = settings[field]
            continue
        if any(key in compiled and compiled[key] != value for key, value in given[field].items()):
            raise RetortError(
                f"the run's parameter '{field}' is not what this version was compiled for, and others go "
                "by that; 'retort submit -o KEY=VALUE' compiles a version of its own"
            )
        sections[name] = {**compiled, **given[field]}
    data = sections.get("data", {})
    for key, variable in (("endpoint_url", "AWS_ENDPOINT_URL_S3"), ("region", "AWS_DEFAULT_REGION")):
        if value := data.get("s3", {}).get(key):
            os.environ[variable] = value  # no pod finds what another one noted about stores
    if data.get("source") == "digits":
        # pods share no disk, and drawing these again is quicker than carrying 2,422 files from pod to pod
        sections["data"] = {**data, "root": os.fspath(state_dir("digits").absolute())}
    params = step.kind().model_validate(sections)
    if data.get("source") == "digits" and "manifest" in stage.inputs:
        _draw(params)
    return params


def _draw(params: StepParams) -> None:
    """Draw the embedded digits as ingest did, unless they are here: in a local run all share one disk."""
    from components.dataset import digits

    data = params.data  # type: ignore[attr-defined]
    if not (Path(data.root) / digits.MARK).exists():
        digits.write(Path(data.root), data.splits, params.general.seed)


def _headline(folder: Path) -> Iterator[tuple[str, float]]:
    """(name, value) of a trained network's numbers: ``val.top1``, ``test.macro_recall``, ..."""
    for split, values in read_json(folder / "metrics.json").items():
        if isinstance(values, dict):
            for name, value in values.items():
                if isinstance(value, int | float):
                    yield f"{split}.{name}", float(value)


def _confusion(folder: Path, artifact: Any) -> None:
    """The confusion matrix that a trained network left: a row is what images are, a column what it said."""
    names = read_json(folder / "model.json")["class_names"]
    if len(names) > MOST_CLASSES:
        return
    place = {name: number for number, name in enumerate(names)}
    matrix = [[0] * len(names) for _ in names]
    with (folder / "confusion.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            matrix[place[row["actual"]]][place[row["predicted"]]] += 1
    artifact.log_confusion_matrix(names, matrix)

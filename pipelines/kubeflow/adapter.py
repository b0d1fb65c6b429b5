"""From the arguments of a component's body to a call of its step. Needs no kfp.

In a component's process (and nowhere else) importing this module makes failures look as they do on the
command line: an error a person can cause is its message, not a traceback; SIGTERM ends the step in order.
"""

from __future__ import annotations

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
from components.common.storage import read_json
from components.step import known_as
from pipelines.steps import Step, find

log = logging.getLogger(__name__)


def _plainly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if signals.stopped_by(error) is not None:
        log.info("stopped")
    elif isinstance(error, RetortError):
        log.error(f"failed: {error}")
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
    """
    pipeline, stage = find(name, given.get("of", ""))
    step = stage.step
    places = {argument: Path(value.path) for argument, value in given.items() if hasattr(value, "path")}
    # where an artifact lies says nothing to a person, and is another place in each run
    names = {places[argument]: kept for argument, kept in pipeline.places(stage).items()}
    with known_as(names):
        step.call(_params(step, given, places), places, stage.option)
    folder = step.folder(places)
    if "metrics" in given:
        for number, value in _headline(folder):
            given["metrics"].log_metric(number, value)
    shutil.copyfile(folder / "report.html", places["page"])


def _params(step: Step, given: Mapping[str, Any], places: Mapping[str, Path]) -> Any:
    sections = {name: given[field] for field, name in step.sections().items()}
    if "images" in places:
        # an artifact must exist, if only as an empty folder
        places["images"].mkdir(parents=True, exist_ok=True)
        if given["data"].get("source") == "digits":
            # ingest draws those images, and pods share no disk: they travel as an artifact; every other
            # source stays where data.root or its URIs say
            sections["data"] = {**given["data"], "root": os.fspath(places["images"])}
    return step.kind().model_validate(sections)


def _headline(folder: Path) -> Iterator[tuple[str, float]]:
    """(name, value) of a trained network's numbers: ``val.top1``, ``test.macro_recall``, ..."""
    for split, values in read_json(folder / "metrics.json").items():
        if isinstance(values, dict):
            for name, value in values.items():
                if isinstance(value, int | float):
                    yield f"{split}.{name}", float(value)

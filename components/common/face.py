"""What every Kubeflow component does beside calling its step. Needs no kfp.

In a component's process (and nowhere else) importing this module makes failures look as they do on the
command line: an error a person can cause is its message, not a traceback; SIGTERM ends the step in order.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from components.common import signals
from components.common.errors import RetortError
from components.common.progress import say
from components.common.storage import read_json


def _plainly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if signals.stopped_by(error) is not None:
        say("stopped")
    elif isinstance(error, RetortError):
        say(f"failed: {error}")
    else:
        sys.__excepthook__(kind, error, trace)


if os.environ.get("_KFP_RUNTIME") == "true":  # set by kfp for the processes that run a component
    sys.excepthook = _plainly
    signals.catch()


def rooted(data: dict[str, Any], images: str) -> dict[str, Any]:
    """The section ``data``, with the embedded digits' images in the artifact folder ``images``.

    Ingest draws those images, and pods share no disk: they travel as an artifact. Every other source stays
    where ``data.root`` or its URIs say.
    """
    Path(images).mkdir(parents=True, exist_ok=True)  # an artifact must exist, if only as an empty folder
    return {**data, "root": images} if data.get("source") == "digits" else data


def show(out: str, page: str) -> None:
    """Hand the step's ``report.html`` on as the HTML artifact that the Kubeflow UI renders."""
    shutil.copyfile(Path(out) / "report.html", page)


def headline(folder: str) -> Iterator[tuple[str, float]]:
    """(name, value) of a trained network's numbers: ``val.top1``, ``test.macro_recall``, ..."""
    for split, values in read_json(Path(folder) / "metrics.json").items():
        if isinstance(values, dict):
            for name, value in values.items():
                if isinstance(value, int | float):
                    yield f"{split}.{name}", float(value)

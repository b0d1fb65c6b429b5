"""``retort retrain``: the second pipeline's stages here, in one process, and what came of them in one line.

It needs neither DVC nor git. What was finished for the same inputs, parameters and code is not done again: a
retraining that was stopped goes on where it was.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from components.common.errors import RetortError
from components.common.params import StepParams
from components.common.storage import (
    read_json,
    read_own_json,
    sha256_file,
    sha256_json,
    state_dir,
    write_json,
)
from components.registry.decision import verdict
from components.retraining import code
from components.retraining.decision import Decision, read_decision
from pipelines.cli.options import Options
from pipelines.params import Params
from pipelines.report import retrained
from pipelines.retraining import BESIDE, DECIDE, PLACE, RETRAIN, UPDATE
from pipelines.steps import Pipeline, Stage

log = logging.getLogger(__name__)

PAGE = Path(PLACE) / "report.html"
TELLING = ("report.json", "report.html", "page.json", "run.json")  # of a folder: what changes no product
ALWAYS = ("register", "retrain-record")  # what they leave depends on the registry
SECONDS = "seconds"  # that a stage took, in what is noted of it


def run(options: Options) -> None:
    """Run what is to be done, write the page, and print one line.

    Raises:
        RetortError: of the stage that stopped it; the page is there.
    """
    with options.working("retrain") as params:
        again = _Again(params)
        try:
            said = again.carry_out()
        except RetortError as error:
            again.write(f"Stopped, a person has to look: {str(error).splitlines()[0]}")
            log.error(f"retrain: stopped, a person has to look; {PAGE}")
            raise
        again.write(f"{said[0].upper()}{said[1:]}.")
    print(f"retrain: {said} ({PAGE})")


class _Again:
    """One retraining: its pipeline, and which of its stages have something to show."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.pipeline = RETRAIN.of(params)
        self.shown: list[Stage] = []
        self._started = time.monotonic()
        self._done = _Done(params)

    def write(self, said: str) -> None:
        """Write the page."""
        retrained(self.params, self.shown, said, PAGE)

    def carry_out(self) -> str:
        """Run stage by stage; returns what came of it."""
        decisions: dict[str, Decision] = {}
        for stage in self.pipeline.stages:
            if stage.when and not decisions[stage.when].go_on:
                return f"nothing to do: {decisions[stage.when].reason}"
            if stage.name == BESIDE[0] and not self._affordable(decisions[DECIDE]):
                self.pipeline = self.pipeline.without(BESIDE)
            if stage.name not in {kept.name for kept in self.pipeline.stages}:
                continue
            stage = self.pipeline[stage.name]  # its inputs may have become fewer
            self.shown.append(stage)
            self._done.run(self.pipeline, stage)
            if stage.step.decides:
                decisions[stage.name] = read_decision(stage.folder, stage.step.command)
        made = read_json(self.pipeline["register"].folder / "registered.json")
        return f"{made['name']} {verdict(made['version'], made['alias'], made['champion'], made['reason'])}"

    def _affordable(self, decision: Decision) -> bool:
        """Whether ``retrain.budget_minutes`` leaves the time for the run from the start weights."""
        settings = self.params.retrain
        if (
            settings.budget_minutes is None
            or settings.from_original == "always"
            or decision.way == "original"
        ):
            return True
        left = 60 * settings.budget_minutes - (time.monotonic() - self._started)
        wanted = self._done.seconds(UPDATE) * _times_longer(self.params)
        if wanted > left:
            log.info(
                f"retrain: only the champion learns on: from start weights it would take about "
                f"{wanted / 60:.0f} min, and retrain.budget_minutes leaves {max(0.0, left) / 60:.0f}"
            )
        return wanted <= left


def _times_longer(params: Params) -> float:
    """How often the time of the champion's learning on goes into that of teacher, control and student.

    Each counts with its epochs, and its multiply-accumulates for one image beside the student's.
    """
    from components.models import build
    from components.models.cost import measure, on_meta

    size = params.general.image_size

    def macs(name: str) -> int:
        arch = getattr(params, name).arch
        return measure(on_meta(lambda: build.create(arch, 10)), (3, size, size)).total("macs")

    student, teacher = macs("student"), macs("teacher")
    epochs = params.student.train.epochs + params.distill.finetune_epochs
    trained = (1 + params.distill.control) * epochs + params.teacher.train.epochs * teacher / student
    return trained / (params.retrain.epochs or params.student.train.epochs)


class _Done:
    """What was finished, by what it was made from: below ``.retort/``, beside what the stages left."""

    def __init__(self, params: Params) -> None:
        self._params = params
        self._code = code.fingerprint()
        self._path = state_dir("retrain") / "done.json"

    def run(self, pipeline: Pipeline, stage: Stage) -> None:
        """Run a stage, unless what it left is there for the same inputs, parameters and code."""
        again = stage.when == DECIDE and stage.name not in ALWAYS and stage.step.cached(self._params)
        key = self._key(pipeline, stage) if again else ""
        noted = read_own_json(self._path).get(stage.name, {})
        if again and noted.get("key") == key and noted.get("left") == self._left(stage):
            log.info(f"{stage.name}: done before, for the same inputs, parameters and code")
            return
        started = time.monotonic()
        pipeline.run(stage.name, self._params)
        if again:
            entry = {"key": key, "left": self._left(stage), SECONDS: time.monotonic() - started}
            write_json(self._path, {**read_own_json(self._path), stage.name: entry})

    def seconds(self, stage: str) -> float:
        """That a finished stage took, whenever that was."""
        return float(read_own_json(self._path).get(stage, {}).get(SECONDS, 0.0))

    def _key(self, pipeline: Pipeline, stage: Stage) -> str:
        params: StepParams = self._params.of(stage.step.kind())
        tracked = {name.partition(".")[0] for name in stage.step.tracked()}
        values = params.model_dump(mode="json", by_alias=True, include=_fields(stage, tracked))
        inputs = {name: _digest(pipeline.path(source)) for name, source in stage.inputs.items()}
        return sha256_json([inputs, values, stage.option, self._code])

    def _left(self, stage: Stage) -> dict[str, Any]:
        return {name: _digest(Path(place)) for name, place in stage.outputs.items()}


def _fields(stage: Stage, sections: set[str]) -> set[str]:
    return {field for field, name in stage.step.sections().items() if name in sections}


def _digest(path: Path) -> str:
    """The sha256 of a file, or of a folder's files but for its reports; empty where there is nothing."""
    if path.is_file():
        return sha256_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name not in TELLING)
    return sha256_json([[file.relative_to(path).as_posix(), sha256_file(file)] for file in files])

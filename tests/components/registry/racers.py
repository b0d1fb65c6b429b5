"""Processes that promote versions of one model at once: ``python racers.py URI COUNT MODE [FOLDER]``.

MLflow is imported once; the racers are forked from there, and open the store themselves. Each prints a line
of JSON, and the last one holds their exit statuses. Modes: ``all`` goes on until its version was champion,
``one`` tries once with the champion that all saw before any began, ``dies`` ends by SIGKILL between record
and alias. ``register`` runs the step itself, on the projects ``FOLDER/0`` and on.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
import sys
from pathlib import Path
from typing import Any

import mlflow  # noqa: F401 - before the fork

from components.common.params import Registry
from components.registry.versions import CHAMPION, OvertakenError, Versions, opened

NAME = "raced"


def race(uri: str, mode: str, start: Any, said: Any) -> None:
    with opened(Registry(tracking_uri=uri, name=NAME), "promote") as versions:
        versions.make()
        version = int(versions.add("s3://bucket/model").version)
        holder = versions.holder(CHAMPION)
        expected = int(holder.version) if holder else None
        if mode == "dies":
            Versions._crown = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign,assignment,return-value]
        start.wait()
        lost = 0
        while True:
            try:
                record = versions.set_champion(
                    version, "register", expected=expected, who=f"racer {os.getpid()}"
                )
                break
            except OvertakenError as error:
                lost += 1
                if mode == "one":
                    record = None
                    break
                expected = error.champion
        said.put({"version": version, "record": record, "lost": lost})


def register(uri: str, project: Any, start: Any, said: Any) -> None:
    os.chdir(project.folder)
    os.environ["RETORT_RUN"] = str(project.folder)
    start.wait()
    params = project.params(name=NAME, tracking_uri=uri, tolerance=1.0, class_tolerance=1.0, trial=False)
    said.put(project.register(params))


def main(uri: str, count: int, mode: str, folder: str = "") -> None:
    forks = multiprocessing.get_context("fork")
    start, said = forks.Barrier(count), forks.Queue()
    work, given = race, [(uri, mode, start, said)] * count
    if mode == "register":
        from tests.components.registry.conftest import Project

        projects = [Project(Path(folder) / str(number)) for number in range(count)]
        work, given = register, [(uri, project, start, said) for project in projects]
    racers = [forks.Process(target=work, args=arguments) for arguments in given]
    for racer in racers:
        racer.start()
    heard = 0 if mode != "dies" else count
    while heard < count:
        try:
            print(json.dumps(said.get(timeout=1)), flush=True)
            heard += 1
        except queue.Empty:
            if any(racer.exitcode for racer in racers):  # the others would wait for it
                for racer in racers:
                    racer.terminate()
                break
    for racer in racers:
        racer.join()
    print(json.dumps([racer.exitcode for racer in racers]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])

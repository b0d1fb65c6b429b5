"""Processes that promote versions of one registered model at once: ``python racers.py URI COUNT MODE``.

MLflow is imported once; the racers are forked from there, and open the store themselves. Each prints a line
of JSON, and the last one holds their exit statuses. Modes: ``all`` goes on until its version was champion,
``one`` tries once with the champion that all saw before any began, ``dies`` ends by SIGKILL between record
and alias.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
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


def main(uri: str, count: int, mode: str) -> None:
    forks = multiprocessing.get_context("fork")
    start, said = forks.Barrier(count), forks.Queue()
    racers = [forks.Process(target=race, args=(uri, mode, start, said)) for _ in range(count)]
    for racer in racers:
        racer.start()
    if mode != "dies":
        for _ in racers:
            print(json.dumps(said.get(timeout=400)), flush=True)
    for racer in racers:
        racer.join()
    print(json.dumps([racer.exitcode for racer in racers]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])

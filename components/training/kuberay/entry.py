"""The job's entry point in the cluster: fetch the step's inputs, call its function, send what it left.

``python -m components.training.kuberay.entry STORAGE JOB ATTEMPT``. It ends itself, after the workers have
saved their state, when the pipeline's pod gives no sign of life any more.
"""

from __future__ import annotations

import argparse
import logging
import os
import pkgutil
import signal
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from components.common import signals
from components.common.errors import RetortError
from components.common.storage import disk_full
from components.dataset import s3
from components.dataset.params import S3
from components.training import remote
from components.training.kuberay import parcel

log = logging.getLogger(__name__)

FOLDER = "retort"  # below the home of the pod: where the step works
LAST_SECONDS = 90.0  # for the step to save its state, once it was told to end


def main(arguments: list[str] | None = None) -> int:
    """Run the job that the arguments name; returns the exit status of the step."""
    parser = argparse.ArgumentParser(prog="python -m components.training.kuberay.entry")
    parser.add_argument("storage", help="s3://bucket/prefix, or a shared folder")
    parser.add_argument("job")
    parser.add_argument("attempt")
    parser.add_argument("--endpoint-url")
    parser.add_argument("--region")
    given = parser.parse_args(arguments)
    signals.catch()
    settings = S3(endpoint_url=given.endpoint_url, region=given.region)
    remote.remember(given.storage, settings)
    storage = remote.open_storage(given.storage, settings)
    place = parcel.folder(given.job)
    before = parcel.read_json(storage, f"{place}/{given.attempt}-{parcel.RESULT}")
    if before is not None:  # the same job in a new cluster: it would only end as it did
        log.error(before["message"])
        return int(before["status"])
    work = parcel.read_json(storage, f"{place}/{given.attempt}-{parcel.WORK}")
    if work is None:
        log.error(f"{storage.uri}/{place}: the job is not there")
        return 1
    watch = Watch(lambda: parcel.read_text(storage, f"{place}/{parcel.BEAT}"), work["silence"])
    watch.start()
    result, status = _run(storage, work, watch)
    if result is not None:
        parcel.put_json(storage, f"{place}/{given.attempt}-{parcel.RESULT}", result)
    return status


class Watch(threading.Thread):
    """Ends this process, in order, when what it reads has not changed for so many seconds.

    Only its own clock counts, and only time between two answers: a storage that is away says nothing about
    who lives.
    """

    def __init__(
        self, read: Callable[[], str], silence: float, end: Callable[[], None] | None = None
    ) -> None:
        super().__init__(name="watch", daemon=True)
        self._read, self._silence, self._end = read, silence, end or _end_self
        self.silent = False

    def run(self) -> None:
        last, still, answered = "", 0.0, time.monotonic()
        pause = self._silence / parcel.BEATS
        while True:
            time.sleep(pause)
            try:
                text = self._read()
            except RetortError as error:
                log.debug(f"no sign of life could be read: {error}")
                answered = time.monotonic()
                continue
            now = time.monotonic()
            still = 0.0 if text != last else still + now - answered
            last, answered = text, now
            if still > self._silence:
                self.silent = True
                self._end()
                return


def _end_self() -> None:
    """As Kubernetes would: SIGTERM first, and then no more patience."""
    log.warning(
        "the pipeline's pod gives no sign of life any more: the workers save their state, and this ends"
    )
    last = threading.Timer(LAST_SECONDS, lambda: os._exit(143))
    last.daemon = True
    last.start()
    os.kill(os.getpid(), signal.SIGTERM)


def _run(storage: remote.Storage, work: Mapping[str, Any], watch: Watch) -> tuple[dict[str, Any] | None, int]:
    """How the step ended (None: it was stopped, and another try may go on), and its exit status."""
    home = Path.home() / FOLDER
    home.mkdir(parents=True, exist_ok=True)
    os.chdir(home)
    out = Path(work["out"])
    ended: dict[str, Any] = {"kind": "ok", "message": "", "rule": "", "status": 0}
    try:
        _step(storage, work, out)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the pipeline's pod says it
        stopped = signals.stopped_by(error)
        if stopped is not None and not watch.silent:
            log.info("stopped")
            return None, getattr(stopped, "status", 130)
        ended = _ended(error, watch.silent)
        log.error(f"failed: {ended['message']}")
    ended["out"] = parcel.packed(remote.put(storage, out)) if out.is_dir() else None
    return ended, ended["status"]


def _ended(error: BaseException, silent: bool) -> dict[str, Any]:
    if silent:
        message = "the job ended itself, since it heard nothing of the pipeline's pod (ray.silence_minutes)"
        return {"kind": parcel.SILENT, "message": message, "rule": "", "status": 143}
    if isinstance(error, RetortError):
        kind = type(error).__name__
        return {"kind": kind, "message": str(error), "rule": error.rule, "status": error.status}
    log.error("the step broke", exc_info=error)
    said = next(iter(str(error).splitlines()), "")
    full = "the disk is full (ray.disk): " if disk_full(error) else ""
    return {"kind": "failed", "message": f"{full}{type(error).__name__}: {said}", "rule": "", "status": 1}


def _step(storage: remote.Storage, work: Mapping[str, Any], out: Path) -> None:
    """Put everything in its place, and call the step's function."""
    s3.remember_stores(work["stores"])
    places = {argument: Path(given["name"]) for argument, given in work["inputs"].items()}
    for argument, given in work["inputs"].items():
        _link(remote.localize(storage, parcel.unpacked(given["ref"])), places[argument])
    params = pkgutil.resolve_name(work["parameters"]).model_validate(work["params"])
    if work["images"] is not None:
        _unpack(remote.localize(storage, parcel.unpacked(work["images"])), Path(params.data.root))
        _share(params, places["manifest"])
    out.parent.mkdir(parents=True, exist_ok=True)
    pkgutil.resolve_name(work["function"])(params, **places, out=out)


def _link(source: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(source)


def _unpack(archive: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def _share(params: Any, manifest: Path) -> None:
    """Images that only the pipeline's pod had: the workers find them in the storage."""
    from components.training.inputs.shards import shard
    from components.training.params import ShardParams

    sections = params.model_dump(mode="json", by_alias=True)
    shard(ShardParams.model_validate({name: sections[name] for name in ("data", "ray")}), manifest=manifest)


if __name__ == "__main__":
    sys.exit(main())

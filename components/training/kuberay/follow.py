"""The log of a job, line by line, as it is written. Nothing is decided by it: a log may end early."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from components.training.kuberay import template
from components.training.kuberay.api import Api

log = logging.getLogger(__name__)

AGAIN_SECONDS = 3.0  # until a log that ended is asked for once more
BACK_SECONDS = 30.0  # of a log that are asked for again, beside what passed since its last line
REST_SECONDS = 10.0  # for the rest of the log, when the job has ended


def show(line: str) -> None:
    """Pass a line of the cluster on as it is."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


class Follower:
    """A thread that hands each line of the job's log to ``hear``, once."""

    def __init__(self, api: Api, job: str, hear: Callable[[str], None] = show) -> None:
        self._api, self._hear = api, hear
        self._selector = f"{template.JOB}={job},{template.PART}=submitter"
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="job-log", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Hear the rest of what there is, for some seconds, and stop."""
        self._ending.set()
        self._thread.join(REST_SECONDS)

    def _work(self) -> None:
        pod, last, heard = "", "", 0.0
        while True:
            ending, more = self._ending.is_set(), False
            try:
                found = self._api.pods(self._selector)
                if found:
                    if found[-1]["metadata"]["name"] != pod:  # the submitter was started anew
                        pod, last = found[-1]["metadata"]["name"], ""
                    for stamp, line in self._lines(pod, last, heard):
                        last, heard, more = stamp, time.monotonic(), True
                        self._hear(line)
            except Exception as error:  # noqa: BLE001 - a thread's last resort: the job goes on without its log
                if getattr(error, "code", getattr(error, "status", 0)) == 403:
                    log.warning(f"the job's log cannot be shown: {error}")
                    return
                log.debug(f"the log ended: {error}")
            if not ending:
                self._ending.wait(AGAIN_SECONDS)
            elif not more:  # a log that ended early has a rest
                return

    def _lines(self, pod: str, last: str, heard: float) -> Iterator[tuple[str, str]]:
        """Time and text of the lines after the one at the time ``last``.

        Times are those of the pod's node, and only compared with one another; a log is asked for by how long
        ago its last line came here.
        """
        since = None if not last else time.monotonic() - heard + BACK_SECONDS
        response = self._api.log(pod, since)
        try:
            for raw in _split(response):
                stamp, _, line = raw.partition(" ")
                if stamp > last:
                    yield stamp, line
        finally:
            response.close()
            response.release_conn()


def _split(response: Any) -> Iterator[str]:
    """Lines of a response that comes in pieces."""
    rest = b""
    for piece in response.stream(amt=None, decode_content=False):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")

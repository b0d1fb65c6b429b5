"""What runs in a RayJob's cluster: a stand-in for the step, or the real entry point as a process."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.storage import write_json
from components.training import remote
from components.training.kuberay import parcel
from components.training.kuberay.entry import Watch

if TYPE_CHECKING:
    from tests.components.training.kuberay.api_server import Object
    from tests.components.training.kuberay.cluster import Cluster

TICK = 0.02  # seconds
STEPS = 20  # of the stand-in, each a tick


class Entry(threading.Thread):
    """A stand-in for the step in its cluster: goes on from its checkpoint, ends itself when nobody lives."""

    def __init__(self, cluster: Cluster, job: Object) -> None:
        super().__init__(daemon=True)
        self.name_of_job = job["metadata"]["name"]
        self.cluster, self.status, self.ended, self.silent, self.at_work = cluster, 1, "", False, False
        words = shlex.split(job["spec"]["entrypoint"])
        self.storage = remote.open_storage(words[3])
        self.attempt = words[5]
        self.name = self.name_of_job
        self._stop_now = threading.Event()

    def stop(self, why: str) -> None:
        self.ended = why
        self._stop_now.set()

    def _be_silent(self) -> None:
        if not self.is_alive():  # a real one's watch ends with its process
            return
        self.silent = True
        self.cluster.silenced.append(self.name)
        self.stop("silent")

    def run(self) -> None:
        place = parcel.folder(self.name)
        before = parcel.read_json(self.storage, f"{place}/{self.attempt}-{parcel.RESULT}")
        if before is not None:
            self.status = before["status"]
            return
        work = parcel.read_json(self.storage, f"{place}/{self.attempt}-{parcel.WORK}")
        watch = Watch(
            lambda: parcel.read_text(self.storage, f"{place}/{parcel.BEAT}"), work["silence"], self._be_silent
        )
        watch.start()
        self.at_work = True
        self.cluster.trained.append(self.name)
        checkpoint = f"{place}/checkpoint"
        done = int(parcel.read_text(self.storage, checkpoint) or 0)
        self.cluster.say(self.name, f"going on at step {done}")
        while (done < STEPS or self.name in self.cluster.endless) and not self._stop_now.wait(TICK):
            done += 1
            parcel.put_text(self.storage, checkpoint, str(done))
            self.cluster.say(self.name, f"step {done}")
        if self.ended == "silent":
            self._leave(kind=parcel.SILENT, message="nobody there", rule="", status=143)
        elif not self.ended:
            self._finish()

    def _finish(self) -> None:
        outcome = self.cluster.outcome
        if outcome == "findings":
            message = "finetune: train.learns: it does not learn\nsee outputs/teacher/report.html"
            self._leave(kind="FindingsError", message=message, rule="", status=1)
        elif outcome == "stopped":
            self.ended = "stopped"
        elif outcome == "ok":
            self._leave(kind="ok", message="", rule="", status=0)

    def _leave(self, **result: Any) -> None:
        with tempfile.TemporaryDirectory() as name:
            out = Path(name) / "out"
            write_json(out / "report.json", {"left by": self.attempt, "kind": result["kind"]})
            (out / "report.html").write_text("<html></html>")
            result["out"] = parcel.packed(remote.put(self.storage, out))
        parcel.put_json(self.storage, f"{parcel.folder(self.name)}/{self.attempt}-{parcel.RESULT}", result)
        self.status = result["status"]


class Process(Entry):
    """The real entry point, in a process: what Ray's job server would run on the head."""

    def __init__(self, cluster: Cluster, job: Object) -> None:
        super().__init__(cluster, job)
        assert cluster.command is not None
        _, *words = shlex.split(job["spec"]["entrypoint"])
        self._command = [*cluster.command, sys.executable, *words]
        self._process: subprocess.Popen[str] | None = None

    def stop(self, why: str) -> None:
        super().stop(why)
        if self._process is not None:
            self._process.terminate()

    def run(self) -> None:
        with subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as self._process:
            assert self._process.stdout is not None
            for line in self._process.stdout:
                self.cluster.say(self.name, line.rstrip("\n"))
        self.status = self._process.returncode

"""Run the DAG here, through KFP's own local runner."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from components.common.environment import environment
from components.common.errors import RetortError
from components.common.findings import read_report
from components.common.storage import remove, sha256_file, state_dir
from pipelines.history import REPO_ROOT
from pipelines.kubeflow import dag
from pipelines.params import Params
from pipelines.steps import MAIN

if TYPE_CHECKING:
    import psutil

log = logging.getLogger(__name__)

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
STOP_SECONDS = (3.0, 20.0)  # for a component to end by itself, and after it was asked to


def submit_local(params: Params) -> tuple[Path, str]:
    """Run the DAG here, without Kubernetes and without anything that a run through DVC left behind.

    Products lie under ``.retort/kfp/``; those of the run before are removed first.

    Returns:
        The student's ``model.safetensors`` and its sha256.

    Raises:
        RetortError: naming the step that failed and what it said.
    """
    home = state_dir("kfp").absolute()
    root = home / "runs"
    remove(root)
    key = time.strftime("kfp-local-%Y%m%d-%H%M%S")
    own = {
        "RETORT_STATE": os.fspath(home / "state"),
        "RETORT_RUN": key,
        "RETORT_SETTINGS": dag.settings(params),
        # a component is a process of its own: it imports the code of this process, not another checkout's
        "PYTHONPATH": os.pathsep.join(filter(None, [os.fspath(REPO_ROOT), os.environ.get("PYTHONPATH")])),
    }
    with environment(own), _components_end_with_us(), redirect_stdout(_Readable(sys.stdout)):
        student = Path(_run_here(params, root)) / "model.safetensors"
    digest = sha256_file(student)
    log.info(f"every step's products: {_relative(root)}/*/STEP/")
    log.info(f"student: {_relative(student)}")
    log.info(f"sha256: {digest}")
    return student, digest


class _Readable(io.TextIOBase):
    """KFP's output without what no person reads: each task's input and output as JSON, blank lines."""

    # a line that ends like the first begins what is left out, a line that begins like the second ends it
    LEFT_OUT = (
        (re.compile(r"Got executor_input:$"), "    }"),
        (re.compile(r"- INFO - Task .* outputs:$"), "---"),
    )
    IDLE = re.compile(r"^\s*$|^---|^\s*\[KFP Executor|Streamed logs:$|has no outputs$")

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._rest = ""
        self._until = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line if self._out.isatty() else COLOUR.sub("", line))
        return len(text)

    def flush(self) -> None:
        self._out.flush()

    def _line(self, line: str) -> None:
        if self._until:
            if line.startswith(self._until):
                self._until = ""
            return
        self._until = next((end for begin, end in self.LEFT_OUT if begin.search(line)), "")
        if not self._until and not self.IDLE.search(line):
            self._out.write(line + "\n")


def _run_here(params: Params, root: Path) -> str:
    """Run the pipeline through KFP's local runner; returns the folder of the student."""
    from kfp import local

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kfp: that the image is not called python
        local.init(local.SubprocessRunner(use_venv=False), pipeline_root=os.fspath(root))
        try:
            dag.build(params, local=True)(**dag.arguments(params))
        except RuntimeError as error:
            raise _explained(COLOUR.sub("", str(error)), root) from None
    stage, _, name = MAIN.result.partition(".")
    (student,) = root.glob(f"*/{stage}/{name}")
    return os.fspath(student)


def _explained(message: str, root: Path) -> RetortError:
    """What a failed local run says: the step, and the first error of the report that it left."""
    inner = re.search(r"Inner task failed: '?([\w-]+)'?", message)
    if inner is None:
        return RetortError(f"the local run failed: {message}")
    task = inner.group(1)
    for path in sorted(root.glob(f"*/{task}/*/report.json")):
        errors = read_report(path).errors()
        if errors:
            first = errors[0]
            more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
            rule = "" if first.rule.endswith(".failed") else f"{first.rule}: "
            text = f"{task}: {rule}{first.message} {first.advice}".rstrip()
            return RetortError(f"{text}{more}\nsee {_relative(path.with_name('report.html'))}")
    return RetortError(f"{task}: failed before its step began; the log above says why")


def _relative(path: Path) -> str:
    return os.path.relpath(path)


@contextmanager
def _components_end_with_us() -> Iterator[None]:
    """A signal to this process ends the component that runs, too; KFP's runner waits for it, or leaves it."""

    def pass_on(signum: int, frame: FrameType | None) -> None:
        _ask_to_end(_components())
        if callable(before):
            before(signum, frame)
        else:
            raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    except BaseException:
        _end(_components())
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _components() -> list[psutil.Process]:
    import psutil

    return psutil.Process().children(recursive=True)


def _ask_to_end(processes: list[psutil.Process]) -> None:
    """Tell the component itself; Ray's processes below it are the component's to stop.

    By SIGTERM: in a shell's background job components, like all of it, ignore SIGINT.
    """
    import psutil

    for process in processes:
        try:
            if "kfp.dsl.executor_main" in process.cmdline() and "sh" not in process.name():
                process.send_signal(signal.SIGTERM)
        except psutil.NoSuchProcess:
            continue


def _end(processes: list[psutil.Process]) -> None:
    import psutil

    # Ctrl-C on a terminal reached them already: a second interrupt would cut their own tidying up short
    _, left = psutil.wait_procs(processes, timeout=STOP_SECONDS[0])
    _ask_to_end(left)
    _, left = psutil.wait_procs(left, timeout=STOP_SECONDS[1])
    for process in left:
        process.kill()

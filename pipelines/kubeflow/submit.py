"""Run the DAG through Kubeflow Pipelines: on a server, or here with KFP's own local runner."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from components.common.environment import environment
from components.common.errors import RetortError
from components.common.findings import read_report
from components.common.storage import remove, sha256_file, state_dir
from pipelines.history import REPO_ROOT
from pipelines.kubeflow import dag
from pipelines.params import Params

if TYPE_CHECKING:
    import kfp
    import psutil
    from kfp_server_api import V2beta1Run

log = logging.getLogger(__name__)

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
ANSWER_SECONDS = 20.0  # for the server's first answer
REQUEST_SECONDS = 60  # for each answer after that
POLL_SECONDS = 5.0
AWAY_SECONDS = 600.0  # without an answer, until the waiting ends (the run itself goes on)
ENDED = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")
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
            return dag.build(params)(**dag.arguments(params)).output.path
        except RuntimeError as error:
            raise _explained(COLOUR.sub("", str(error)), root) from None


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


def submit(params: Params, wait: bool) -> str:
    """Upload the pipeline to the server at ``kubeflow.host`` and start a run; follow it when ``wait``.

    The pipeline is called after ``registry.name``; a new version is uploaded only when the compiled file
    differs from those that are there.

    Returns:
        The id of the run.

    Raises:
        RetortError: when the host is empty, does not answer, or refuses; when the run failed.
    """
    from kfp_server_api import ApiException
    from urllib3.exceptions import HTTPError

    host = _host(params)
    try:
        client = _client(host)
        experiment = client.create_experiment(name=params.kubeflow.experiment)
        pipeline_id, version_id = _upload(client, params)
        name = dag.pipeline_name(params)
        run = client.run_pipeline(
            experiment_id=experiment.experiment_id,
            job_name=f"{name} {time.strftime('%Y-%m-%d %H:%M:%S')}",
            params=dag.arguments(params),
            pipeline_id=pipeline_id,
            version_id=version_id,
        )
    except ApiException as error:
        raise RetortError(f"kubeflow.host {host}: {_refusal(error)}") from None
    except HTTPError as error:
        raise RetortError(f"kubeflow.host {host}: {error}") from None
    if wait:
        _follow(client, run.run_id, host)
    return run.run_id


def _host(params: Params) -> str:
    """The server's URL, after it answered there.

    Raises:
        RetortError: when there is none, when it does not answer, or when a pod could not reach the tracker.
    """
    host = params.kubeflow.host.rstrip("/")
    if not host:
        raise RetortError(
            "kubeflow.host is empty: give the URL of the KFP server's API, such as "
            "-o kubeflow.host=http://localhost:8888; 'retort submit --local' needs no server"
        )
    if not host.startswith(("http://", "https://")):
        raise RetortError(f"kubeflow.host '{host}': expected a URL, such as http://localhost:8888")
    if params.registry.tracking_uri.startswith("sqlite:"):
        raise RetortError(
            f"registry.tracking_uri '{params.registry.tracking_uri}' is a file, lost with each pod; "
            "give an MLflow server's URL (infra/k8s brings one)"
        )
    url = f"{host}/apis/v2beta1/healthz"
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:  # noqa: S310 - http or https
            json.load(answer)
    except urllib.error.HTTPError as error:
        raise RetortError(f"kubeflow.host {host}: {url} answered {error.code} {error.reason}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise RetortError(
            f"kubeflow.host {host}: no KFP server answers there ({reason}); is it running, and forwarded?"
        ) from None
    return host


def _client(host: str) -> kfp.Client:
    import kfp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        client = kfp.Client(host=host)
    # the generated client waits for ever unless each call says how long
    rest = client._run_api.api_client.rest_client
    request = rest.request

    def bounded(*args: Any, **kwargs: Any) -> Any:
        return request(*args, **{**kwargs, "_request_timeout": REQUEST_SECONDS})

    rest.request = bounded
    return client


def _upload(client: kfp.Client, params: Params) -> tuple[str, str]:
    """The ids of the pipeline and of the version that equals the compiled file."""
    name = dag.pipeline_name(params)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        dag.compile(params, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        pipeline_id = client.get_pipeline_id(name)
        if pipeline_id is None:
            pipeline_id = client.upload_pipeline(os.fspath(path), pipeline_name=name).pipeline_id
            # the server calls the first version after the pipeline
            versions = client.list_pipeline_versions(pipeline_id)
        else:
            wanted = {"operation": "EQUALS", "key": "display_name", "stringValue": f"{name}-{digest}"}
            versions = client.list_pipeline_versions(pipeline_id, filter=json.dumps({"predicates": [wanted]}))
        if versions.pipeline_versions:
            return pipeline_id, versions.pipeline_versions[0].pipeline_version_id
        version = client.upload_pipeline_version(os.fspath(path), f"{name}-{digest}", pipeline_id)
        return pipeline_id, version.pipeline_version_id


def _follow(client: kfp.Client, run_id: str, host: str) -> None:
    """Say each task's state as it changes, until the run ends; a poll that fails says nothing about it."""
    from kfp_server_api import ApiException
    from urllib3.exceptions import HTTPError

    link = f"{host}/#/runs/details/{run_id}"
    said: dict[str, str] = {}
    heard = time.monotonic()
    while True:
        try:
            run = client.get_run(run_id)
        except (ApiException, HTTPError) as error:
            away = time.monotonic() - heard
            if away > AWAY_SECONDS or getattr(error, "status", None) in (401, 403, 404):
                reason = f"no word of the run any more ({_refusal(error)}); it may go on"
                raise RetortError(f"kubeflow.host {host}: {reason}: {link}") from None
        else:
            heard = time.monotonic()
            for task, state in _tasks(run).items():
                if state != said.get(task):
                    log.info(f"{task}: {state.lower()}")
                    said[task] = state
            if run.state in ENDED:
                break
        time.sleep(POLL_SECONDS)
    if run.state in ("FAILED", "CANCELED"):
        failed = [task for task, state in said.items() if state in ("FAILED", "SYSTEM_ERROR")]
        where = f" at {', '.join(failed)}" if failed else ""
        reason = f": {run.error.message}" if run.error and run.error.message else ""
        raise RetortError(f"the run {run.state.lower()}{where}{reason}\nits logs: {link}")
    log.info(f"the run {run.state.lower()}: {link}")


def _tasks(run: V2beta1Run) -> dict[str, str]:
    """State by name of a run's tasks; the drivers that KFP runs before each are left out."""
    details = run.run_details.task_details if run.run_details else None
    return {
        task.display_name: task.state
        for task in details or []
        if task.state and task.display_name and not task.display_name.endswith(("driver", "executor"))
    }


def _refusal(error: Exception) -> str:
    """The server's own words of a refused request, on one line."""
    body = getattr(error, "body", None)
    try:
        text = json.loads(body)["message"] if body else ""
    except (ValueError, KeyError, TypeError):
        text = ""
    status = f"{getattr(error, 'status', '')} {getattr(error, 'reason', '')}".strip()
    return " ".join(f"{status} {text}".split()) or str(error)

"""What happens to training on Ray: SIGTERM, and a disk that is full. Slow: real processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from components.common.storage import sha256_file
from components.training.params import DistillParams

REPO_ROOT = Path(__file__).resolve().parents[3]
STATES = ".retort/checkpoints/*/checkpoint_*/state.pt"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def long(params: DistillParams) -> DistillParams:
    """With so many epochs that something can happen in the midst of them."""
    values = params.model_dump(by_alias=True)
    values["teacher"]["train"]["epochs"] = 60
    return DistillParams.model_validate(values)


class Command:
    """A finetune in a process of its own, with the signals and the exit status of the command line."""

    def __init__(self, params: DistillParams, data: SimpleNamespace, out: str) -> None:
        Path("params.json").write_text(params.model_dump_json(by_alias=True))
        code = textwrap.dedent(
            f"""
            import sys
            from pathlib import Path
            from components.common import signals
            from components.common.errors import RetortError, Terminated
            from components.training.finetune import finetune
            from components.training.params import FinetuneParams

            signals.catch()
            params = FinetuneParams.model_validate_json(Path("params.json").read_text())
            try:
                finetune(params, manifest=Path({str(data.manifest)!r}), plan=Path({str(data.plan)!r}),
                         weights=Path({str(data.weights)!r}), out=Path({out!r}))
            except (RetortError, Terminated) as error:
                print(f"Error: {{error}}", file=sys.stderr)
                raise SystemExit(error.status)
            """
        )
        environment = {**os.environ, "PYTHONPATH": os.fspath(REPO_ROOT)}
        self._log = Path(f"{out}-{time.monotonic_ns()}.log")
        with self._log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, "-c", code], stderr=log, env=environment)

    @property
    def said(self) -> str:
        return self._log.read_text()

    def until(self, found: Callable[[], bool]) -> None:
        end = time.monotonic() + 240
        while not found():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.05)

    def finish(self, status: int = 0) -> str:
        assert self.process.wait(240) == status, self.said
        return self.said


def checkpoints() -> int:
    """How many checkpoints lie there."""
    return len(list(Path().glob(STATES)))


def test_sigterm_saves_in_mid_epoch_and_the_same_command_goes_on_there(
    data: SimpleNamespace, long: DistillParams
) -> None:
    Command(long, data, "whole").finish()
    command = Command(long, data, "out")
    command.until(lambda: checkpoints() > 0)
    command.process.send_signal(signal.SIGTERM)
    said = command.finish(143)
    assert "stopping: the workers save a checkpoint first" in said
    assert "left off in epoch" in said
    said = Command(long, data, "out").finish()
    assert "an earlier run was interrupted; going on from its last checkpoint" in said
    assert sha256_file(Path("out/model.safetensors")) == sha256_file(Path("whole/model.safetensors"))
    assert Path("out/history.csv").read_bytes() == Path("whole/history.csv").read_bytes()


@pytest.fixture
def small_disk(data: SimpleNamespace) -> Iterator[Path]:
    """A disk of 40 MB for the checkpoints."""
    folder = Path(".retort/checkpoints").resolve()
    folder.mkdir(parents=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", os.fspath(folder)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("no right to mount a disk here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", os.fspath(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_kept(
    small_disk: Path, data: SimpleNamespace, long: DistillParams
) -> None:
    command = Command(long, data, "out")
    command.until(lambda: checkpoints() > 0)
    with (small_disk / "filler").open("wb") as filler, suppress(OSError):
        while True:
            filler.write(bytes(1 << 16))
            filler.flush()
    said = command.finish(1)
    last = [line for line in said.splitlines() if line.startswith("Error: ")]
    assert len(last) == 1, said
    assert "the disk is full" in last[0]
    assert os.fspath(small_disk) in last[0]
    assert "Traceback" not in said
    (small_disk / "filler").unlink()
    said = Command(long, data, "out").finish()
    assert "an earlier run was interrupted; going on from its last checkpoint" in said
    assert Path("out/model.safetensors").exists()

"""Training on Ray itself. The fast suite has one small run; what takes several is slow."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from components.common.errors import FindingsError, RetortError
from components.common.findings import read_report
from components.common.storage import sha256_file
from components.models import checkpoint
from components.training.check import check
from components.training.cluster import running
from components.training.distill import distill
from components.training.finetune import finetune
from components.training.params import CheckParams, DistillParams, FinetuneParams, Ray
from tests.conftest import descendants


def of(params: DistillParams, **changes: dict[str, object]) -> dict[str, object]:
    values = params.model_dump(by_alias=True)
    for section, change in changes.items():
        values[section] = {**values[section], **change}
    return values


def run_finetune(
    params: DistillParams, data: SimpleNamespace, out: Path, **changes: dict[str, object]
) -> str:
    finetune(FinetuneParams.model_validate(of(params, **changes)), manifest=data.manifest, plan=data.plan,
             weights=data.weights, out=out)  # fmt: skip
    return sha256_file(out / "model.safetensors")


def run_distill(params: DistillParams, data: SimpleNamespace, out: Path) -> str:
    distill(params, manifest=data.manifest, plan=data.plan, teacher=data.teacher, weights=data.weights,
            check=Path("outputs/check"), out=out)  # fmt: skip
    return sha256_file(out / "model.safetensors")


def open_gate(params: DistillParams, data: SimpleNamespace) -> None:
    check(CheckParams.model_validate(of(params)), manifest=data.manifest, plan=data.plan,
          teacher=data.teacher, weights=data.weights, out=Path("outputs/check"))  # fmt: skip


def test_distillation_end_to_end(
    data: SimpleNamespace, params: DistillParams, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path("outputs/student")
    with pytest.raises(RetortError, match="retort check"):
        run_distill(params, data, out)

    open_gate(params, data)
    before = load_file(str(data.teacher / "model.safetensors"))
    run_distill(params, data, out)

    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["val"]["top1"] > 0.4
    assert set(metrics["val"]["per_class"]) == {f"digit {label}" for label in range(4)}
    assert {"val", "test"} <= set(metrics["control"])
    assert metrics["gain"]["val_top1"] == pytest.approx(
        metrics["distilled"]["val"]["top1"] - metrics["control"]["val"]["top1"]
    )
    assert 4 <= metrics["unlabelled_images"] <= 8, "two for each class that the teacher sees"

    history = list(csv.DictReader((out / "history.csv").open()))
    assert [row["phase"] for row in history] == [
        *["distil"] * 3, "labelled", *["control"] * 3, "control, labelled",
    ]  # fmt: skip
    confusion = list(csv.DictReader((out / "confusion.csv").open()))
    assert len(confusion) == 32
    right = sum(row["actual"] == row["predicted"] for row in confusion)
    assert right / 32 == pytest.approx(metrics["val"]["top1"])

    module, card = checkpoint.load(out)
    assert not any(part.training for part in module.modules())
    kept, source = metrics["kept"], card.lineage[-1].source
    assert source.startswith({"student": "teacher: ", "control": "control: the student alone"}[kept])
    assert metrics["val"] == metrics["distilled" if kept == "student" else "control"]["val"]
    after = load_file(str(data.teacher / "model.safetensors"))
    assert all(torch.equal(before[name], after[name]) for name in before), "the teacher is frozen"

    rules = {finding.rule: finding for finding in read_report(out / "report.json").findings}
    assert "12 images per worker x 2 Ray workers = 24 per step" in rules["config.batch"].message
    assert "with 1 seed that says nothing of distilling as such" in rules["distill.gain"].message
    assert rules["distill.kept"].measured == kept
    assert rules["head.fc_share"].level == "info", "1,028 of a third of a million parameters"
    assert not list(Path(".retort/checkpoints").iterdir()), "a finished step keeps no checkpoints"
    assert len(list(Path(".retort/cache/soft_labels").iterdir())) == 5, (
        "two crops, the pool, and two by which it is chosen"
    )
    said = capsys.readouterr().err
    assert "will take about" in said
    assert "validation loss" in said
    assert "Started a local Ray instance" not in said


def test_too_little_shared_memory_stops_before_training(
    data: SimpleNamespace, params: DistillParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.training.machine.shm_free", lambda: 100_000)
    train = params.teacher.train.model_copy(update={"num_workers": 4}).model_dump()
    with pytest.raises(FindingsError, match=r"preflight\.shm.*--shm-size=8g"):
        run_finetune(params, data, Path("out"), teacher={"train": train})
    report = read_report(Path("out/report.json"))
    assert [finding.row for finding in report.errors()] == ["1.3"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("kubernetes", "expected '' .*or kuberay"),
        ("http://127.0.0.1:8265", "expected '' .*auto"),
    ],
)
def test_an_address_of_another_kind_is_refused_with_the_parameters(address: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Ray(address=address)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://127.0.0.1:1", "refused"),
        ("ray://nonsense", r"expected ray://HOST:PORT"),
    ],
)
def test_an_address_that_does_not_answer(address: str, message: str) -> None:
    with (
        pytest.raises(RetortError, match=rf"ray\.address: '?{address}.*{message}"),
        running(Ray(address=address)),
    ):
        pass


@pytest.mark.slow
@pytest.mark.claim
def test_the_same_seed_gives_the_same_bytes_on_ray_too(data: SimpleNamespace, params: DistillParams) -> None:
    assert run_finetune(params, data, Path("first")) == run_finetune(params, data, Path("again"))
    for name in ("metrics.json", "history.csv", "confusion.csv", "model.json"):
        assert Path("first", name).read_bytes() == Path("again", name).read_bytes()


@pytest.mark.slow
def test_loader_processes_change_nothing(data: SimpleNamespace, params: DistillParams) -> None:
    plain = run_finetune(params, data, Path("plain"))
    part = {"num_workers": 2}
    train = {**params.teacher.train.model_dump(), **part}
    valid = {**params.teacher.valid.model_dump(), **part}
    assert run_finetune(params, data, Path("more"), teacher={"train": train, "valid": valid}) == plain
    rules = {finding.rule for finding in read_report(Path("more/report.json")).findings}
    assert "preflight.shm" in rules


class Command:
    """A finetune in a process of its own, as the command line runs it."""

    def __init__(self, params: DistillParams, data: SimpleNamespace, out: str, first: str = "") -> None:
        Path("params.json").write_text(params.model_dump_json(by_alias=True))
        Path("command.py").write_text(
            textwrap.dedent(f"""
            import json, signal
            from pathlib import Path
            from components.common.errors import Terminated
            from components.training.finetune import finetune
            from components.training.params import FinetuneParams

            def stop(*_):
                raise Terminated

            signal.signal(signal.SIGTERM, stop)
            params = FinetuneParams.model_validate(json.loads(Path("params.json").read_text()))
            {first}
            finetune(params, manifest=Path({str(data.manifest)!r}), plan=Path({str(data.plan)!r}),
                     weights=Path({str(data.weights)!r}), out=Path({out!r}))
            """)
        )
        house = Path(__file__).resolve().parents[3]
        self.process = subprocess.Popen(
            [sys.executable, "command.py"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.fspath(house), "RETORT_LINE_SECONDS": "0"},
        )
        self.lines: list[str] = []

    def until(self, text: str) -> None:
        """Read what it says until ``text`` comes."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if text in line:
                return
        raise AssertionError(f"{text!r} never came:\n{''.join(self.lines)}")

    def workers(self) -> list[psutil.Process]:
        """Ray's processes that train."""
        return descendants(self.process.pid, "RayTrainWorker")

    def finish(self) -> int:
        assert self.process.stderr is not None
        self.lines += self.process.stderr.readlines()
        return self.process.wait()


@pytest.fixture
def longer(params: DistillParams) -> DistillParams:
    train = params.teacher.train.model_copy(update={"epochs": 8}).model_dump()
    return DistillParams.model_validate(of(params, teacher={"train": train}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.claim),
        signal.SIGTERM,
        pytest.param(signal.SIGKILL, marks=pytest.mark.claim),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_weights(
    data: SimpleNamespace, longer: DistillParams, stop: signal.Signals
) -> None:
    whole = run_finetune(longer, data, Path("whole"))
    command = Command(longer, data, "out")
    command.until("epoch 3:")
    children = psutil.Process(command.process.pid).children(recursive=True)
    command.process.send_signal(stop)
    assert command.finish() != 0
    # left alone, Ray's agents try for a minute to tell a server that is gone too
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert gone
    assert not alive, "no process of Ray is left behind"
    assert not Path("out/model.safetensors").exists()

    command = Command(longer, data, "out")
    assert command.finish() == 0, "".join(command.lines)
    assert any("an earlier run was interrupted; going on" in line for line in command.lines)
    assert sha256_file(Path("out/model.safetensors")) == whole
    assert Path("out/history.csv").read_bytes() == Path("whole/history.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.claim
def test_a_pod_that_is_killed_is_gone_on_with_by_another(
    data: SimpleNamespace, longer: DistillParams, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing is left of the first but what it kept elsewhere."""
    whole = run_finetune(longer, data, Path("whole"))
    monkeypatch.setenv("RETORT_SHARED", str(tmp_path / "volume"))
    often = "from components.training import kept; kept.EVERY_SECONDS, kept.SHARE = 0.1, 1"
    monkeypatch.setenv("RETORT_STATE", "first")
    command = Command(longer, data, "out", often)
    command.until("epoch 4:")
    command.process.send_signal(signal.SIGKILL)
    assert command.finish() == -signal.SIGKILL
    assert list((tmp_path / "volume/state/checkpoints").glob("*/rescued.pt"))

    monkeypatch.setenv("RETORT_STATE", "second")
    command = Command(longer, data, "out", often)
    assert command.finish() == 0, "".join(command.lines)
    assert any("going on from the last checkpoint that was kept" in line for line in command.lines)
    # earlier epochs are told again, of the history that was kept; none of them is trained
    assert any(re.search(r"\(phase 1, after epoch [3-7]\)", line) for line in command.lines), "".join(
        command.lines
    )
    assert sha256_file(Path("out/model.safetensors")) == whole
    assert not list((tmp_path / "volume/state/checkpoints").glob("*/rescued.pt")), "it is not needed any more"


@pytest.mark.slow
@pytest.mark.claim
def test_a_lost_worker_is_replaced(data: SimpleNamespace, longer: DistillParams) -> None:
    whole = run_finetune(longer, data, Path("whole"))
    command = Command(longer, data, "out")
    command.until("epoch 4:")  # by then Ray knows of an earlier epoch's checkpoint
    workers = command.workers()
    assert len(workers) == 2
    workers[1].kill()
    assert command.finish() == 0, "".join(command.lines)
    assert any("a worker was lost; going on" in line for line in command.lines), "".join(command.lines)
    assert sha256_file(Path("out/model.safetensors")) == whole

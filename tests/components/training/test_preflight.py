"""What can be known to be wrong before training starts."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from components.audit.plan_schema import read_plan
from components.common.errors import FindingsError
from components.common.findings import Finding
from components.models import build, cost
from components.models.params import Arch
from components.step import step
from components.training import driver, preflight
from components.training.augmentation import RECIPES
from components.training.machine import Machine
from components.training.params import DistillParams
from components.training.preflight import Fault, Needs
from components.training.spec import Phase

GB = 1_000_000_000
PLENTY = Machine(
    name="node", cores=16, host_cores=16, memory=64 * GB, memory_free=60 * GB, processes=None, files=65_536,
    shm_free=8 * GB, disk_free=500 * GB, ports=100, gpus=0, gpu_devices=0,
)  # fmt: skip
MODEST = Needs(
    workers=2, cpus_per_worker=1, gpus_per_worker=0, loaders=2, batch=32, fixed=3 * GB, per_image=50_000_000,
    shm=GB, disk=GB,
)  # fmt: skip


def judged(there: Machine, needed: Needs) -> list[Fault]:
    """Faults above the level of an info."""
    return [
        fault for fault in preflight.machine_faults(there, needed, "student") if fault.level != "info"
    ]  # fmt: skip


def test_a_machine_with_plenty_of_everything_has_no_fault() -> None:
    assert judged(PLENTY, MODEST) == []
    assert judged(replace(PLENTY, gpus=2, gpu_devices=2), replace(MODEST, gpus_per_worker=1)) == []


@pytest.mark.parametrize(
    ("there", "needed", "rule", "level", "measured", "limit", "said"),
    [
        ({"shm_free": 64_000_000}, {}, "shm", "error", 64_000_000, GB, "--shm-size=8g"),
        ({"memory_free": 4 * GB}, {}, "memory", "warning", 4 * GB, 6_200_000_000,
         "student.train.batch_size to 10 or lower"),
        ({"memory": 5 * GB, "memory_free": 2 * GB}, {}, "memory", "error", 2 * GB, 6_200_000_000,
         "ray.workers lower"),
        ({"cores": 2}, {"workers": 4, "loaders": 0}, "cores", "warning", 2, 4,
         "Set ray.workers to 2, or ray.cpus_per_worker to 0.5"),
        ({"cores": 8}, {"loaders": 8}, "cores", "warning", 8, 16, "student.train.num_workers"),
        ({"processes": 300}, {}, "processes", "error", 300, 442, "--pids-limit"),
        ({"files": 128}, {}, "processes", "error", 128, 276, "ulimit -n"),
        ({"gpus": 1, "gpu_devices": 1}, {"gpus_per_worker": 1}, "gpus", "error", 1, 2, "ray.workers to 1"),
        ({}, {"gpus_per_worker": 1}, "gpus", "error", 0, 2, "ray.gpus_per_worker to 0"),
        ({"gpu_devices": 2, "no_cuda": "the driver does not answer"}, {"gpus_per_worker": 1}, "gpus", "error",
         0, 2, "Install the driver"),
        ({"gpu_devices": 1, "no_cuda": "this PyTorch is built without CUDA"}, {}, "gpus", "warning", 0, 1,
         "a PyTorch for the driver"),
        ({"gpus": 2, "gpu_devices": 2}, {}, "gpus", "warning", 2, 0, "ray.gpus_per_worker to 1"),
        ({"ports": 3}, {}, "ports", "error", 3, 22, "ip_local_port_range"),
    ],
)  # fmt: skip
def test_what_a_machine_lacks_is_named(
    there: dict[str, int], needed: dict[str, int], rule: str, level: str, measured: int, limit: int, said: str
) -> None:
    (fault,) = judged(replace(PLENTY, **there), replace(MODEST, **needed))
    assert (fault.rule, fault.level) == (f"preflight.{rule}", level)
    assert (fault.measured, fault.limit) == (measured, limit)
    assert said in fault.advice
    assert fault.message


def test_a_quota_is_told_from_a_small_machine() -> None:
    (fault,) = judged(replace(PLENTY, cores=1, host_cores=64), replace(MODEST, loaders=0))
    assert "this machine has 1 (of 64: affinity or a container's quota" in fault.message
    (fault,) = preflight.gpu_faults(
        replace(PLENTY, gpu_devices=1, no_cuda="the driver does not answer"),
        replace(MODEST, gpus_per_worker=1),
    )
    assert "the driver does not answer" in fault.message


def test_gpus_that_a_person_hid_are_not_reported() -> None:
    hidden = replace(PLENTY, gpu_devices=1, no_cuda="CUDA_VISIBLE_DEVICES= hides them")
    assert judged(hidden, MODEST) == []


def test_memory_is_counted_by_layers_and_by_the_optimizer() -> None:
    """Rows of what was measured on this network (peak of a process, AdamW, without the imports): 2,918 MB."""
    arch = Arch(name="tf_efficientnet_lite0")
    module = cost.on_meta(lambda: build.create(arch, 10))
    size = 4 * sum(tensor.numel() for tensor in module.state_dict().values())
    job = SimpleNamespace(
        phases=(SimpleNamespace(net="teacher"),), size=224,
        optimizer=SimpleNamespace(name="adamw"),
        train=SimpleNamespace(num_workers=0, batch_size=32, ema=None),
        valid=SimpleNamespace(num_workers=0, batch_size=64),
        recipe=lambda phase: RECIPES["light"], largest=lambda: 224,
        optimizer_of=lambda phase: job.optimizer,
    )  # fmt: skip
    ray = SimpleNamespace(workers=1, cpus_per_worker=1, gpus_per_worker=0)
    needed = preflight.needs(job, ray, module)  # type: ignore[arg-type]
    network = needed.memory - preflight.RAY_BYTES - preflight.WORKER_BYTES
    assert network == pytest.approx(2_918e6, rel=1 / 3)
    assert needed.fixed - preflight.RAY_BYTES - preflight.WORKER_BYTES == 4 * size, (
        "itself, gradients, moments"
    )
    assert needed.disk == 3 * (1 + 2 + 2) * size, (
        "its best epoch and itself twice, two moments; three checkpoints"
    )
    job.optimizer.name = "sgd"
    assert preflight.needs(job, ray, module).disk == 3 * 4 * size  # type: ignore[arg-type]


def test_trainings_side_by_side_need_memory_for_each(
    data: SimpleNamespace, params: DistillParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = driver.make_spec(
        params, params.student, params.ray, params.data, data.manifest, read_plan(data.plan), None,
        (Phase("finetune", "student", 1, params.student.lr),),
    )  # fmt: skip
    monkeypatch.setattr(
        "components.training.machine.look", lambda *_: replace(PLENTY, memory=GB, memory_free=GB)
    )
    with step("tune", params, Path("out")) as run:
        preflight.check_memory(run, spec, params.ray.model_copy(update={"address": "auto"}), "student")
        assert not run.report.findings, "each node is looked at by itself"
    with pytest.raises(FindingsError, match=r"preflight\.memory"), step("tune", params, Path("out")) as run:
        preflight.check_memory(run, spec, params.ray, "student")


def test_too_small_a_disk() -> None:
    assert not list(preflight.disk_faults(PLENTY, GB, ".retort"))
    (fault,) = preflight.disk_faults(replace(PLENTY, disk_free=GB // 2), GB, ".retort")
    assert (fault.rule, fault.level, fault.measured, fault.limit) == (
        "preflight.disk", "error", GB // 2, GB,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "batch", "workers", "norms", "said"),
    [
        (100, 1, 2, True, "student.train.batch_size to 8"),
        (100, 1, 2, False, None),
        (100, 2, 2, True, None),
        (3, 8, 2, True, "ray.workers to 1"),
    ],
)
def test_a_batch_of_one(rows: int, batch: int, workers: int, norms: bool, said: str | None) -> None:
    faults = list(preflight.batch_faults(rows, batch, workers, norms, "student"))
    assert [fault.level for fault in faults] == ["error"] * (said is not None)
    if said:
        assert said in faults[0].advice


def test_a_class_with_a_single_image_is_named() -> None:
    names = ("cat", "dog", "eel", "fox")
    train, val = np.array([0, 0, 0, 1, -1, 3, 3]), np.array([0, 1, 2, 3])
    single, none = preflight.class_faults(train, val, names)
    assert single.subject == "class 'dog'"
    assert "'dog': has a single training image" in single.message
    assert "'eel': has no training image" in none.message
    assert not list(preflight.class_faults(np.array([0, 0, 1, 1]), np.array([0, 1]), names[:2]))
    many = tuple(str(label) for label in range(100))
    (fault,) = preflight.class_faults(np.arange(100), np.arange(100), many)
    assert fault.message.startswith("each of '0', '1', '2', '3', '4' and 95 more has a single")
    assert fault.measured == 100


def findings(
    data: SimpleNamespace, params: DistillParams, start: Path | None, **net: object
) -> dict[str, Finding]:
    teacher = type(params.teacher).model_validate({**params.teacher.model_dump(), **net})
    job = driver.make_spec(
        params, teacher, params.ray, params.data, data.manifest, read_plan(data.plan), start,
        (Phase("finetune", "teacher", 1, teacher.lr),),
    )  # fmt: skip
    with step("finetune", params, Path("out")) as run:
        preflight.preflight(run, job, params.ray, "teacher")
        return {finding.rule: finding for finding in run.report.findings}


def test_a_transformer_without_pretraining_is_told_that_the_data_is_too_little(
    data: SimpleNamespace, params: DistillParams
) -> None:
    """Rows 4.2 to 4.5."""
    warned = findings(data, params, None, arch={"name": "test_vit"})["arch.vit_data"]
    assert (warned.level, warned.measured) == ("warning", 96)
    assert "teacher.weights" in warned.advice
    assert "augment: deit" in warned.advice


def test_warnings_are_said_before_the_training(
    data: SimpleNamespace, params: DistillParams, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("components.training.machine.look", lambda *_: replace(PLENTY, cores=1, host_cores=1))
    assert findings(data, params, None)["preflight.cores"].level == "warning"
    said = capsys.readouterr().err
    assert "2 Ray workers x 1 cores = 2, and this machine has 1" in said
    assert "Set ray.workers to 1, or ray.cpus_per_worker to 0.5." in said


def test_faults_stop_the_step_before_ray_starts(data: SimpleNamespace, params: DistillParams) -> None:
    with pytest.raises(FindingsError, match=r"preflight\.batch: a batch of one image"):
        findings(data, params, None, train={"epochs": 1, "batch_size": 1})
    found = findings(data, params, None, train={"epochs": 1, "batch_size": 2})
    assert not [rule for rule, one in found.items() if rule.startswith("preflight") and one.level == "error"]


@pytest.mark.parametrize(
    ("arch", "pretrained"), [("test_efficientnet", False), ("test_vit", True)], ids=["cnn", "pretrained"]
)
def test_others_are_not(data: SimpleNamespace, params: DistillParams, arch: str, pretrained: bool) -> None:
    start = data.weights / "teacher.safetensors" if pretrained else None
    assert "arch.vit_data" not in findings(data, params, start, arch={"name": arch})

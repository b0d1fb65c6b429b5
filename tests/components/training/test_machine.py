"""What a machine has, as the kernel's files say it: both versions of control groups, and those around."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil
import pytest

from components.training import machine


def write(folder: Path, **values: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{value}\n")


def test_the_tightest_group_around_us_limits_memory(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("0::/kubepods/pod1/container\n")
    write(root / "kubepods", memory_max="max")
    write(root / "kubepods/pod1", memory_max=4_000, memory_current=3_000)
    (root / "kubepods/pod1/memory.stat").write_text("anon 900\nactive_file 1200\ninactive_file 800\n")
    write(root / "kubepods/pod1/container", memory_max=9_000, memory_current=10)
    assert machine.cgroup_memory(root, own) == (4_000, 1_000), "what was read from files is given back"


def test_version_1_has_a_folder_for_memory_and_writes_no_limit_as_a_huge_one(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("4:memory:/docker/abc\n3:cpuset:/\n")
    (root / "memory").mkdir(parents=True)
    (root / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert machine.cgroup_memory(root, own) == (None, 0)
    (root / "memory/memory.limit_in_bytes").write_text("500\n")  # as a container sees its own group
    (root / "memory/memory.usage_in_bytes").write_text("200\n")
    assert machine.cgroup_memory(root, own) == (500, 200)


def test_a_quota_of_processes(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("0::/pod\n8:pids:/other\n")
    assert machine.cgroup_processes(root, own) is None
    write(root / "pod", pids_max=1024, pids_current=1000)
    write(root / "pids/other", pids_max="max", pids_current=7)
    assert machine.cgroup_processes(root, own) == 24


def test_this_machine(tmp_path: Path) -> None:
    found = machine.look(tmp_path / "made", ports=3)
    assert 1 <= found.cores <= found.host_cores == os.cpu_count()
    assert 0 < found.memory_free <= found.memory <= psutil.virtual_memory().total
    assert found.name == socket.gethostname()
    assert found.ports == 3
    assert found.disk_free > 0
    assert machine.shm_free("/no/such/folder") is None
    assert (machine.shm_free("/") or 0) > 0


def test_ports_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.open_ports(5, host="192.0.2.1") == 0, "an address that is not ours (RFC 5737)"
    bound: list[int] = []

    def bind(self: socket.socket, address: object) -> None:
        if len(bound) == 2:
            raise OSError(98, "Address already in use")
        bound.append(1)

    monkeypatch.setattr(machine.socket.socket, "bind", bind)
    assert machine.open_ports(5) == 2


def test_gpus_that_are_hidden_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine._cuda() == (0, "CUDA_VISIBLE_DEVICES= hides them")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "does not answer" in machine._cuda()[1]
    monkeypatch.setattr("torch.version.cuda", None)
    assert machine._cuda() == (0, "this PyTorch is built without CUDA")

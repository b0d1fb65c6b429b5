"""What a machine has for training: cores, memory, processes, shared memory, disk, GPUs; as limits leave it.

Every number is read where the kernel, or the container, keeps it: in a pod the host's cores and memory are
not ours. The same function runs on any node of a cluster.
"""

from __future__ import annotations

import os
import resource
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from components.common.storage import free_bytes

CGROUPS = Path("/sys/fs/cgroup")
SHM = "/dev/shm"  # noqa: S108
UNLIMITED = 1 << 60  # cgroup v1 writes no limit as the largest number of pages


@dataclass(frozen=True)
class Machine:
    """Bytes and counts; None: nothing limits it, or it cannot be known here.

    Attributes:
        name: of the host.
        cores: that we may use, by affinity and quota; ``host_cores``: that there are.
        memory: bytes that we may ever have, RAM or the container's limit; ``memory_free``: left of them now.
        processes: processes and threads that may still be started; ``files``: that one process may open.
        shm_free, disk_free: bytes.
        ports: of as many as were asked for, those that could be listened on at one time.
        gpus: that PyTorch can use; ``gpu_devices``: that the driver shows.
        no_cuda: why PyTorch can use none.
    """

    name: str
    cores: int
    host_cores: int
    memory: int
    memory_free: int
    processes: int | None
    files: int | None
    shm_free: int | None
    disk_free: int
    ports: int
    gpus: int
    gpu_devices: int
    no_cuda: str = ""


def look(disk: Path, ports: int = 0) -> Machine:
    """Measure the machine that this runs on.

    Args:
        disk: a folder, made if missing, on the disk that counts.
        ports: how many to try to listen on at one time.
    """
    import joblib
    import psutil

    disk.mkdir(parents=True, exist_ok=True)
    memory = psutil.virtual_memory()
    limit, used = cgroup_memory()
    gpus, why = _cuda()
    return Machine(
        name=socket.gethostname(),
        cores=joblib.cpu_count(),  # by affinity, and by the quotas of both versions of cgroups
        host_cores=os.cpu_count() or 1,
        memory=min(memory.total, limit or memory.total),
        memory_free=min(memory.available, max(0, limit - used) if limit else memory.available),
        processes=_processes(),
        files=_soft(resource.RLIMIT_NOFILE),
        shm_free=shm_free(),
        disk_free=free_bytes(disk),
        ports=open_ports(ports),
        gpus=gpus,
        gpu_devices=len(list(Path("/dev").glob("nvidia[0-9]*"))),
        no_cuda=why,
    )


def shm_free(folder: str = SHM) -> int | None:
    """Bytes free in shared memory; None where there is no such folder."""
    try:
        stat = os.statvfs(folder)
    except OSError:
        return None
    return stat.f_bavail * stat.f_frsize


def cgroup_memory(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> tuple[int | None, int]:
    """The tightest memory limit of our control group and those around it, and what is used of it; bytes.

    What the kernel would give back under pressure (files that were read, the page cache) does not count as
    used. None: no limit.
    """
    tightest: tuple[int | None, int] = None, 0
    for limit_name, used_name, cache, folder in (
        ("memory.max", "memory.current", ("active_file", "inactive_file"), ""),
        (
            "memory.limit_in_bytes", "memory.usage_in_bytes",
            ("total_active_file", "total_inactive_file"), "memory",
        ),
    ):  # fmt: skip
        for place in _groups(root, own, folder):
            limit = _number(place / limit_name)
            if limit is None or (tightest[0] is not None and limit >= tightest[0]):
                continue
            stat = _lines(place / "memory.stat")
            given_back = sum(int(words[1]) for words in stat if len(words) == 2 and words[0] in cache)
            tightest = limit, max(0, (_number(place / used_name) or 0) - given_back)
    return tightest


def cgroup_processes(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Processes and threads that our control groups still allow; None: no limit."""
    left = [
        max(0, limit - (_number(place / "pids.current") or 0))
        for folder in ("", "pids")
        for place in _groups(root, own, folder)
        if (limit := _number(place / "pids.max")) is not None
    ]
    return min(left, default=None)


def open_ports(wanted: int, host: str = "") -> int:
    """On how many ports this process could listen at one time, of as many as wanted."""
    with ExitStack() as stack:
        for count in range(wanted):
            listener = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            try:
                listener.bind((host, 0))
                listener.listen(1)
            except OSError:
                return count
    return wanted


def _groups(root: Path, own: Path, folder: str) -> list[Path]:
    """Folders of the control group that this process is in, and of those around it.

    Args:
        folder: of the controller, in version 1; empty: version 2.
    """
    places = [root / folder]
    for words in (line.split(":", 2) for line in _text(own).splitlines()):
        if len(words) == 3 and (folder in words[1].split(",") if folder else words[0] == "0"):
            inside = root / folder / words[2].lstrip("/")
            places += [
                place for place in (inside, *inside.parents) if place.is_relative_to(root / folder)
            ]  # a container may see paths of the host's, which are not there
    return places


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _lines(path: Path) -> list[list[str]]:
    return [line.split() for line in _text(path).splitlines()]


def _number(path: Path) -> int | None:
    """A limit or a count; None where there is no file, or no limit."""
    text = _text(path).strip()
    return int(text) if text.isdigit() and int(text) < UNLIMITED else None


def _soft(what: int) -> int | None:
    soft = resource.getrlimit(what)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _processes() -> int | None:
    """By control groups and by ``ulimit -u``, which counts all threads of a user, and none of root's."""
    import psutil

    allowed = [cgroup_processes()]
    limit = _soft(resource.RLIMIT_NPROC)
    if limit is not None and os.getuid() != 0:
        running = 0
        for process in psutil.process_iter(["uids", "num_threads"]):
            uids = process.info["uids"]
            running += (process.info["num_threads"] or 0) if uids and uids.real == os.getuid() else 0
        allowed.append(max(0, limit - running))
    return min((one for one in allowed if one is not None), default=None)


def _cuda() -> tuple[int, str]:
    """GPUs that PyTorch can use, and why it can use none."""
    import torch

    count = torch.cuda.device_count()
    if count and torch.cuda.is_available():
        return count, ""
    if torch.version.cuda is None:
        return 0, "this PyTorch is built without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return 0, f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides them"
    return 0, f"the driver does not answer this PyTorch, which is built for CUDA {torch.version.cuda}"

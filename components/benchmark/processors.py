"""How many processors there are to measure on."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Processors:
    """How many processors this process may use, and what limits it."""

    count: float
    limit: str

    @property
    def threads(self) -> int:
        """Threads that can run at once: at least one."""
        return max(1, math.floor(self.count + 1e-6))


def processors(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Processors:
    """The smallest of the processors this process is bound to and the CPU quotas of its cgroups (v1 and v2).

    Thread pools look at the machine, not at the quota: more threads than the quota allows are stopped and
    started by the kernel, and what is measured is that.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    best = Processors(bound, "processors of this machine that the process may use")
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return best
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if controllers == "":
            places, quota = [cgroups, cgroups / "unified"], _quota_v2
        elif "cpu" in controllers.split(","):
            places, quota = [cgroups / "cpu", cgroups / controllers], _quota_v1
        else:
            continue
        for place in places:
            folder = place / inside.lstrip("/")
            # the quota of any ancestor holds too; in a container the path may not be visible: then the root
            for level in [folder, *folder.parents]:
                if place not in (level, *level.parents):
                    break
                allowed = quota(level)
                if allowed is not None and allowed < best.count:
                    best = Processors(allowed, "CPU quota of the container")
    return best


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
        period = int((folder / "cpu.cfs_period_us").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None

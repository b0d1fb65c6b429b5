"""Pods of the pipeline that are killed, cancelled, removed or cut off at random: what stays behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from components.training.kuberay import life, template
from tests.components.training.kuberay.cluster import Cluster
from tests.components.training.kuberay.pods import SILENCE, component

REPO_ROOT = Path(__file__).resolve().parents[4]
ROUNDS = int(os.environ.get("RETORT_KILLS", "200"))
SEED = 16
AT_ONCE = 6
PATIENCE = 90.0  # seconds for anything to happen on a busy machine
FATES = (
    "retried",
    "retried late",
    "cancelled",
    "removed",
    "removed and retried",
    "api away",
    "api away and killed",
)
MODULES = ["tests.components.training.kuberay.pods", "kubernetes.client", "kubernetes.watch"]


@dataclass
class Round:
    """One pod of the pipeline, what befell it, and what was there afterwards."""

    number: int
    fate: str
    job: str
    starts: int = 0
    ended: bool = True
    came_back: bool | None = None


class Pods:
    """Processes that are the pipeline's pods."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(MODULES)

    def start(self, name: str, run: str) -> Any:
        self.cluster.add_pod(name)
        folder = self.folder / run
        folder.mkdir(exist_ok=True)
        process = self._context.Process(
            target=component, args=(self.cluster.url, str(folder), name, run), daemon=True
        )
        process.start()
        return process

    def kill(self, process: Any, number: signal.Signals) -> None:
        if process.is_alive():
            os.kill(process.pid, number)
        process.join(5.0)
        if process.is_alive():  # as a kubelet does
            process.kill()
            process.join()


def until(condition: Callable[[], Any]) -> bool:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def play(pods: Pods, number: int, usual: float) -> Round:
    """One round: everything random about it follows from its number."""
    chance, cluster, run = random.Random(f"{SEED}-{number}"), pods.cluster, f"run-{number}"
    one = Round(number, chance.choice(FATES), template.job_name(run, "finetune"))
    how = chance.choice((signal.SIGKILL, signal.SIGTERM))
    if one.fate in ("cancelled", "retried late"):  # else the work is done before anybody misses its owner
        cluster.endless.add(one.job)
    process = pods.start(f"pod-{number}", run)
    time.sleep(chance.uniform(0, 1.1 * usual))
    if one.fate.startswith("api away"):
        with AWAY:
            cluster.away = True
            time.sleep(chance.uniform(0, 0.5))
            if one.fate == "api away and killed":
                pods.kill(process, how)
            cluster.away = False
    else:
        pods.kill(process, how)
    if process.exitcode == 0 and one.fate != "api away":
        one.fate = f"{one.fate}, done before"
    elif one.fate.startswith("removed"):
        cluster.remove_pod(f"pod-{number}")
    elif one.fate != "api away":
        cluster.end_pod(f"pod-{number}")
    if one.fate == "retried late":
        time.sleep(chance.uniform(SILENCE, 1.5 * SILENCE))
        cluster.endless.discard(one.job)
    if one.fate in ("retried", "retried late", "removed and retried", "api away and killed"):
        process = pods.start(f"pod-{number}-again", run)
    if not one.fate.startswith(("cancelled", "removed")) or "retried" in one.fate:
        process.join(PATIENCE)
        left = pods.folder / run / "out" / "report.json"
        one.came_back = process.exitcode == 0 and json.loads(left.read_text())["kind"] == "ok"
    one.ended = until(lambda: one.job not in cluster.running() and all_ended(cluster, one.job))
    one.starts = cluster.trained.count(one.job)
    return one


AWAY = threading.Lock()  # the API is one for all


def all_ended(cluster: Cluster, name: str) -> bool:
    return all(life.ended(job) for job in cluster.jobs() if job["metadata"]["name"] == name)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_no_job_is_left_behind_and_no_healthy_one_is_lost(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some pods at once, and beside them a run that nothing befalls: it keeps its first job to the end."""
    monkeypatch.syspath_prepend(REPO_ROOT)  # where processes of these tests find them
    monkeypatch.setenv("PYTHONPATH", os.fspath(REPO_ROOT))
    pods = Pods(cluster, tmp_path)
    neighbour = template.job_name("neighbour", "finetune")
    cluster.endless.add(neighbour)
    beside = pods.start("neighbour", "neighbour")
    assert until(lambda: neighbour in cluster.running())
    began = time.monotonic()
    undisturbed = pods.start("undisturbed", "undisturbed")
    undisturbed.join(PATIENCE)
    assert undisturbed.exitcode == 0
    usual = time.monotonic() - began

    with ThreadPoolExecutor(AT_ONCE) as pool:
        rounds = list(pool.map(lambda number: play(pods, number, usual), range(ROUNDS)))

    said = Path(tmp_path / "rounds.txt")
    said.write_text("".join(f"{one}\n" for one in rounds))
    fates = Counter(one.fate for one in rounds)
    orphans = [one for one in rounds if not one.ended]
    assert not orphans, f"jobs that nobody owns still run: {orphans}"
    lost = [one for one in rounds if one.job in cluster.lost and not one.fate.startswith("removed")]
    assert not lost, f"a job was removed that somebody owned: {lost}"
    assert neighbour not in cluster.lost
    killed = {one.job for one in rounds if one.fate != "api away"}
    assert not set(cluster.silenced) - killed, "a job ended itself though its owner lived"
    starts = Counter(cluster.trained)
    for one in rounds:
        if one.fate.startswith("removed"):  # its job is, too; the next goes on from the checkpoint
            continue
        over = (cluster.silenced, cluster.lost, cluster.expired)
        reasons = sum(names.count(one.job) for names in over)
        assert starts[one.job] <= 1 + reasons, f"trained twice without a reason: {one}"
    failed = [one for one in rounds if one.came_back is False]
    assert not failed, f"a try that nothing befell did not bring its network back: {failed}"
    assert beside.is_alive()
    assert starts[neighbour] == 1
    assert neighbour in cluster.running()
    cluster.endless.clear()
    beside.join(PATIENCE)
    assert beside.exitcode == 0
    assert until(lambda: cluster.jobs() == []), "deletion rules remove what is over"
    silenced = len(cluster.silenced)
    assert silenced, "of those whose owner was gone for good, some were at work"
    print(f"\n{ROUNDS} rounds: {dict(fates)}; no orphan, no healthy job lost; {silenced} ended themselves")

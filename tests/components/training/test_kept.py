"""Checkpoints of a pod that trains by itself: a copy elsewhere, from which a new pod goes on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from components.common import shared
from components.common.errors import Terminated
from components.common.storage import remove, state_dir
from components.training import kept
from components.training.cluster import RESCUED, STATE


@pytest.fixture(autouse=True)
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETORT_STATE", "pod-1")
    monkeypatch.setenv("RETORT_SHARED", str(tmp_path / "volume"))
    monkeypatch.setattr(kept, "EVERY_SECONDS", 0.02)
    monkeypatch.setattr(kept, "SHARE", 0)
    shared._shared.cache_clear()
    return tmp_path / "volume"


def run_of() -> Path:
    return (state_dir("checkpoints") / "finetune-0123").resolve()


def save(folder: Path, epoch: int, whole: bool = True) -> None:
    """A checkpoint as Ray Train leaves it; the one before it is removed."""
    for old in folder.glob("checkpoint_*"):
        remove(old)
    path = folder / f"checkpoint_{epoch:06}" / STATE
    path.parent.mkdir(parents=True)
    torch.save({"epoch": epoch, "weights": torch.arange(10_000)}, path)
    if not whole:
        path.write_bytes(path.read_bytes()[:20_000])


def epoch(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["epoch"])


def copied(volume: Path) -> Path:
    return volume / "state/checkpoints/finetune-0123" / RESCUED


def wait_for(volume: Path, wanted: int) -> None:
    end = time.monotonic() + 60
    while not (copied(volume).exists() and epoch(copied(volume)) == wanted):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_new_pod_goes_on_from_the_last_checkpoint_that_was_copied(
    volume: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with pytest.raises(Terminated), kept.checkpoints(run_of(), STATE, RESCUED):
        save(run_of(), 1)
        wait_for(volume, 1)
        save(run_of(), 2)
        wait_for(volume, 2)
        save(run_of(), 3)
        raise Terminated
    assert epoch(copied(volume)) == 3, "the last one is sent when the pod is told to end"
    monkeypatch.setenv("RETORT_STATE", "pod-2")
    with kept.checkpoints(run_of(), STATE, RESCUED):
        assert epoch(run_of() / RESCUED) == 3
    assert "going on from the last checkpoint" in caplog.text
    assert not list(run_of().glob(".*")), "no link is left"


def test_a_checkpoint_that_is_still_written_is_no_checkpoint(volume: Path) -> None:
    with pytest.raises(Terminated), kept.checkpoints(run_of(), STATE, RESCUED):
        save(run_of(), 1, whole=False)
        time.sleep(0.2)
        raise Terminated
    assert not copied(volume).exists()


def test_a_copy_that_is_damaged_is_not_gone_on_with(volume: Path) -> None:
    copied(volume).parent.mkdir(parents=True)
    copied(volume).write_bytes(b"PK but no archive")
    with kept.checkpoints(run_of(), STATE, RESCUED):
        assert not (run_of() / RESCUED).exists()


def test_a_pod_that_has_its_own_goes_on_with_that(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "EVERY_SECONDS", 60.0)
    copied(volume).parent.mkdir(parents=True)
    save(volume, 1)
    (volume / "checkpoint_000001" / STATE).rename(copied(volume))
    save(run_of(), 5)
    with kept.checkpoints(run_of(), STATE, RESCUED):
        assert not (run_of() / RESCUED).exists()
    assert epoch(copied(volume)) == 1, "what came to its end sends nothing more"


def test_nothing_happens_where_nothing_is_shared(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RETORT_SHARED")
    with pytest.raises(Terminated), kept.checkpoints(run_of(), STATE, RESCUED):
        save(run_of(), 1)
        raise Terminated
    assert not volume.exists()


def test_soft_labels_are_exchanged_by_way_of_the_same_place(
    volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = state_dir("cache", "soft_labels") / "ab.partial/00000.npy"
    chunk.parent.mkdir()
    chunk.write_bytes(b"labels")
    kept.SharedExchange().publish(chunk)
    monkeypatch.setenv("RETORT_STATE", "pod-2")
    there = state_dir("cache", "soft_labels") / "ab.partial/00000.npy"
    assert kept.SharedExchange().fetch(there)
    assert there.read_bytes() == b"labels"
    assert not kept.SharedExchange().fetch(there.with_name("00001.npy"))

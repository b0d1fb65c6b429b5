"""Failures of workers: which are worth another try, and what is said of them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError

from components.common.errors import RetortError
from components.training import cluster
from components.training.params import Ray


def failure(error: Exception) -> dict[str, Any]:
    try:
        raise error
    except Exception as caught:  # noqa: BLE001
        return {"kind": "failed", **cluster.described(caught)}


def test_a_fault_in_data_or_code_is_not_tried_again(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(1000))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:500])
    try:
        np.load(tmp_path / "a.npy", mmap_mode="r")
    except ValueError as error:
        event = cluster.described(error)
    said = cluster.Failures().judge(event)
    assert len(said) == 1
    assert "ValueError: mmap length is greater than file size (tests/components/training" in said[0]
    assert "memory" not in said[0]


def test_what_may_pass_is_tried_again_and_not_twice() -> None:
    failures = cluster.Failures()
    assert failures.judge(failure(OSError(28, "No space left on device"))) == []
    assert failures.judge(failure(RuntimeError("another"))) == []
    (said,) = failures.judge(failure(OSError(28, "No space left on device")))
    assert "No space left on device" in said
    assert "it happened again" in said


def test_what_comes_of_a_lost_worker_is_no_fault_of_those_that_see_it() -> None:
    failures = cluster.Failures()
    gone = failure(
        RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    )
    assert failures.judge(gone) == failures.judge(gone) == failures.judge(gone) == []


class FailedError(Exception):  # as Ray's WorkerGroupError
    def __init__(self, *failures: Exception) -> None:
        super().__init__("Training failed due to worker errors:\nthe last line")
        self.worker_failures = dict(enumerate(failures))


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (FailedError(ActorDiedError()), True),
        (FailedError(RuntimeError("peer"), ActorDiedError()), True),
        (FailedError(RuntimeError("a shape is wrong")), False),
        (RuntimeError("no word of workers"), True),
    ],
)
def test_memory_is_advised_only_where_a_process_was_lost(error: Exception, memory: bool) -> None:
    said = cluster._why(error, Ray())
    assert "training failed 3 times (ray.max_failures: 2): " in said
    assert ("more memory" in said) == memory


def test_a_store_that_is_away_is_named() -> None:
    error = RuntimeError("OSError: When uploading part: AWS Error NETWORK_CONNECTION during PutObject")
    assert "the store of ray.storage (s3://bucket/run) was away" in cluster._why(
        error, Ray(storage="s3://bucket/run")
    )


def test_a_cluster_that_is_gone_is_one_line_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def gone(reference: object) -> None:
        raise ActorDiedError()

    monkeypatch.setattr(ray, "get", gone)
    mailbox = SimpleNamespace(take=SimpleNamespace(remote=lambda: None))
    with pytest.raises(RetortError, match=r"^the Ray cluster is gone \(") as told:
        cluster._taken(mailbox)
    assert "the same command goes on from the last checkpoint" in str(told.value).splitlines()[1]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("", "Ray did not start on this machine .* run the same command again"),
        ("auto", "Ray does not answer"),
    ],
)
def test_a_ray_that_does_not_start_is_said_with_the_way_out(
    address: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray raises a bare Exception when its node takes more than 30 seconds."""
    import ray

    def late(**options: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(RetortError, match=said), cluster.running(Ray(address=address)):
        pass


def write_checkpoint(folder: Path, name: str, epoch: int) -> Path:
    import torch

    path = folder / name / cluster.STATE
    path.parent.mkdir(parents=True)
    torch.save({"epoch": epoch, "weights": torch.arange(100_000)}, path)
    return path


def test_where_rays_list_was_cut_off_the_last_whole_checkpoint_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    write_checkpoint(tmp_path, "checkpoint_1", 1)
    write_checkpoint(tmp_path, "checkpoint_2", 2)
    torn = write_checkpoint(tmp_path, "checkpoint_3", 3)
    torn.write_bytes(torn.read_bytes()[:200_000])
    snapshot = tmp_path / "checkpoint_manager_snapshot.json"
    snapshot.write_text("{}")
    assert cluster._rescue(tmp_path) is None, "Ray finds them by itself"
    snapshot.write_text("")
    found = cluster._rescue(tmp_path)
    assert found is not None
    assert torch.load(found, weights_only=True)["epoch"] == 2
    assert not list(tmp_path.glob("checkpoint_*")), "and what Ray does not know is gone"
    assert cluster._rescue(tmp_path) == found, "also when it was interrupted before the next checkpoint"

    (tmp_path / cluster.RESCUED).unlink()
    snapshot.write_text("")
    assert cluster._rescue(tmp_path) is None
    assert "training starts over" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_known_by_what_writers_say_of_it() -> None:
    import pyarrow.fs
    import torch

    with pytest.raises((OSError, RuntimeError)) as by_torch:
        torch.save({"weights": torch.zeros(100_000)}, "/dev/full")
    with (
        pytest.raises(OSError, match="28") as by_arrow,
        pyarrow.fs.LocalFileSystem().open_append_stream("/dev/full") as stream,
    ):
        stream.write(bytes(1 << 20))
    for told in (by_torch, by_arrow):
        error = cluster._no_room("/some/folder", told.value)
        assert isinstance(error, RetortError)
        assert str(error).startswith("/some/folder: the disk is full")
    assert isinstance(cluster._no_room("/some/folder", ValueError("a bug")), ValueError)


def test_the_interface_of_an_address_is_found() -> None:
    assert cluster._interface("127.0.0.1") == "lo"
    assert cluster._interface("203.0.113.7") is None

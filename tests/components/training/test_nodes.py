"""What the nodes of a cluster say of themselves, judged; no cluster is needed for that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from components.common import links, object_store
from components.training import machine, node, nodes, remote
from components.training.params import Ray
from components.training.preflight import RAY_BYTES, Needs


def asked(
    tmp_path: Path, storage: object_store.Storage | None = None, images: tuple[str, ...] = ()
) -> node.Node:
    return node.look("10.0.0.7", node.Ask(storage, str(tmp_path), {}, images))


def rules(there: node.Node) -> list[str]:
    return [fault.rule for fault in nodes.node_faults(there)]


def test_this_machine_is_like_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETORT_NODE_CACHE", str(tmp_path / "node"))
    there = asked(tmp_path, remote.open_storage(str(tmp_path / "shared")), (__file__,))
    assert rules(there) == []
    assert there.name.endswith("(10.0.0.7)")
    assert not [path for path in (tmp_path / "shared").rglob("*") if path.is_file()]
    assert not [path for path in (tmp_path / "node").rglob("*") if path.is_file()]


def test_another_code_and_other_versions_are_named(tmp_path: Path) -> None:
    there = asked(tmp_path)
    assert rules(replace(there, code="0" * 64)) == ["preflight.code"]
    other = replace(there, versions={**there.versions, "torch": "1.0", "Python": "2.7"})
    (fault,) = nodes.node_faults(other)
    assert fault.rule == "preflight.versions"
    assert f"Python 2.7 (here {there.versions['Python']}), torch 1.0 (here {there.versions['torch']})" in (
        fault.message
    )


def test_the_codes_hash_follows_every_file(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "room/b.json").write_text("{}")
    first = links.code_hash(tmp_path)
    (tmp_path / "a.pyc").write_text("not code")
    assert links.code_hash(tmp_path) == first
    (tmp_path / "room/b.json").write_text("[]")
    second = links.code_hash(tmp_path)
    (tmp_path / "room/b.json").rename(tmp_path / "room/c.json")
    assert len({first, second, links.code_hash(tmp_path)}) == 3
    assert links.code_hash() == links.code_hash()


def test_what_a_node_cannot_reach_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETORT_NODE_CACHE", str(tmp_path / "node"))
    (tmp_path / "file").write_text("no folder")
    there = asked(tmp_path, remote.open_storage(str(tmp_path / "file/below")), (str(tmp_path / "no.png"),))
    storage, images = nodes.node_faults(there)
    assert (storage.rule, images.rule) == ("preflight.storage", "preflight.images")
    assert f"ray.storage: {tmp_path}/file/below: " in storage.message
    assert f"{tmp_path}/no.png: No such file" in images.message
    assert "s3://bucket/prefix as data.source" in images.advice


def test_images_of_a_manifest_are_sampled(data: SimpleNamespace) -> None:
    assert nodes.sample(data.manifest, data.root) == tuple(f"{data.root}/{path}" for path in data.paths[:4])


@pytest.mark.parametrize(
    ("ray", "found"),
    [
        ({"workers": 4}, []),
        ({"workers": 5}, ["5 workers x 1 cores = 5, and the cluster has 4: Ray would wait for ever"]),
        ({"workers": 2, "cpus_per_worker": 2}, []),
        ({"workers": 2, "cpus_per_worker": 3}, ["2 workers x 3 cores = 6, and the cluster has 4"]),
        ({"workers": 8, "min_workers": 2}, []),
        ({"workers": 2, "gpus_per_worker": 1}, ["2 workers x 1 GPUs = 2, and the cluster has 1"]),
        ({"workers": 2, "gpus_per_worker": 0.5}, []),
    ],
)
def test_more_than_the_cluster_has_is_said_at_once(ray: dict[str, float], found: list[str]) -> None:
    faults = list(nodes.cluster_faults(4, 1, Ray.model_validate({"address": "auto", **ray})))
    assert [fault.rule for fault in faults] == ["preflight.resources"] * len(found)
    for fault, text in zip(faults, found, strict=True):
        assert text in fault.message
        assert "add nodes" in fault.advice


def test_a_node_with_a_part_of_the_workers_needs_a_part() -> None:
    needed = Needs(
        workers=4, cpus_per_worker=1, gpus_per_worker=0, loaders=2, batch=8,
        fixed=RAY_BYTES + 4_000, per_image=10, shm=400, disk=7,
    )  # fmt: skip
    one = nodes._on_one(needed, 1)
    assert (one.workers, one.fixed, one.shm, one.disk, one.ports) == (1, RAY_BYTES + 1_000, 100, 7, 3)
    assert one.memory - RAY_BYTES == (needed.memory - RAY_BYTES) / 4


def test_lost_and_new_nodes_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    watch = nodes.Watch(Ray(address="auto", workers=2))
    both = {"a": "first (10.0.0.1)", "b": "second (10.0.0.2)"}
    watch.tell(both, 2)
    assert capsys.readouterr().err == ""
    for _ in range(3):
        watch.tell({"a": both["a"]}, 1)
    said = capsys.readouterr().err
    assert said.count("node second (10.0.0.2) is lost") == 1
    assert said.count("room for 1 of 2 workers: training waits") == 1
    watch.tell({"a": both["a"], "c": "third (10.0.0.3)"}, 2)
    assert "third (10.0.0.3) has joined" in capsys.readouterr().err

    watch = nodes.Watch(Ray(address="auto", workers=2, min_workers=1))
    watch.tell(both, 2)
    watch.tell({"a": both["a"]}, 1)
    assert "waits" not in capsys.readouterr().err


def test_a_machine_is_looked_at_where_the_driver_has_no_folder(tmp_path: Path) -> None:
    there = node.look("10.0.0.7", node.Ask(None, str(tmp_path / "not/here"), {}, ()))
    assert isinstance(there.there, machine.Machine)
    assert not (tmp_path / "not").exists()


def test_without_a_storage_each_node_must_have_the_drivers_files(tmp_path: Path) -> None:
    (tmp_path / "clean.parquet").touch()
    there = node.look("10.0.0.7", node.Ask(None, str(tmp_path), {}, (), (str(tmp_path / "clean.parquet"),)))
    assert rules(there) == []
    bare = node.look("10.0.0.7", node.Ask(None, str(tmp_path), {}, (), (str(tmp_path / "other.parquet"),)))
    (fault,) = nodes.node_faults(bare)
    assert fault.rule == "preflight.storage"
    assert "other.parquet is not there: set ray.storage to a place" in fault.message

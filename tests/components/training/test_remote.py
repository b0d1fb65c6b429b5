"""The place that all nodes reach: a folder, and a real S3 server; a node's own cache of what lies there."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.common import object_store
from components.common.errors import RetortError
from components.common.storage import sha256_file
from components.dataset.params import S3
from components.training import remote
from tests.components.conftest import Store, no_other_keys
from tests.components.dropping import Dropping, first, some


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder and a node's cache of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETORT_STATE", str(tmp_path / ".retort"))
    monkeypatch.setenv("RETORT_NODE_CACHE", str(tmp_path / "node"))
    return tmp_path


@pytest.fixture(params=["folder", "s3"])
def storage(
    request: pytest.FixtureRequest, here: Path, monkeypatch: pytest.MonkeyPatch
) -> object_store.Storage:
    if request.param == "folder":
        return remote.open_storage(str(here / "shared"))
    no_other_keys(monkeypatch, here)
    store: Store = request.getfixturevalue("store")
    storage = remote.open_storage("s3://photos/some/run/", S3(endpoint_url=store.url, region="us-east-1"))
    storage.remove("")
    return storage


def write(path: Path, content: bytes = b"content") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_what_was_put_is_there_under_its_name(storage: object_store.Storage, here: Path) -> None:
    file = write(here / "a file", bytes(range(256)) * 50_000)
    assert not storage.exists("labels/a")
    storage.put(file, "labels/a")
    storage.put(write(here / "b"), "labels/part/b")
    storage.put(here / "b", "labelsnot/c")
    assert storage.exists("labels/a")
    assert not storage.exists("labels/")
    assert not storage.exists("label")
    assert list(storage.list("labels")) == ["labels/a", "labels/part/b"]
    assert list(storage.list("")) == ["labels/a", "labels/part/b", "labelsnot/c"]
    same = pickle.loads(pickle.dumps(storage))  # as a worker gets it
    same.get("labels/a", here / "back/a")
    assert (here / "back/a").read_bytes() == file.read_bytes()
    assert [path.name for path in (here / "back").iterdir()] == ["a"]
    storage.remove("labels")
    assert list(storage.list("")) == ["labelsnot/c"]
    storage.remove("labels")


def test_what_is_not_there_is_said(storage: object_store.Storage, here: Path) -> None:
    with pytest.raises(RetortError, match=r"ray\.storage: .*blobs/00 is not there") as told:
        storage.get("blobs/00", here / "back/a")
    assert "\n" not in str(told.value)
    assert not list((here / "back").iterdir())


def test_ray_train_writes_to_the_same_place(storage: object_store.Storage, here: Path) -> None:
    from pyarrow import fs

    place, system = storage.filesystem()
    system = pickle.loads(pickle.dumps(system)) or fs.LocalFileSystem()
    storage.put(write(here / "a"), "checkpoints/a")
    with system.open_input_stream(f"{place}/checkpoints/a") as stream:
        assert stream.read() == b"content"
    with system.open_output_stream(f"{place}/checkpoints/b") as stream:
        stream.write(b"other")
    assert list(storage.list("checkpoints")) == ["checkpoints/a", "checkpoints/b"]


@dataclass(frozen=True)
class Inner:
    teacher: Path
    parts: tuple[Path, ...]


@dataclass(frozen=True)
class Spec:
    manifest: Path
    start: Path | None
    labels: Path
    inner: Inner
    root: str = "images"
    more: tuple[tuple[str, int], ...] = (("a", 1),)


def make_spec(here: Path) -> Spec:
    write(here / "teacher/model.json", b"{}")
    write(here / "teacher/deep/model.safetensors", b"tensors")
    return Spec(
        write(here / "data/clean.parquet", b"rows"), None, here / ".retort/cache/soft_labels/abc",
        Inner(here / "teacher", (write(here / "plan.json"), write(here / "same.json"))),
    )  # fmt: skip


def test_a_specification_comes_to_a_node_without_the_drivers_files(
    storage: object_store.Storage, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(here)
    sent = remote.publish(storage, spec)
    assert str(here / "data") not in str(sent)
    assert (sent.root, sent.more, sent.start) == (spec.root, spec.more, None)
    assert len(list(storage.list("blobs"))) == 4, "the same content twice is one"
    assert f"blobs/{sha256_file(spec.manifest)}" in list(storage.list("blobs"))

    monkeypatch.setenv("RETORT_STATE", str(here / "node/state"))
    for path in (spec.manifest, spec.inner.teacher / "model.json"):
        path.unlink()
    got = remote.localized(storage, pickle.loads(pickle.dumps(sent)))
    assert got.manifest.read_bytes() == b"rows"
    assert got.manifest.name == "clean.parquet"
    assert (got.inner.teacher / "deep/model.safetensors").read_bytes() == b"tensors"
    assert [path.name for path in got.inner.parts] == ["plan.json", "same.json"]
    assert got.labels == here / "node/state/cache/soft_labels/abc", "each node makes it by itself"


def counted(storage: object_store.Storage, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that are fetched from now on."""
    fetched: list[str] = []
    get = type(storage).get

    def noted(self: Any, name: str, target: Path) -> None:
        fetched.append(name)
        get(self, name, target)

    monkeypatch.setattr(type(storage), "get", noted)
    return fetched


def test_a_node_fetches_once_and_again_what_is_damaged(
    storage: object_store.Storage, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = remote.put(storage, write(here / "weights.safetensors", b"x" * 1000))
    fetched = counted(storage, monkeypatch)
    path = remote.localize(storage, ref)
    assert remote.localize(storage, ref) == path
    assert len(fetched) == 1
    path.write_bytes(b"x" * 999 + b"y")
    assert remote.localize(storage, ref).read_bytes() == b"x" * 1000
    path.unlink()
    assert remote.localize(storage, ref).read_bytes() == b"x" * 1000
    assert len(fetched) == 3


def test_what_was_sent_is_not_sent_again(
    storage: object_store.Storage, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(here / "weights.safetensors")
    remote.put(storage, file)
    monkeypatch.setattr(type(storage), "put", lambda *_: pytest.fail("sent twice"))
    remote.put(storage, file)


def test_a_damaged_storage_is_named_and_nothing_is_kept(here: Path) -> None:
    storage = remote.open_storage(str(here / "shared"))
    ref = remote.put(storage, write(here / "weights.safetensors"))
    (blob,) = (here / "shared/blobs").iterdir()
    blob.write_bytes(b"CONTENT")
    with pytest.raises(RetortError, match=rf"{blob.name}: not what was put there \(weights\.safetensors"):
        remote.localize(storage, ref)
    assert not list((here / "node/inputs").glob("*/*"))


def fetch(storage: object_store.Storage, ref: remote.Ref, told: Any) -> None:
    get = type(storage).get

    def noted(self: Any, name: str, target: Path) -> None:
        told.put(name)
        get(self, name, target)

    type(storage).get = noted  # type: ignore[method-assign]
    assert remote.localize(storage, ref).stat().st_size == 5_000_000


def test_processes_of_a_node_share_what_one_fetched(here: Path) -> None:
    storage = remote.open_storage(str(here / "shared"))
    ref = remote.put(storage, write(here / "decoded.npy", b"x" * 5_000_000))
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    workers = [context.Process(target=fetch, args=(storage, ref, told)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    told.get()
    assert told.empty()


def test_connections_that_drop_are_tried_again(
    store: Store, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_other_keys(monkeypatch, here)
    store.put("dropping/blob", b"z" * 3_000_000)
    with Dropping(store.port, first(3, after=20_000)) as relay:
        storage = remote.open_storage("s3://photos/dropping", S3(endpoint_url=relay.url, region="us-east-1"))
        storage.get("blob", here / "blob")
    assert (here / "blob").read_bytes() == b"z" * 3_000_000
    assert relay.dropped == 3


def test_a_wire_that_drops_one_connection_in_twenty_loses_nothing(
    store: Store, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 MiB by boto3, and by Ray Train's file system; ``make bench`` takes 2 GiB."""
    no_other_keys(monkeypatch, here)
    source = write(here / "source", os.urandom(64 << 20))
    with Dropping(store.port, some(1 / 20, seed=1)) as relay:
        storage = remote.open_storage("s3://photos/wire", S3(endpoint_url=relay.url, region="us-east-1"))
        for number in range(4):  # some parts each
            storage.put(source, f"{number}")
            storage.get(f"{number}", here / "back")
            assert sha256_file(here / "back") == sha256_file(source)
            storage.remove("")
        path, system = storage.filesystem()
        with system.open_output_stream(f"{path}/arrow") as stream:
            stream.write(source.read_bytes())
        with system.open_input_stream(f"{path}/arrow") as stream:
            assert stream.read() == source.read_bytes()
        assert relay.dropped >= 3, f"of {relay.connections}"


def test_a_store_that_is_away_is_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_other_keys(monkeypatch, here)
    monkeypatch.setattr(object_store, "ATTEMPTS", 1)
    storage = remote.open_storage(
        "s3://photos/run", S3(endpoint_url="http://127.0.0.1:1", region="us-east-1")
    )
    for ask in (
        lambda: storage.exists("a"),
        lambda: storage.put(write(here / "a"), "a"),
        lambda: storage.get("a", here / "b"),
        lambda: list(storage.list("")),
    ):
        with pytest.raises(
            RetortError, match=r"s3://photos/run: the store at http://127\.0\.0\.1:1 cannot"
        ) as told:
            ask()
        assert "\n" not in str(told.value)


def test_what_the_store_refuses_is_said(store: Store, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_other_keys(monkeypatch, here)
    settings = S3(endpoint_url=store.url, region="us-east-1")
    with pytest.raises(RetortError, match="no such bucket as 'nothere'"):
        remote.open_storage("s3://nothere/x", settings).exists("a")
    write(here / "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    monkeypatch.setattr(object_store, "_clients", {})
    for ask in (lambda s: s.put(here / "a", "a"), lambda s: s.exists("a")):
        with pytest.raises(RetortError, match=r"the store refuses .* check the keys there"):
            ask(remote.open_storage("s3://photos/x", settings))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setattr(object_store, "_clients", {})
    with pytest.raises(RetortError, match="no keys found on"):
        remote.open_storage("s3://photos/x", settings).exists("a")


@pytest.mark.parametrize("uri", ["gs://bucket/x", "shared/folder", "s3://"])
def test_a_place_that_nodes_cannot_reach_is_refused(uri: str) -> None:
    with pytest.raises(RetortError, match="s3://"):
        remote.open_storage(uri)


def test_a_cache_of_somebody_else_is_not_used(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RETORT_NODE_CACHE")
    monkeypatch.setattr("tempfile.tempdir", str(here))
    assert remote.node_cache("a").is_dir()
    other = os.getuid() + 1
    monkeypatch.setattr("os.getuid", lambda: other)
    (here / f"retort-{other}").mkdir()
    with pytest.raises(RetortError, match="belongs to somebody else; set RETORT_NODE_CACHE"):
        remote.node_cache()


def test_a_connection_that_drops_in_the_middle_of_a_body_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from botocore.exceptions import IncompleteReadError

    drops = [3]

    class Body:
        def read(self) -> bytes:
            if drops[0]:
                drops[0] -= 1
                raise IncompleteReadError(actual_bytes=3, expected_bytes=7)
            return b"content"

    client = SimpleNamespace(get_object=lambda **_: {"Body": Body()})
    monkeypatch.setattr(object_store.S3Storage, "_client", client)
    storage = object_store.S3Storage("s3://photos/run", "http://127.0.0.1:1")
    assert storage.read("shards/0.tar", 0, 7) == b"content"
    drops[0] = 99
    with pytest.raises(RetortError, match=r"s3://photos/run/shards/0\.tar: the connection dropped 4 times"):
        storage.read("shards/0.tar", 0, 7)

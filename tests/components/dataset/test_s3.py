"""Images in a bucket: a real S3 server, a wire that breaks, and moto where thousands of keys are wanted."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from moto import mock_aws
from sklearn.datasets import load_digits

from components.common import object_store, shared
from components.common.errors import FindingsError, ImageError, RetortError
from components.dataset import inspection, s3
from components.dataset.images import read_bytes
from components.dataset.params import S3
from tests.components.conftest import KEY, SECRET, Store, no_other_keys
from tests.components.dataset.conftest import Steps, digit, encoded


@pytest.fixture(scope="module")
def store(store: Store) -> Store:
    """With images, and with what is none."""
    targets = load_digits().target
    for label in range(3):
        for number in np.flatnonzero(targets == label)[:20]:
            store.put(f"flowers/{'abc'[label]}/{number:02d}.png", encoded(digit(number)))
    store.put("flowers/a/with space+plus%20ü.png", encoded(digit(999)))
    store.put("flowers/notes.txt", b"not an image")
    for number in range(40):
        store.put(f"elsewhere/{('a b', 'a%20b')[number % 2]}/{number}.png", encoded(digit(number)))
    return store


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The keys come from the environment, the first place of the standard chain, and from nowhere else."""
    no_other_keys(monkeypatch, tmp_path)
    monkeypatch.setattr(object_store, "_clients", {})


def ingest(steps: Steps, url: str, source: str = "s3://photos/flowers") -> list[dict[str, Any]]:
    return steps.ingest(source, "images", s3={"endpoint_url": url})


def test_a_bucket_is_read_like_a_folder(store: Store, steps: Steps, photos: Path) -> None:
    rows = ingest(steps, store.url)
    local = {row["sha256"]: row for row in steps.ingest(str(photos), photos)}
    assert len(rows) == 61
    for row in rows:
        twin = local.get(row["sha256"])
        if twin is not None:
            same = ("class_name", "label", "split", "width", "height", "bytes", "phash")
            assert [row[name] for name in same] == [twin[name] for name in same]
    assert len(local.keys() & {row["sha256"] for row in rows}) == len(local)
    odd = next(row["path"] for row in rows if "space" in row["path"])
    assert odd == "s3://photos/flowers/a/with space+plus%2520%C3%BC.png"
    assert read_bytes("images", odd) == encoded(digit(999))


def test_prefixes_that_look_encoded_are_classes_of_their_own(store: Store, steps: Steps) -> None:
    rows = ingest(steps, store.url, "s3://photos/elsewhere")
    assert {row["class_name"] for row in rows} == {"a b", "a%20b"}


def test_validate_reads_the_same_bucket(store: Store, steps: Steps) -> None:
    ingest(steps, store.url)
    assert steps.validate("images", data={"root": "images", "s3": {"endpoint_url": store.url}}) == []
    assert steps.findings("validate") == {}


def test_an_object_that_went_away_is_quarantined_and_the_rest_goes_on(store: Store, steps: Steps) -> None:
    store.put("flowers/b/gone.png", encoded(digit(600)))
    ingest(steps, store.url)
    store.client.delete_object(Bucket="photos", Key="flowers/b/gone.png")
    s3.cached("s3://photos/flowers/b/gone.png").unlink()
    s3.cached("s3://photos/flowers/b/gone.png").with_suffix(".etag").unlink()
    (aside,) = steps.validate("images", data={"root": "images", "s3": {"endpoint_url": store.url}})
    assert aside["path"] == "s3://photos/flowers/b/gone.png"
    assert aside["reason"].startswith("image.unreadable: s3://photos/flowers/b/gone.png: no such object")


def test_a_bucket_that_is_missing_or_empty_below_the_prefix(store: Store, steps: Steps) -> None:
    with pytest.raises(RetortError, match=r"s3://nowhere: no such bucket; check data\.source"):
        ingest(steps, store.url, "s3://nowhere/flowers")
    with pytest.raises(RetortError, match="no image below this prefix"):
        ingest(steps, store.url, "s3://photos/flow")


def test_an_endpoint_that_is_no_url_is_named(steps: Steps) -> None:
    with pytest.raises(RetortError, match=r"data\.s3: Invalid endpoint: store; endpoint_url is a URL"):
        ingest(steps, "store")


def test_wrong_keys_are_refused_in_one_line(
    store: Store, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(RetortError, match=r"s3://photos: the store refuses .*check the keys"):
        ingest(steps, store.url)


def test_keys_come_from_the_standard_chain_and_are_written_nowhere(
    store: Store, steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(RetortError, match="no keys found; set AWS_ACCESS_KEY_ID"):
        ingest(steps, store.url)
    file = tmp_path / "credentials"
    file.write_text(f"[lab]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    object_store._clients.clear()
    assert len(ingest(steps, store.url)) == 61
    file.unlink()
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


class Wire(socketserver.ThreadingTCPServer):
    """Hands bytes on to a store; cuts the answers to object requests as it is told."""

    daemon_threads = True

    def __init__(self, target: int) -> None:
        self.target = target
        self.asked: list[str] = []  # objects, in the order of their requests
        self.cut: set[int] = set()  # which of them get half an answer
        self.dies_after = 10**9  # so many objects; then every connection is closed
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Link)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Link(socketserver.BaseRequestHandler):
    """One connection: a request a turn; none of them has a body."""

    def handle(self) -> None:
        wire = self.server
        assert isinstance(wire, Wire)
        while request := self._head(self.request):
            target = request.split(b" ")[1].decode()
            number = -1
            with wire.lock:
                if len(wire.asked) >= wire.dies_after:
                    return
                if target.startswith("/photos/"):
                    number = len(wire.asked)
                    wire.asked.append(target)
            with socket.create_connection(("127.0.0.1", wire.target)) as store:
                store.sendall(request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
                answer = b"".join(iter(lambda: store.recv(65536), b""))
            if number in wire.cut:
                self.request.sendall(answer[: len(answer) - 40])
                return
            self.request.sendall(answer)
            return

    @staticmethod
    def _head(connection: socket.socket) -> bytes:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            got = connection.recv(65536)
            if not got:
                return b""
            head += got
        return head


@pytest.fixture
def wire(store: Store) -> Iterator[Wire]:
    with Wire(store.port) as server:
        yield server
        server.shutdown()


def test_answers_that_break_off_are_asked_for_again(store: Store, steps: Steps, wire: Wire) -> None:
    wire.cut = {0, 1, 7, 30}
    assert [row["sha256"] for row in ingest(steps, wire.url)] == [
        row["sha256"] for row in ingest(steps, store.url)
    ]
    assert len(wire.asked) == 61 + len(wire.cut)


def test_a_store_that_dies_half_way_is_named_and_the_next_run_goes_on(
    steps: Steps, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "ATTEMPTS", 2)
    wire.dies_after = 25
    with pytest.raises(RetortError, match=r"s3://photos: cannot be reached at .* run again, it goes on"):
        ingest(steps, wire.url)
    assert not steps.manifest.exists()
    wire.dies_after = 10**9
    assert len(ingest(steps, wire.url)) == 61
    assert len(wire.asked) == 61, "nothing is fetched twice"


def test_only_what_changed_is_fetched_again(store: Store, steps: Steps, wire: Wire) -> None:
    ingest(steps, wire.url)
    wire.asked.clear()
    store.put("flowers/c/new.png", encoded(digit(700)))
    store.put("flowers/a/00.png", encoded(digit(701)))
    try:
        rows = ingest(steps, wire.url)
    finally:
        store.put("flowers/a/00.png", encoded(digit(0)))
        store.client.delete_object(Bucket="photos", Key="flowers/c/new.png")
    assert sorted(wire.asked) == ["/photos/flowers/a/00.png", "/photos/flowers/c/new.png"]
    assert len(rows) == 62


def test_thousands_of_keys_come_page_by_page() -> None:
    with mock_aws():
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="many")
        for number in range(2_300):
            client.put_object(Bucket="many", Key=f"a/{number:05d}.png", Body=b"")
        client.put_object(Bucket="many", Key="ab/no.png", Body=b"")
        client.put_object(Bucket="many", Key="a/folder/", Body=b"")
        s3.remember_store("many", S3(region="us-east-1"))
        assert [item.key for item in s3.listing("s3://many/a")] == [f"a/{n:05d}.png" for n in range(2_300)]
        with pytest.raises(ImageError, match=r"s3://many/a/none\.png: no such object"):
            s3.read("s3://many/a/none.png")


@pytest.mark.parametrize("uri", ["s3://", "http://photos/a", "s3:///a"])
def test_what_is_no_uri_of_a_bucket_is_refused(uri: str) -> None:
    with pytest.raises(RetortError, match="only s3://bucket/key"):
        object_store.split(uri)


@pytest.mark.parametrize("key", ["a/b.png", "a b+c.png", "ü/%41?.png", "a#b&c=d.png", "a\nb.png"])
def test_a_key_survives_its_uri(key: str) -> None:
    assert object_store.split(object_store.join("photos", key)) == ("photos", key)


def test_a_list_of_keys_that_are_not_there_stops_before_all_are_tried(store: Store, steps: Steps) -> None:
    lines = [f"s3://photos/flower/{'abc'[number % 3]}/{number:02d}.png {number % 3}" for number in range(90)]
    Path("images").mkdir()
    Path("list.txt").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(FindingsError, match=r"64 of 64 images .* such as s3://photos/flower/a/00.png"):
        ingest(steps, store.url, "list.txt")


class Pod:
    """Each of its steps has an empty disk, as in Kubernetes; all of them share one prefix."""

    def __init__(self, patch: pytest.MonkeyPatch, store: Store, prefix: str) -> None:
        self._patch, self._count = patch, 0
        patch.setenv("AWS_ENDPOINT_URL_S3", store.url)
        patch.setenv("RETORT_SHARED", f"s3://photos/{prefix}")
        shared._shared.cache_clear()

    def new(self) -> None:
        self._count += 1
        self._patch.setenv("RETORT_STATE", f"disk-{self._count}")


@pytest.mark.parametrize("thumbnails", [False, True])
def test_a_second_run_in_new_pods_fetches_no_image_that_is_known(
    store: Store, steps: Steps, wire: Wire, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, thumbnails: bool
) -> None:
    pod = Pod(monkeypatch, store, f"state/{tmp_path.name}")
    sections = {
        "data": {"root": "images", "s3": {"endpoint_url": wire.url}},
        "report": {"thumbnails": thumbnails},
    }

    def whole_run() -> tuple[list[dict[str, Any]], int, list[dict[str, Any]], int]:
        wire.asked.clear()
        pod.new()
        rows = ingest(steps, wire.url)
        by_ingest = len(wire.asked)
        pod.new()
        steps.validate("images", **sections)
        return rows, by_ingest, steps.rows(steps.clean), len(wire.asked) - by_ingest

    rows, by_ingest, clean, by_validate = whole_run()
    assert by_ingest == 61
    again, by_second_ingest, clean_again, by_second_validate = whole_run()
    assert (again, clean_again) == (rows, clean)
    assert by_second_ingest == 0
    assert by_second_validate == by_validate, "only what the report shows"
    assert by_validate == 0 if not thumbnails else 0 < by_validate < 61


def test_an_image_that_changed_is_fetched_in_spite_of_what_others_know(
    store: Store, steps: Steps, wire: Wire, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pod = Pod(monkeypatch, store, f"state/{tmp_path.name}")
    pod.new()
    ingest(steps, wire.url)
    store.put("flowers/a/00.png", encoded(digit(701)))
    try:
        pod.new()
        (aside,) = steps.validate(
            "images", data={"root": "images", "s3": {"endpoint_url": wire.url}}, report={"thumbnails": False}
        )
        assert aside["reason"].startswith("image.changed: ")
        wire.asked.clear()
        pod.new()
        ingest(steps, wire.url)
        assert wire.asked == [], "validate has told what it is now"
    finally:
        store.put("flowers/a/00.png", encoded(digit(0)))


def test_a_pod_that_is_killed_leaves_what_it_has_described(
    store: Store, steps: Steps, wire: Wire, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pod = Pod(monkeypatch, store, f"state/{tmp_path.name}")
    pod.new()
    monkeypatch.setattr(inspection, "STORED_AT_ONCE", 10)
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(steps, wire.url))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    before = len(wire.asked)
    assert before >= 30
    pod.new()
    assert len(ingest(steps, wire.url)) == 61
    assert len(wire.asked) - before <= 61 - 20, "two portions were kept at least"


def _killed(steps: Steps, url: str) -> None:
    """Ingest, until SIGKILL comes after some portions."""
    portions = []
    store = inspection._store

    def counted(*arguments: Any) -> None:
        store(*arguments)
        portions.append(1)
        if len(portions) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    inspection._store = counted  # a process of its own
    ingest(steps, url)


def test_where_listing_is_forbidden_images_are_fetched_as_before(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(uri: str, after: str = "") -> Iterator[s3.Item]:
        raise RetortError(f"{uri}: the store refuses (AccessDenied); check the keys and their rights")
        yield

    monkeypatch.setattr(s3, "listing", refuse)
    assert s3.etags(["s3://photos/flowers/a/00.png"]) == {}


def test_etags_of_what_lies_together_come_from_one_listing(store: Store, wire: Wire) -> None:
    s3.remember_store("photos", S3(endpoint_url=wire.url, region="us-east-1"))
    uris = [
        f"s3://photos/flowers/{name}" for name in ("a/00.png", "b/01.png", "a/with space+plus%2520%C3%BC.png")
    ]
    found = s3.etags([*uris, "s3://photos/flowers/none.png"])
    assert sorted(found) == sorted(uris)
    assert wire.asked == []


def kept() -> set[str]:
    """The objects in the cache, as files."""
    return {path.name for path in Path(".retort/cache/s3").glob("??/*") if path.suffix != ".etag"}


@pytest.mark.parametrize("by", ["data.s3.cache_gb", "the pod's disk"])
def test_the_cache_holds_so_many_bytes_and_what_was_used_last(
    store: Store, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    limit = 100_000
    settings = {"endpoint_url": store.url, "region": "us-east-1"}
    if by == "data.s3.cache_gb":
        s3.remember_store("photos", S3(**settings, cache_gb=limit / 1e9))
    else:
        s3.remember_store("photos", S3(**settings))
        monkeypatch.setenv("RETORT_STATE_BYTES", str(int(limit / s3.IMAGES_SHARE)))
    monkeypatch.setattr(s3, "_since_look", {})
    uris = [f"s3://photos/large/{number:02}" for number in range(30)]
    for number, uri in enumerate(uris):
        store.put(f"large/{number:02}", bytes([number]) * 10_000)
        assert s3.read(uri) == bytes([number]) * 10_000
        assert s3.read(uris[0]) == bytes(10_000), "used again and again"
        moment = 1e9 + number
        os.utime(s3.cached(uri), (moment, moment))  # a clock that ticks
        assert sum(path.stat().st_size for path in Path(".retort/cache/s3").glob("??/*")) <= limit
    assert {s3.cached(uris[0]).name, s3.cached(uris[-1]).name} <= kept()
    assert 4 <= len(kept()) <= 10
    assert s3.read(uris[3]) == bytes([3]) * 10_000, "what was removed is fetched again"


def test_without_a_limit_nothing_is_removed(store: Store) -> None:
    s3.remember_store("photos", S3(endpoint_url=store.url, region="us-east-1"))
    there = list(s3.listing("s3://photos/flowers/a"))
    for item in there:
        s3.read(item.uri)
    assert len(kept()) == len(there) >= 20

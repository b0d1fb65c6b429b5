"""State that steps share: in a folder that all mount, in a real S3 server, and where nobody answers."""

from __future__ import annotations

import re
import socket
import sqlite3
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from components.common import object_store, shared
from components.common.errors import RetortError
from components.common.shared_rows import MANY, SharedRows
from tests.components.conftest import no_other_keys


@pytest.fixture(autouse=True)
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pod's own folder, with the store's keys; nothing is shared yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETORT_STATE", ".retort")
    monkeypatch.delenv("RETORT_SHARED", raising=False)
    no_other_keys(monkeypatch, tmp_path)
    monkeypatch.setattr(object_store, "_clients", {})
    shared._shared.cache_clear()
    return tmp_path


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, pod: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where state is shared: a folder, or a prefix of the test's own."""
    if request.param == "folder":
        uri = str(pod / "volume")
    else:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", request.getfixturevalue("store").url)
        uri = f"s3://photos/{pod.name}"
    monkeypatch.setenv("RETORT_SHARED", uri)
    return uri


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def another_pod(monkeypatch: pytest.MonkeyPatch, name: str = "other") -> Path:
    monkeypatch.setenv("RETORT_STATE", name)
    return Path(name)


def test_nothing_is_shared_without_the_variable(pod: Path) -> None:
    assert shared.place() is None
    file = write(Path(".retort/budgets/a.json"), "{}")
    assert not shared.keep(file)
    assert shared.bring(file), "it is here"
    assert not shared.bring(Path(".retort/budgets/b.json"))
    shared.drop(file)
    assert file.exists()
    assert shared.where(file) == str(file)
    assert [path.name for path in pod.iterdir()] == [".retort"]


def test_another_pod_has_what_one_has_kept(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared.keep(write(Path(".retort/budgets/a.json"), "2"))
    write(Path(".retort/cache/trained/k/model"), "weights")
    write(Path(".retort/cache/trained/k/deeper/é"), "")
    assert shared.keep(Path(".retort/cache/trained/k"))
    assert shared.where(Path(".retort/budgets/a.json")) == f"{place}/state/budgets/a.json"

    here = another_pod(monkeypatch)
    assert shared.bring(here / "budgets/a.json")
    assert (here / "budgets/a.json").read_text() == "2"
    assert shared.bring(here / "cache/trained/k", folder=True)
    assert (here / "cache/trained/k/model").read_text() == "weights"
    assert (here / "cache/trained/k/deeper/é").exists()
    assert not shared.bring(here / "budgets/none.json")
    assert not shared.bring(here / "cache/trained/none", folder=True)

    shared.drop(here / "budgets/a.json")
    shared.drop(here / "cache/trained/k")
    there = another_pod(monkeypatch, "third")
    assert not shared.bring(there / "budgets/a.json")
    assert not shared.bring(there / "cache/trained/k", folder=True)
    assert not any(there.rglob("*.tar")), "nothing half-fetched is left"


def test_what_is_here_is_not_fetched(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shared.keep(write(Path(".retort/a"), "of one"))
    here = another_pod(monkeypatch)
    write(here / "a", "of the other")
    assert shared.bring(here / "a")
    assert (here / "a").read_text() == "of the other"


def test_an_archive_that_is_damaged_is_not_used(
    place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage = shared.place().storage  # type: ignore[union-attr]
    storage.put(write(Path("bad"), "no archive"), "state/cache/trained/k.tar")
    assert not shared.bring(another_pod(monkeypatch) / "cache/trained/k", folder=True)
    assert "not what was kept" in caplog.text
    assert not Path("other/cache/trained/k").exists()


def cache(name: str) -> sqlite3.Connection:
    found = sqlite3.connect(name)
    with found:
        found.execute("create table if not exists images (key text primary key, size, look)")
    return found


ROWS = SharedRows("images-1/bucket", "images", ("key", "size", "look"))


def content(of: sqlite3.Connection) -> list[tuple[object, ...]]:
    return sorted(of.execute("select key, size, look from images"))


def test_rows_of_pods_that_write_at_once_are_all_there(place: str) -> None:
    pods = [threading.Thread(target=ROWS.push, args=([(f"k{n}", n, bytes([n]))],)) for n in range(8)]
    for pod in pods:
        pod.start()
    for pod in pods:
        pod.join()
    with closing(cache("one.sqlite")) as one:
        ROWS.pull(one)
        assert content(one) == [(f"k{n}", n, bytes([n])) for n in range(8)]
        ROWS.push([("new", None, None)])
        ROWS.pull(one)
        assert content(one)[-1] == ("new", None, None)
        assert len(content(one)) == 9


def test_many_small_files_become_one_and_no_row_is_lost(place: str) -> None:
    for number in range(MANY + 2):
        ROWS.push([(f"k{number:03}", number, None)])
    storage = shared.place().storage  # type: ignore[union-attr]
    with closing(cache("one.sqlite")) as one, closing(cache("two.sqlite")) as two:
        ROWS.pull(one)
        assert [name.rpartition("/")[2].partition("-")[0] for name in storage.list("rows")] == [str(MANY + 2)]
        ROWS.push([("late", 1, None)])
        ROWS.pull(two)
        ROWS.pull(one)
        assert content(one) == content(two)
        assert len(content(one)) == MANY + 3


def test_a_file_of_rows_that_is_damaged_costs_its_rows_alone(place: str) -> None:
    ROWS.push([("good", 1, None)])
    storage = shared.place().storage  # type: ignore[union-attr]
    storage.put(write(Path("bad"), "no parquet"), "rows/images-1/bucket/1-bad.parquet")
    with closing(cache("one.sqlite")) as one:
        ROWS.pull(one)
        assert content(one) == [("good", 1, None)]


def test_a_name_is_taken_once_and_its_age_is_known(place: str) -> None:
    storage = shared.place().storage  # type: ignore[union-attr]
    assert storage.age("claim") is None
    assert shared.create_text(storage, "one", "claim")
    assert not shared.create_text(storage, "two", "claim")
    assert shared.read_text(storage, "claim") == "one"
    age = storage.age("claim")
    assert age is not None
    assert -2 < age < 60
    storage.discard("claim")
    storage.discard("claim")
    assert storage.age("claim") is None
    with pytest.raises(object_store.MissingError):
        storage.get("claim", Path("claim"))


class Refusing(BaseHTTPRequestHandler):
    """Answers every request of a store with one status."""

    protocol_version = "HTTP/1.1"

    def _refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, code = self.server.answer  # type: ignore[attr-defined]
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode() if code else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _refuse  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((507, ""), "the store has no room left"),
        ((403, "QuotaExceeded"), "the store has no room left"),
        ((403, "AccessDenied"), "the store refuses .* check the keys there"),
        ((404, "NoSuchBucket"), "no such bucket as 'photos'"),
    ],
)
def test_a_store_that_refuses_is_said_once_and_the_work_goes_on(
    answer: tuple[int, str], said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(object_store, "HASTY_ATTEMPTS", 1)
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        server.answer = answer  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("RETORT_SHARED", "s3://photos/run")
        assert not shared.keep(write(Path(".retort/budgets/a.json"), "{}"))
        assert not shared.bring(Path(".retort/budgets/b.json"))
        ROWS.push([("k", 1, None)])
        server.shutdown()
    err = caplog.text
    assert err.count("this step goes on without it") == 1
    assert re.search(f"kubeflow.state: s3://photos/run: {said}", err), err


def test_a_store_that_is_away_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(object_store, "HASTY_ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    monkeypatch.setenv("RETORT_SHARED", "s3://photos/run")
    asked: list[str] = []
    original = object_store.S3Storage.put

    def counted(self: object_store.S3Storage, path: Path, name: str) -> None:
        asked.append(name)
        original(self, path, name)

    monkeypatch.setattr(object_store.S3Storage, "put", counted)
    file = write(Path(".retort/a"), "")
    assert [shared.keep(file) for _ in range(3)] == [False] * 3
    assert len(asked) == 1, "for a while nobody asks again"
    assert caplog.text.count("cannot be reached") == 1


def test_a_store_that_accepts_and_is_silent_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("RETORT_SHARED", "s3://photos/run")
        place = shared.place()
        assert place is not None
        assert place.attempt(lambda storage: storage.exists("a"), seconds=0.5) is None
    assert "kubeflow.state: s3://photos/run: no answer in 0.5 s" in caplog.text


def test_a_uri_that_is_none_is_said_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RETORT_SHARED", "gs://bucket")
    assert not shared.keep(write(Path(".retort/a"), ""))
    assert "kubeflow.state: 'gs://bucket': expected s3://bucket/prefix" in caplog.text


def test_our_own_mistakes_are_not_hidden(place: str) -> None:
    there = shared.place()
    assert there is not None
    with pytest.raises(ZeroDivisionError):
        there.attempt(lambda storage: 1 // 0)
    with pytest.raises(RetortError):
        there.storage.get("nothing", Path("x"))

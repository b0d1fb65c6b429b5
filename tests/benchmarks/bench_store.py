"""The object store over a bad wire: one connection in twenty is dropped, and every byte arrives.

By what the product sends and fetches with: boto3's transfers (inputs, soft labels, shards, state), and
pyarrow's file system (Ray Train's checkpoints).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from components.common.object_store import open_storage
from components.common.storage import human_bytes, sha256_file
from tests.benchmarks.measure import Row, at_most
from tests.components.conftest import Store, no_other_keys
from tests.components.dropping import Dropping, some

SIZE = 2 << 30
SHARE = 1 / 20
PORTION = 16 << 20


def measure(seeds: int) -> list[Row]:
    """``seeds`` changes nothing here: the wire's is fixed."""
    with tempfile.TemporaryDirectory(prefix="retort-bench-") as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        no_other_keys(patch, folder)
        (folder / "weed").mkdir()
        store = Store(folder / "weed", "-volume.max=0", "-master.volumeSizeLimitMB=1024")
        try:
            return _over_a_bad_wire(store, folder)
        finally:
            store.stop()


def _over_a_bad_wire(store: Store, folder: Path) -> list[Row]:
    source = folder / "source"
    with source.open("wb") as file:
        for _ in range(SIZE // PORTION):
            file.write(os.urandom(PORTION))
    wanted = sha256_file(source)
    rows = []
    with Dropping(store.port, some(SHARE)) as relay:
        storage = open_storage("s3://photos/bench", relay.url, "us-east-1")

        def by_pyarrow(push: bool) -> None:
            path, system = storage.filesystem()
            if push:
                with source.open("rb") as read, system.open_output_stream(f"{path}/arrow") as write:
                    while part := read.read(PORTION):
                        write.write(part)
            else:
                with (
                    system.open_input_stream(f"{path}/arrow") as read,
                    (folder / "arrow").open("wb") as write,
                ):
                    while part := read.read(PORTION):
                        write.write(part)

        ways: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
            "boto3": (lambda: storage.put(source, "boto3"), lambda: storage.get("boto3", folder / "boto3")),
            "arrow": (lambda: by_pyarrow(True), lambda: by_pyarrow(False)),
        }
        for way, (push, pull) in ways.items():
            connections, dropped = relay.connections, relay.dropped
            begun = time.monotonic()
            push()
            pushed = time.monotonic()
            pull()
            pulled = time.monotonic()
            wrong = int(sha256_file(folder / way) != wanted)
            (folder / way).unlink()
            note = (
                f"{relay.dropped - dropped} of {relay.connections - connections} connections dropped; "
                f"pushed in {pushed - begun:.0f} s, pulled in {pulled - pushed:.0f} s"
            )
            name = f"{way}: {human_bytes(SIZE)} pushed and pulled, wrong by checksum"
            rows.append(at_most(name, wrong, 0, "files", note))
    return rows

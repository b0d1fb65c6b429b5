"""What a node of a Ray cluster says of itself; run there, by the code that is to train there."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from uuid import uuid4

from components.common import object_store
from components.common.errors import RetortError
from components.common.links import code_hash
from components.training import machine, remote

ALIKE = ("ray", "torch", "torchvision", "timm", "numpy")  # on all nodes, for one network to come of them


@dataclass(frozen=True)
class Ask:
    """What a node is asked.

    Attributes:
        state: the driver's ``.retort``, which is used where there is no storage.
        stores: settings of the stores that hold images, by bucket.
        images: places of some images that workers will read.
        files: of the driver, which workers will read where there is no storage.
    """

    storage: object_store.Storage | None
    state: str
    stores: dict[str, dict[str, str | None]]
    images: tuple[str, ...]
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Node:
    """A node's answer.

    Attributes:
        name: its host's, and the address by which Ray knows it.
        code: hash of our package there.
        versions: of Python, and of what training imports.
        there: what the machine has.
        storage: why it cannot use ``ray.storage``; empty: it can.
        unseen: why it cannot read an image that it was asked for; empty: it can.
    """

    name: str
    code: str
    versions: dict[str, str]
    there: machine.Machine
    storage: str
    unseen: str


def versions() -> dict[str, str]:
    """Public versions: PyTorch for CUDA and for CPUs alone are the same here."""
    found = {name: metadata.version(name).partition("+")[0] for name in ALIKE}
    return {"Python": ".".join(platform.python_version_tuple()[:2]), **found}


def look(address: str, ask: Ask) -> Node:
    """Run on a node: what it has, and what it can reach."""
    why = unseen = ""
    folder = Path(ask.state)
    if ask.storage is not None:
        try:
            folder = remote.node_cache()
            _probe(ask.storage, folder)
        except RetortError as error:
            why = str(error)
    elif missing := [name for name in ask.files if not Path(name).exists()]:
        why = (
            f"{missing[0]} is not there: set ray.storage to a place that all nodes reach (s3://bucket/run, "
            "or a folder that all of them mount)"
        )
    there = machine.look(folder if folder.is_dir() else Path("/"))
    try:
        for image in ask.images:
            _read(image, ask.stores)
    except RetortError as error:
        unseen = str(error)
    return Node(f"{there.name} ({address})", code_hash(), versions(), there, why, unseen)


def _read(image: str, stores: dict[str, dict[str, str | None]]) -> None:
    """Raise RetortError when an image cannot be read here."""
    if "://" not in image:
        try:
            with Path(image).open("rb") as file:
                file.read(1)
        except OSError as error:
            raise RetortError(f"{image}: {error.strerror}") from None
        return
    bucket, key = object_store.split(image)
    settings = stores.get(bucket, {})
    found = object_store.S3Storage(f"s3://{bucket}", settings.get("endpoint_url"), settings.get("region"))
    if not found.exists(key):
        raise RetortError(f"{image}: no such object")


def _probe(storage: object_store.Storage, folder: Path) -> None:
    """Write, read and remove something small."""
    name = f"probes/{uuid4().hex}"
    sent, back = folder / f"{uuid4().hex}.sent", folder / f"{uuid4().hex}.back"
    try:
        sent.write_bytes(name.encode())
        storage.put(sent, f"{name}/file")
        storage.get(f"{name}/file", back)
        if back.read_bytes() != sent.read_bytes():
            raise RetortError(f"ray.storage: {storage.uri}: gives back something else than was put there")
        storage.remove(name)
    finally:
        for path in (sent, back):
            path.unlink(missing_ok=True)

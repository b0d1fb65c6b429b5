"""Readers of weights files: numpy arrays by name, and nothing else. Reading executes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from components.common.errors import RetortError
from components.weights.readers import lodtensor, pdparams, pth, safetensors, tar
from components.weights.readers.stored import MAX_NAME, Stored, shown


def read(path: Path) -> Stored:
    """What a weights file (or a folder of variables) holds; its content says what it is, not its name.

    Raises:
        RetortError: one line that names the file and what is wrong with it.
    """
    stored = _reader(path)(path)
    for name in stored.tensors:
        if len(name) > MAX_NAME or any(sign in "\n\r\0" or "\ud800" <= sign <= "\udfff" for sign in name):
            raise RetortError(f"{path}: a tensor is called {shown(name)}, which is no name: a damaged file")
    return stored


@dataclass(frozen=True)
class Reader:
    """Reads one format of weights.

    Attributes:
        knows: whether a path, whose first bytes are given (none of a folder), is of that format.
        read: what it holds; raises RetortError naming the file and what is wrong with it.
    """

    knows: Callable[[Path, bytes], bool]
    read: Callable[[Path], Stored]


# by name; the first that knows the file reads it
READERS: dict[str, Reader] = {
    "folder of variables": Reader(lambda path, head: path.is_dir(), lodtensor.read_folder),
    "pth": Reader(lambda path, head: pth.looks_like(head), pth.read),
    "pdparams": Reader(lambda path, head: head.startswith(b"\x80"), pdparams.read),
    "tar of variables": Reader(lambda path, head: tar.looks_like(head), lodtensor.read_tar),
    "safetensors": Reader(lambda path, head: safetensors.looks_like(head), safetensors.read),
}


def _reader(path: Path) -> Callable[[Path], Stored]:
    head = b"" if path.is_dir() else beginning(path)
    for reader in READERS.values():
        if reader.knows(path, head):
            return reader.read
    raise RetortError(f"{path}: {what_else(head)}")


def beginning(path: Path, count: int = 512) -> bytes:
    """The first bytes of a file."""
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise RetortError(f"{path}: cannot be read ({error.strerror})") from None


def what_else(head: bytes) -> str:
    """What a file is that is none of the kinds that hold weights."""
    text = head.lstrip().lower()
    if not head.strip(b"\0"):
        return "an empty file, not weights; fetch it again"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")):
        return "a web page (an error page, most likely), not weights; fetch the file again"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights themselves; run 'git lfs pull'"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "a compressed file; unpack it once (gunzip, unxz, ...) and name the result"
    return (
        "neither .safetensors, .pth, .pdparams, nor a tar of LoDTensor variables; "
        "if it should be one, fetch it again"
    )

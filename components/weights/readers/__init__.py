"""Readers of weights files: numpy arrays by name, and nothing else. Reading executes nothing."""

from __future__ import annotations

from pathlib import Path

from components.common.errors import RetortError
from components.weights.readers.stored import Stored


def read(path: Path) -> Stored:
    """What a weights file (or a folder of variables) holds; its content says what it is, not its name.

    Raises:
        RetortError: one line that names the file and what is wrong with it.
    """
    from components.weights.readers import pth, safetensors

    head = beginning(path)
    if safetensors.looks_like(head):
        return safetensors.read(path)
    if pth.looks_like(head):
        return pth.read(path)
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
    if not head:
        return "an empty file, not weights; fetch it again"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")):
        return "a web page (an error page, most likely), not weights; fetch the file again"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights themselves; run 'git lfs pull'"
    return (
        "neither .safetensors, .pth, .pdparams, nor a tar or folder of LoDTensor variables, "
        "or not from its first byte on"
    )

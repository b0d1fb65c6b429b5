"""Plain tars, mapped: members as views. Anything but files and folders inside is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from components.common.errors import RetortError
from components.weights.readers.stored import mapped, shown

BLOCK = 512
KINDS = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe",
    b"S": "a sparse file",
}  # fmt: skip
MAX_NAME = 64 * 1024  # bytes of a long name or of extended headers


def looks_like(head: bytes) -> bool:
    """Whether a file begins as a tar does."""
    return head[257:262] == b"ustar" or (len(head) >= BLOCK and _checked(memoryview(head[:BLOCK])))


def members(path: Path) -> Iterator[tuple[str, memoryview]]:
    """Names and contents of the files in a tar, in its order.

    Raises:
        RetortError: naming the member that leaves the folder or is no file, or when the tar is cut off.
    """
    data = mapped(path)
    at = 0
    extended: dict[str, str] = {}
    while True:
        header = data[at : at + BLOCK]
        if len(header) < BLOCK:
            raise RetortError(f"{path}: the tar is cut off after {at:,} bytes: half a file? Fetch it again")
        if not any(header):
            return
        if not _checked(header):
            raise RetortError(f"{path}: the tar is damaged at byte {at:,} (a header's checksum is wrong)")
        kind = bytes(header[156:157])
        name = extended.pop("path", None) or _name(header)
        size = _number(path, extended.pop("size", "") or bytes(header[124:136]))
        at += BLOCK
        content = data[at : at + size]
        if len(content) < size:
            raise RetortError(
                f"{path}: {shown(name)} should have {size:,} bytes, the tar ends after {len(content):,}: "
                "half a file? Fetch it again"
            )
        at += -(-size // BLOCK) * BLOCK
        if kind in (b"L", b"x", b"g"):
            if size > MAX_NAME:
                raise RetortError(f"{path}: the tar has a name of {size:,} bytes")
            if kind == b"L":
                extended["path"] = _text(bytes(content).rstrip(b"\0"))
            elif kind == b"x":
                extended |= _records(path, bytes(content))
            continue
        extended = {}
        _need_inside(path, name)
        if kind == b"5":
            continue
        if kind not in (b"0", b"\0", b"7"):
            what = KINDS.get(kind, f"of kind {kind!r}")
            raise RetortError(f"{path}: {shown(name)} is {what}; a tar of weights has plain files only")
        yield name, content


def _checked(header: memoryview) -> bool:
    """Whether a header's checksum is right: the sum of its bytes, its own field taken as spaces."""
    try:
        given = int(bytes(header[148:156]).strip(b" \0") or b"x", 8)
    except ValueError:
        return False
    return given == sum(header) - sum(header[148:156]) + 8 * 0x20


def _name(header: memoryview) -> str:
    name = bytes(header[:100]).partition(b"\0")[0]
    prefix = bytes(header[345:500]).partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _number(path: Path, field: bytes | str) -> int:
    """A size: octal, base 256 with the first bit set (GNU), or decimal from an extended header."""
    try:
        if isinstance(field, str):
            size = int(field) if len(field) < 20 else -1
        elif field[0] == 0x80:
            size = int.from_bytes(field[1:], "big")
        else:
            size = int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        size = -1
    if size < 0:
        raise RetortError(f"{path}: the tar is damaged (a size that is no number)")
    return size


def _records(path: Path, content: bytes) -> dict[str, str]:
    """The words of an extended header: lines of ``length key=value``, where the length counts all of it."""
    found: dict[str, str] = {}
    while content:
        length, _, rest = content.partition(b" ")
        if not length.isdigit() or len(length) > 6 or not len(length) + 2 < int(length) <= len(content):
            raise RetortError(f"{path}: the tar is damaged (an extended header)")
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if key in (b"path", b"size"):
            found[key.decode()] = _text(value)
        elif key.startswith(b"GNU.sparse"):
            raise RetortError(f"{path}: the tar has a sparse file; a tar of weights has plain files only")
        content = content[int(length) :]
    return found


def _need_inside(path: Path, name: str) -> None:
    if not name or name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts or "\0" in name:
        raise RetortError(f"{path}: member '{shown(name)}' would leave the folder; refused")

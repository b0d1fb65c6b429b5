"""Files damaged on purpose: by chance, and by what an attacker would try with each format."""

from __future__ import annotations

import random
import struct

LENGTHS = (0, 1, 0x7F, 0xFF, 0x7FFF_FFFF, 0xFFFF_FFFF, 1 << 33, (1 << 63) - 1, (1 << 64) - 1)
# pickle: calls, states, globals, memo far away, long strings, big numbers, marks, frames, persistent ids
OPCODES = (
    b"cos\nsystem\n(U\x06id>out tR", b"cbuiltins\neval\n(X\x01\x00\x00\x001tR",
    b"\x8c\x02os\x8c\x06system\x93", b"r\xff\xff\xff\xff", b"j\xff\xff\xff\x7f", b"X\xff\xff\xff\xff",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x96\xff\xff\xff\xff\xff\xff\xff\x00", b"\x8b\xff\xff\xff\x7f",
    b"B\xff\xff\xff\x7f", b"\x95\xff\xff\xff\xff\xff\xff\xff\xff", b"(", b"t", b"R", b"b", b"}", b"]", b"2",
    b"0", b"1", b"Q", b"u", b"e", b"\x85", b"\x93", b".", b"i", b"o", b"\x81", b"\x92", b"\x82\x01", b"P0\n",
    b"I99999999\n", b"(" * 500, b"]" + b"2a" * 50,
)  # fmt: skip
NAMES = (b"../../x", b"/etc/x", b"a/../../x", b"\xff\xfe", b"x" * 99)


def mutate(seed: int, content: bytes) -> bytes:
    """``content`` with one to four changes that ``seed`` decides."""
    chance = random.Random(seed)
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        chance.choice((_flip, _flip, _cut, _length, _opcode, _repeat, _drop, _tar, _text))(chance, data)
    return bytes(data)


def _at(chance: random.Random, data: bytearray) -> int:
    """A place: mostly in the first 2,000 bytes or the last 500, where the structure is."""
    end = max(1, len(data))
    return chance.choice(
        (chance.randrange(end), chance.randrange(min(end, 2000)), max(0, end - chance.randrange(1, 500)))
    )


def _flip(chance: random.Random, data: bytearray) -> None:
    if data:
        for _ in range(chance.choice((1, 1, 8))):
            data[_at(chance, data) % len(data)] ^= 1 << chance.randrange(8)


def _cut(chance: random.Random, data: bytearray) -> None:
    del data[chance.choice((_at(chance, data), len(data) // 2)) :]


def _length(chance: random.Random, data: bytearray) -> None:
    at, layout = _at(chance, data), chance.choice(("<I", "<Q", "<H", ">I"))
    limit = 1 << (8 * struct.calcsize(layout))
    data[at : at + struct.calcsize(layout)] = struct.pack(layout, chance.choice(LENGTHS) % limit)


def _opcode(chance: random.Random, data: bytearray) -> None:
    at = _at(chance, data)
    data[at : at + chance.randrange(3)] = chance.choice(OPCODES)


def _repeat(chance: random.Random, data: bytearray) -> None:
    at = _at(chance, data)
    piece = bytes(data[at : at + chance.randrange(1, 600)])
    data[at:at] = piece * chance.choice((1, 2, 50))


def _drop(chance: random.Random, data: bytearray) -> None:
    at = _at(chance, data)
    del data[at : at + chance.choice((1, 2, 4, 8, 512))]


def _tar(chance: random.Random, data: bytearray) -> None:
    """Another kind, name or size for a tar's member, with a checksum that is right."""
    if len(data) < 1024:
        return
    at = chance.randrange(len(data) // 512) * 512
    header = data[at : at + 512]
    what = chance.randrange(3)
    if what == 0:
        header[156] = chance.choice(b"0123456LKxgSDV\0\x7f")
    elif what == 1:
        header[:100] = chance.choice(NAMES).ljust(100, b"\0")
    else:
        header[124:136] = chance.choice(
            (b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-0000000001\0", b"0" * 12)
        )
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    data[at : at + 512] = header


def _text(chance: random.Random, data: bytearray) -> None:
    """Another number or word in text, such as a JSON header."""
    at = _at(chance, data)
    data[at : at + chance.randrange(4)] = chance.choice(
        (
            b"-1",
            b"1e400",
            b"99999999999999999999",
            b"null",
            b"[" * 300,
            b'"',
            b"{",
            b"NaN",
            b"\xed\xa0\x80",
            b"\n",
        )
    )

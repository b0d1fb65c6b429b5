"""A relay before an object store, one request a connection, that drops those that a rule names in the midst.

A rule says of each connection how many bytes may pass on it; ``inf``: all.
"""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, repeat
from types import TracebackType

PORTION = 1 << 18
LATEST = 8 << 20  # bytes after which a connection that is to be dropped is dropped at the latest
ALL = float("inf")


def some(share: float, seed: int = 7) -> Iterator[float]:
    """That share of connections, at once or anywhere in their first 8 MiB."""
    chance = random.Random(seed)
    while True:
        yield chance.choice((0, chance.randrange(LATEST))) if chance.random() < share else ALL


def first(count: int, after: int) -> Iterator[float]:
    """The first ``count`` connections, after so many bytes each."""
    return chain(repeat(after, count), repeat(ALL))


class Dropping:
    """``with Dropping(port, some(1 / 20)) as relay:``; ``relay.url`` is the store's address from then on.

    Each request asks for the connection to be closed, so that a transfer of many parts takes many of them.
    """

    def __init__(self, port: int, rule: Iterator[float]) -> None:
        self._port, self._rule = port, rule
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self.connections = self.dropped = 0

    def __enter__(self) -> Dropping:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()

    def _serve(self) -> None:
        while True:
            try:
                inner, _ = self._server.accept()
            except OSError:
                return
            self.connections += 1
            left = [next(self._rule)]
            self.dropped += left[0] < ALL
            threading.Thread(target=self._relay, args=(inner, left), daemon=True).start()

    def _relay(self, inner: socket.socket, left: list[float]) -> None:
        with suppress(OSError):
            outer = socket.create_connection(("127.0.0.1", self._port))
            back = threading.Thread(target=self._pump, args=(outer, inner, left), daemon=True)
            back.start()
            head = b""
            while b"\r\n\r\n" not in head and (part := inner.recv(PORTION)):
                head += part
            outer.sendall(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
            left[0] -= len(head)
            self._pump(inner, outer, left)
            back.join()
            outer.close()
        inner.close()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, left: list[float]) -> None:
        """Hand on until the source ends, or what may pass on this connection has passed."""
        with suppress(OSError):
            while left[0] > 0 and (part := source.recv(PORTION)):
                left[0] -= len(part)
                target.sendall(part if left[0] >= 0 else part[: int(left[0])])
        for one in (source, target) if left[0] <= 0 else (target,):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR if left[0] <= 0 else socket.SHUT_WR)

"""A server on a socket of this machine that says exactly the bytes it was told to."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from hydra_llm import Node

Bytes = bytes | Callable[[], Iterable[bytes]]
"""What it says, or what makes it; it may go on for ever."""

MODEL = "llama3.2:3b"


def answer(body: bytes, *more: bytes, kind: bytes = b"application/json") -> bytes:
    """A plain answer in HTTP; the connection is closed after it."""
    lines = (b"HTTP/1.1 200 OK", b"Content-Type: " + kind, b"Connection: close", *more)
    return b"\r\n".join((*lines, b"Content-Length: %d" % len(body), b"", body))


def begun(*more: bytes, kind: bytes = b"application/x-ndjson") -> bytes:
    """The head of a stream whose end is the connection's."""
    return b"\r\n".join((b"HTTP/1.1 200 OK", b"Content-Type: " + kind, *more, b"", b""))


TAGS = answer(b'{"models":[{"name":"%s","digest":"d","size":2000000000}]}' % MODEL.encode())
HEALTHY: dict[str, Bytes] = {
    "/api/tags": TAGS,
    "/api/version": answer(b'{"version":"0.32.15"}'),
    "/api/ps": answer(
        b'{"models":[{"name":"%s","digest":"d","size":2800000000,"size_vram":2800000000,'
        b'"context_length":4096}]}' % MODEL.encode()
    ),
    "/api/show": answer(b"{}"),
}
"""What a node says of itself that any router would choose."""


class Hostile:
    """
    One such server.

    Attributes:
        requests: path of each request.
        heads: of each request, as it came.
        sent: bytes that were taken from it.
    """

    def __init__(self, says: Mapping[str, Bytes]) -> None:
        self._says = {**HEALTHY, **says}
        self.requests: list[str] = []
        self.heads: list[bytes] = []
        self.sent = 0
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._is_closed = False
        self._threads: list[threading.Thread] = []
        self._open: set[socket.socket] = set()

    @property
    def url(self) -> str:
        host, port = self._listening.getsockname()[:2]
        return f"http://{host}:{port}"

    def node(self, node_id: str = "hostile", **about: Any) -> Node:
        """As it is configured: the fastest there could be."""
        return Node(about.pop("url", self.url), id=node_id, vram_gb=80, slots=8, **about)

    def serve(self) -> None:
        while not self._is_closed:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._talk, args=(connection,), name="hostile")
            self._open.add(connection)
            thread.start()
            self._threads.append(thread)

    def _talk(self, connection: socket.socket) -> None:
        # One request a connection: a reused one would hide what was said last.
        with connection, suppress(OSError):
            connection.settimeout(10)
            data = b""
            while b"\r\n\r\n" not in data:
                more = connection.recv(65536)
                if not more:
                    return
                data += more
            self.heads.append(data.partition(b"\r\n\r\n")[0])
            path = data.split(b" ", 2)[1].decode()
            self.requests.append(path)
            says = self._says.get(path, answer(b"{}"))
            for part in (says,) if isinstance(says, bytes) else says():
                connection.sendall(part)
                self.sent += len(part)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass

    def close(self, door: threading.Thread) -> None:
        """End all talks; ``door`` is who accepts them."""
        self._is_closed = True
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        door.join(5)
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)


@contextmanager
def hostile(says: Mapping[str, Bytes]) -> Iterator[Hostile]:
    """A server that answers these paths so, and the others as a healthy node would."""
    server = Hostile(says)
    thread = threading.Thread(target=server.serve, name="hostile-door")
    thread.start()
    try:
        yield server
    finally:
        server.close(thread)
